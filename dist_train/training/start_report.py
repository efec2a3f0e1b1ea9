"""What a start logs: the settings it runs with, the limits of its promises, and at the end the results."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from dist_train.checkpoints.contents import TrainerState
from dist_train.config.schema import Config
from dist_train.data.sampler import ShardSampler
from dist_train.data.splits import Splits
from dist_train.runs.accuracy_text import accuracy_text, is_share
from dist_train.runs.directory import RunDir
from dist_train.runs.extension import describe
from dist_train.runs.further_metrics import further_text
from dist_train.training.provenance import DIVISION_FACTORS, changed_determinism_factors
from dist_train.training.step.parameter_groups import describe_groups
from dist_train.training.step.train_step import Step

_log = logging.getLogger(__name__)


def report_start(
    config: Config,
    run_dir: RunDir,
    splits: Splits,
    sampler: ShardSampler,
    step: Step,
    state: TrainerState,
    total_steps: int,
    provenance: dict[str, Any],
) -> None:
    """Log a summary of the run before it starts."""
    plan = sampler.plan
    data = config.data.bundle or config.data.name
    _log.info("run directory %s, attempt %d", run_dir.path, run_dir.status.attempt)
    epoch = f"{sampler.num_dropped} examples dropped per epoch"
    if sampler.replaces:
        by = "balanced over the classes" if config.data.sample_weights is None else "by data.sample_weights"
        epoch = f"{sampler.total_size} examples drawn per epoch with replacement, {by}"
    _log.info(
        "data %s: %d training examples, validation on %s; %d steps per epoch, %s",
        data, sampler.num_examples, splits.val_source, sampler.steps_per_epoch, epoch,
    )  # fmt: skip
    if splits.choice_by_test:
        for name in ("early_stop", "best_by"):
            if getattr(config, name) is not None:
                _log.warning("%s chooses by %s", name, splits.choice_by_test)
    _log.info(
        "net %s: %s parameters; %s, %d threads per process, mixed precision %s",
        config.model.bundle or config.model.name, f"{sum(p.numel() for p in step.net.parameters()):,}",
        provenance["device"], provenance["num_threads"], provenance["mixed_precision"],
    )  # fmt: skip
    until = step.unfreezes_at
    if step.frozen is not None and (until is None or state.step < until):
        _log.info("frozen: %s%s", step.frozen, "" if until is None else f", until {until} steps are done")
    _log.info("%s", plan.describe())
    if provenance["world_size"] > 1:
        _log.info("gradients of the %d processes are added by %s", provenance["world_size"], provenance["exchange"])
    at_most = config.per_device_batch_size
    if at_most != "auto" and plan.grad_accum_steps > 1 and 4 * plan.per_device_batch_size < at_most:
        _log.warning(
            "%d examples per process have no divisor between %d and per_device_batch_size=%d: small batches are slow. "
            "Choose a global_batch_size with more divisors, or raise per_device_batch_size to %d.",
            plan.per_rank_batch_size, plan.per_device_batch_size, at_most, plan.per_rank_batch_size,
        )  # fmt: skip
    for split, fingerprint in splits.fingerprints.items():
        if "unsteady" in fingerprint:
            _log.warning(
                "the %s set is not fingerprinted: with the same seed its example %d differs each time, so no resume is "
                "exact. Draw from the global generators of torch, numpy and Python, which are seeded for each example.",
                split, fingerprint["unsteady"],
            )  # fmt: skip
    if config.profile is not None and config.profile.start >= total_steps:
        _log.warning("profile=%s: the run ends after %d steps, so nothing is traced", config.profile, total_steps)
    for extension in provenance.get("extensions", ()):
        _log.info("extended %s", describe(extension))
    if state.step:
        _log.info("resumed at step %d of %d", state.step, total_steps)


def report_limits(config: Config, step: Step, provenance: dict[str, Any], before: dict[str, Any]) -> None:
    """Log the limits of exactness for this net. `before`: the provenance of a resumed run, else {}."""
    dependent = step.effects.world_size_dependent
    if config.optimizer.rounds_to_bf16:
        dependent.append(f"{config.optimizer.name} (its steps are rounded to bf16)")
    rounding = [f"{provenance['mixed_precision']} rounding"] if provenance["mixed_precision"] != "no" else []
    groups = step.eager.optimizer.param_groups
    if len(groups) > 1:
        _log.info("optimizer: %s", describe_groups(groups))
    report_dependence(dependent + rounding)
    for name in step.effects.unsaved:
        _log.warning(
            "resume is not exact: each forward changes %s.%s, which is not in the checkpoint. Make it a buffer.",
            type(step.net).__name__, name,
        )  # fmt: skip
    for name, change in changed_determinism_factors(before, provenance).items() if before else ():
        if name in DIVISION_FACTORS and dependent:
            effect = f"the result changes, since it depends on {', '.join(dependent)}"
        else:
            effect = "equal within rounding, not bit-identical"
        _log.warning("resumed with a different %s: %s: %s", name, change, effect)


def report_dependence(reasons: Iterable[str]) -> None:
    for reason in reasons:
        _log.info("the result depends on the number of processes: %s", reason)


def report_results(run_dir: RunDir) -> None:
    result = run_dir.read_result()
    seconds = f"{result['train_s']:.1f} s in training steps, {result['total_s']:.1f} s in all"
    if run_dir.status.attempt > 1:
        ratio = 100 * result["effective_training_time"]
        seconds += f"; {ratio:.1f} % of the time since the first of {run_dir.status.attempt} starts went into new steps"
    _log.info("finished: %d steps, %s", result["step"], seconds)
    for split in ("train", "val", "test"):
        numbers = further_text(result, split)
        accuracy = accuracy_text(result, split, unit=" %")
        if accuracy is None and f"{split}/loss" in result:
            numbers.insert(0, f"loss {result[f'{split}/loss']:.4f}")
        elif accuracy is not None:
            seen = result[f"{split}/seen"]
            counts = f" ({round(result[f'{split}/accuracy'] * seen)} / {seen})" if is_share(result, split) else ""
            numbers.insert(0, f"accuracy {accuracy}{counts}")
        if numbers:
            _log.info("%s %s", split, ", ".join(numbers))
    if any(run_dir.profile.glob("*.json.gz")):
        _log.info("traces are in %s: open one at https://ui.perfetto.dev", run_dir.profile)
    _log.info("all files are in %s", run_dir.path)
