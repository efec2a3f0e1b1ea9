"""One attempt of a run: find its directory, build the components, restore, train, and report the result."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from dist_train.checkpoints.manager import Checkpoints
from dist_train.checkpoints.manifest import find_checkpoint, run_id_by_checkpoints
from dist_train.checkpoints.storage import load_weights
from dist_train.checkpoints.train_state import TrainState
from dist_train.config.loading import to_yaml
from dist_train.config.schema import Config
from dist_train.data.epoch_audit import ShardAudit
from dist_train.data.identity import differences
from dist_train.data.sampler import ShardSampler
from dist_train.data.splits import Splits, load_splits
from dist_train.distributed import watchdog
from dist_train.distributed.process import detect_process
from dist_train.distributed.scheduler import Scheduler
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.stdio import redirect_output
from dist_train.distributed.world import World
from dist_train.errors import DataError, DistTrainError
from dist_train.runs.directory import RunDir
from dist_train.runs.progress import Screen, log_to_file, log_to_screen
from dist_train.runs.records import State
from dist_train.runs.start_options import StartOptions, check_start, find_run_dir, remove_if_not_started
from dist_train.training.agreement import Agreement
from dist_train.training.build import build_components
from dist_train.training.failures import FailureHandler
from dist_train.training.provenance import (
    DIVISION_FACTORS,
    changed_data,
    changed_determinism_factors,
    collect_provenance,
)
from dist_train.training.recorder import RunRecorder
from dist_train.training.step.train_step import Step
from dist_train.training.tracking import Tracker
from dist_train.training.trainer import Trainer

_log = logging.getLogger(__name__)


def run_training(
    config: Config, start: StartOptions, request: StopRequest, started: float, scheduler: Scheduler
) -> State:
    """Train until the end or an agreed stop. `started`: time.perf_counter() at the start of the process.

    Collective: every rank calls this with the same arguments.
    """
    place = detect_process(os.environ)
    launched_in = RunDir(start.run_dir) if start.launched and start.run_dir else None
    failure_handler = FailureHandler(place, config, launched_in)
    log_to_screen(place.rank, start.verbosity)
    with _leaving_no_rubbish(failure_handler, start), failure_handler:
        # Before the ranks join: a rank that waits for a lock or a download must not block others in a collective.
        splits = load_splits(config.data, config.seed, place.local_world_size)
        watchdog.arm(config.setup_timeout_s)
        world = World.join(config, find_run_dir(config, start).precision)
        run_dir = RunDir(Path(world.on_rank_zero(lambda: str(find_run_dir(config, start, claim=True).path))))
        attempt = world.on_rank_zero(lambda: _open(run_dir, config, splits, start, started))
        if attempt is None:
            if world.is_rank_zero:
                print(f"{run_dir.path} is finished already: nothing to do.")
            world.leave()
            return "FINISHED"
        run_dir.attempt = attempt
        failure_handler.run_dir = run_dir
        world.check_shared(run_dir.path)
        world.check_same("config", to_yaml(config))
        _check_same_data(world, splits)
        log_to_file(run_dir, world.rank)
        if not world.is_rank_zero:  # with a hundred nodes, only rank zero prints
            failure_handler.errors = redirect_output(run_dir.rank_log(world.rank))
        world = _same_threads(world, run_dir)
        _log.debug("rank %d of %d, %s, %d threads", world.rank, world.size, world.device, world.num_threads)
        with _build(config, world, run_dir, splits, start, request, started, scheduler) as run:
            # The set-up is over: compiling may take long, a step must not.
            world.set_timeout(config.stall_timeout_s)
            watchdog.arm(config.stall_timeout_s)
            failure_handler.waits = f"stall_timeout_s={config.stall_timeout_s:g}"
            state = run.train()
    if world.is_rank_zero:
        run_dir.unlock()
        if state == "FINISHED":
            _report_results(run_dir)
    world.leave()
    return state


@contextmanager
def _leaving_no_rubbish(failure_handler: FailureHandler, start: StartOptions) -> Iterator[None]:
    """Remove the directory of a run that did not start. With several ranks the launcher does it in the end."""
    try:
        yield
    except DistTrainError:
        if failure_handler.run_dir is not None:
            remove_if_not_started(failure_handler.run_dir, start)
        raise


def _open(run_dir: RunDir, config: Config, splits: Splits, start: StartOptions, started: float) -> int | None:
    """Begin an attempt and return its number, None if the run is finished. Rank zero only."""
    if check_start(run_dir, config, start):
        return None
    changes = changed_data(run_dir.read_provenance(), splits.identity) if run_dir.holds_checkpoints else []
    if changes:
        raise DataError(
            f"{run_dir.path} was trained on different data:\n" + "\n".join(f"  {change}" for change in changes) + "\n"
            "Give the new run another name with --run-name, or restore the data."
        )
    run_dir.lock()
    if check_start(run_dir, config, start, create=False):  # another start may have finished it in between
        run_dir.unlock()
        return None
    # Without an id in its files, a run keeps that of its checkpoints: with another they would not count as its own.
    wandb_id = run_id_by_checkpoints(run_dir) or uuid4().hex[:8]
    run_dir.begin_attempt(config, wandb_id=wandb_id, started=started, asked_at=start.asked_at)
    return run_dir.attempt


def _check_same_data(world: World, splits: Splits) -> None:
    """Check that all ranks hold the same examples: an index must mean the same example on each rank.

    Collective: every rank must call this.

    Raises:
        DataError: on every rank, naming the first that differs from rank zero.
    """
    theirs = world.from_rank_zero(splits.identity)
    said = [
        f"The {split} set of rank {world.rank} on {socket.gethostname()} has {here}; that of rank 0 has {there}. "
        f"Every rank must build the same set: from the same files, with random draws under a fixed seed."
        for split, here, there in differences(splits.identity, theirs)
    ]
    for text in filter(None, world.gather("".join(said[:1]))):
        raise DataError(text)


def _same_threads(world: World, run_dir: RunDir) -> World:
    """Return `world` with the number of threads that the run began with."""
    before = run_dir.read_provenance()
    threads = before.get("num_threads")
    if threads and before.get("world_size") == world.size and threads != world.num_threads:
        _log.info("threads per process: %d, as at the start of the run (not %d)", threads, world.num_threads)
        return world.with_threads(threads)
    return world


def _build(
    config: Config,
    world: World,
    run_dir: RunDir,
    splits: Splits,
    start: StartOptions,
    request: StopRequest,
    started: float,
    scheduler: Scheduler,
) -> Trainer:
    """Build the trainer and restore the newest checkpoint.

    Collective: every rank must call this.
    """
    parts = build_components(config, world, splits)
    sampler, step, net, learning_rate = parts.sampler, parts.step, parts.step.net, parts.learning_rate
    total_steps = learning_rate.total_steps
    checkpoints = Checkpoints(
        run_dir,
        world,
        config,
        config.keep_every.to_steps(sampler.steps_per_epoch),
        on_first_save=scheduler.on_first_save,
    )
    # Room for two checkpoints, each with the weights and optimizer state of twice their size.
    size = sum(p.nbytes for p in net.parameters())
    world.on_rank_zero(lambda: run_dir.check_room(6 * size))
    state = checkpoints.restore_latest(step)
    if state is None:
        state = TrainState()
        if start.init_from is not None:
            load_weights(net, find_checkpoint(RunDir(start.init_from), "last"))

    provenance = collect_provenance(world, sampler.plan, world.hosts()) | {"data": splits.description}
    before = run_dir.read_provenance() if state.step else {}
    provenance["data_identity"] = before.get("data_identity") or splits.identity
    if world.is_rank_zero:
        run_dir.record_resume(state.step, world.size)
        _report(config, run_dir, splits, sampler, net, state, total_steps, provenance)
    # A resumed run keeps the mode that was chosen when it began.
    step.warm_up(state.step, before.get("step_mode", "auto") if config.step_mode == "auto" else config.step_mode)
    provenance["step_mode"] = step.mode
    if world.is_rank_zero:
        _report_limits(step, provenance, before)
        cut = run_dir.cut_metrics(state.step, evaluation_pending=state.evaluation_pending)
        if cut:
            _log.info("%d metric lines after step %d set aside: they are written again", cut, state.step)
        run_dir.write_provenance(provenance)
    audit = ShardAudit(sampler, world, state.step, state.audit)
    step.eager.batches.on_gather = audit.note
    world.barrier()
    save_every = config.save_every
    return Trainer(
        config=config,
        world=world,
        splits=splits,
        step=step,
        state=state,
        checkpoints=checkpoints,
        recorder=RunRecorder(
            config=config,
            world=world,
            run_dir=run_dir,
            step=step,
            state=state,
            tracker=Tracker(run_dir, config, provenance, enabled=world.is_rank_zero),
            screen=Screen(total_steps, sampler.steps_per_epoch, shown=world.is_rank_zero and start.verbosity >= 0),
            total_steps=total_steps,
            steps_per_epoch=sampler.steps_per_epoch,
            started=started,
        ),
        agreement=Agreement(
            world,
            request,
            run_dir,
            scheduler,
            poll=checkpoints.poll,
            on_agreed=lambda: watchdog.arm(config.stall_timeout_s),
            save_every_s=save_every.value if save_every.unit == "s" else 0.0,
        ),
        learning_rate=learning_rate,
        audit=audit,
        steps_per_epoch=sampler.steps_per_epoch,
    )


def _report(
    config: Config,
    run_dir: RunDir,
    splits: Splits,
    sampler: ShardSampler,
    net: nn.Module,
    state: TrainState,
    total_steps: int,
    provenance: dict[str, Any],
) -> None:
    """Log a summary of the run before it starts."""
    plan = sampler.plan
    data = config.data.bundle or config.data.name
    _log.info("run directory %s, attempt %d", run_dir.path, run_dir.attempt)
    _log.info(
        "data %s: %d training examples, validation on %s; %d steps per epoch, %d examples dropped per epoch",
        data, sampler.num_examples, splits.val_source, sampler.steps_per_epoch, sampler.num_dropped,
    )  # fmt: skip
    _log.info(
        "net %s: %s parameters; %s, %d threads per process, mixed precision %s",
        config.model.bundle or config.model.name, f"{sum(p.numel() for p in net.parameters()):,}",
        provenance["device"], provenance["num_threads"], provenance["mixed_precision"],
    )  # fmt: skip
    _log.info(
        "global batch %d = %d per device x %d micro-steps x %d processes",
        plan.global_batch_size, plan.per_device_batch_size, plan.grad_accum_steps, plan.world_size,
    )  # fmt: skip
    if plan.grad_accum_steps > 1 and 4 * plan.per_device_batch_size < config.per_device_batch_size:
        _log.warning(
            "%d examples per process have no divisor between %d and per_device_batch_size=%d: small batches are slow. "
            "Choose a global_batch_size with more divisors, or raise per_device_batch_size to %d.",
            plan.per_rank_batch_size, plan.per_device_batch_size, config.per_device_batch_size,
            plan.per_rank_batch_size,
        )  # fmt: skip
    for split, identity in splits.identity.items():
        if "unsteady" in identity:
            _log.warning(
                "the %s set is not fingerprinted: with the same seed its example %d differs each time, so no resume is "
                "exact. Draw from the global generators of torch, numpy and Python, which are seeded for each example.",
                split, identity["unsteady"],
            )  # fmt: skip
    if state.step:
        _log.info("resumed at step %d of %d", state.step, total_steps)


def _report_limits(step: Step, provenance: dict[str, Any], before: dict[str, Any]) -> None:
    """Log the limits of exactness for this net. `before`: the provenance of a resumed run, else {}."""
    dependent = step.observed.world_size_dependent
    rounding = [f"{provenance['mixed_precision']} rounding"] if provenance["mixed_precision"] != "no" else []
    for reason in dependent + rounding:
        _log.info("the result depends on the number of processes: %s", reason)
    for name in step.observed.unsaved:
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


def _report_results(run_dir: RunDir) -> None:
    result = run_dir.read_result()
    seconds = f"{result['train_s']:.1f} s in training steps, {result['total_s']:.1f} s in all"
    if run_dir.attempt > 1:
        ratio = 100 * result["effective_training_time"]
        seconds += f"; {ratio:.1f} % of the time since the first of {run_dir.attempt} starts went into new steps"
    _log.info("finished: %d steps, %s", result["step"], seconds)
    # Without classes, the accuracy is the net's own metric, which may not be a share of the examples.
    counted = any(f"{split}/accuracy_by_class" in result for split in ("val", "test"))
    for split in ("train", "val", "test"):
        if f"{split}/accuracy" in result:
            seen, accuracy = result[f"{split}/seen"], result[f"{split}/accuracy"]
            share = f"{100 * accuracy:.2f} % ({round(accuracy * seen)} / {seen})"
            _log.info("%s accuracy %s", split, share if counted else f"{accuracy:g}")
    _log.info("all files are in %s", run_dir.path)
