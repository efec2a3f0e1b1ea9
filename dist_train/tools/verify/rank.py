"""The program of each rank of a check: train some steps of a config on a frozen net, print the outcome as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.manager import Checkpoints
from dist_train.config.loading import load_config
from dist_train.config.schema import Config
from dist_train.data.batches import Batch
from dist_train.data.evaluation_batches import evaluation_batches
from dist_train.data.sampler import ShardSampler, count_into
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import load_splits
from dist_train.distributed.process_end import end_process
from dist_train.distributed.process_info import detect_process
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DistTrainError
from dist_train.models.invariance import drop_rates
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.tools.verify.trial import Outcome, Trial
from dist_train.training.build import build_components
from dist_train.training.step.train_step import Step


def freeze_for_comparison(net: nn.Module) -> list[str]:
    """Disable what depends on how a batch is divided. Returns the names of what was disabled."""
    frozen = set()
    for module in net.modules():
        for rate in drop_rates(module):
            frozen.add("dropout off")
            setattr(module, rate, 0.0)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            frozen.add("BatchNorm frozen")
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign,misc]
    return sorted(frozen)


def run(trial: Trial) -> Outcome:
    """Run a trial.

    Collective: every rank calls this with the same trial.
    """
    config = load_config(trial.config)
    splits = load_splits(config.data, config.seed, detect_process(os.environ).local_world_size)
    world = World.join(config).with_shared_memory(config.setup_timeout_s)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    outcome = Outcome(on_cpu=world.device.type == "cpu")
    components = build_components(
        config, world, splits, channels_last=False, change=lambda net: outcome.frozen.extend(freeze_for_comparison(net))
    )
    step, state, total = components.step, TrainerState(), components.learning_rate.total_steps
    if total < trial.steps:
        raise ConfigError(f"The check takes {trial.steps} steps, and train_for has {total}. Set a longer train_for.")
    with _checkpoints(trial, world, config) as checkpoints:
        if checkpoints is not None:
            state = checkpoints.restore_latest(step) or state
        outcome.began_at = state.step
        step.warm_up(state.step)
        gathered: list[Tensor] = []
        step.eager.batches.on_gather = gathered.append
        while state.step < trial.steps or trial.kill_after_s:
            if state.step == step.unfreezes_at:
                step.warm_up(state.step)
            step.take(state.step)
            state.step += 1
            totals = step.pop_window()
            outcome.losses.append(totals["loss"] / totals["seen"])
            if checkpoints is not None and (state.step == trial.save_at or trial.kill_after_s):
                checkpoints.save(state, step)
            if checkpoints is not None and trial.kill_after_s and state.step == 1:
                checkpoints.finish()
                threading.Timer(trial.kill_after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if checkpoints is not None:
            checkpoints.finish()
    outcome.weights = sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in step.net.parameters())).hexdigest()
    _count_examples(outcome, components.sampler, gathered, world)
    if splits.val is not None and not trial.folder:  # once per world size is enough
        batches = evaluation_batches(splits.val, step.net, world, config)
        counts = _counted([batch.indices for batch in batches], num_examples(splits.val), world)
        outcome.evaluated = int((counts == 1).sum()), len(counts)
    outcome.joined_batch_error = _doubled(step, step.eager.batches.at(0, 0))
    if world.is_rank_zero:
        print(json.dumps(asdict(outcome)), flush=True)
    world.leave()
    return outcome


@contextmanager
def _checkpoints(trial: Trial, world: World, config: Config) -> Iterator[Checkpoints | None]:
    if not trial.folder:
        yield None
        return
    run_dir = RunDir(Path(trial.folder))
    if world.is_rank_zero:
        run_dir.create()
        begin_attempt(run_dir, config, wandb_id="verify")
    world.barrier()
    checkpoints = Checkpoints(run_dir, world, config, keep_every_steps=0)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _count_examples(outcome: Outcome, sampler: ShardSampler, gathered: list[Tensor], world: World) -> None:
    """Count over all ranks, in the steps taken and in the whole first epoch, what its order does not hold so often.

    Collective: every rank must call this.
    """
    in_epoch = max(0, sampler.steps_per_epoch - outcome.began_at) * sampler.plan.grad_accum_steps
    whole = _counted([sampler.indices(step) for step in range(sampler.steps_per_epoch)], sampler.num_examples, world)
    taken = _counted(gathered[:in_epoch], sampler.num_examples, world)
    held = sampler.times_held(0)
    outcome.replaces = sampler.replaces
    outcome.duplicates = int(((whole > held) | (taken > held)).sum())
    outcome.epoch = int(((whole == held) & (held > 0)).sum()), int((whole == 0).sum()), sampler.num_examples


def _counted(indices: list[Tensor], total: int, world: World) -> Tensor:
    """Return how often each example occurs, over all ranks: int32 [total].

    Collective: every rank must call this.
    """
    counts = torch.zeros(total, dtype=torch.int32)
    count_into(counts, indices)
    return world.all_reduce(counts.to(world.device)).cpu()


@torch.no_grad()
def _doubled(step: Step, batch: Batch) -> float:
    objective = step.evaluation_objective
    step.net.eval()
    losses = []
    for times in (1, 2):
        torch.manual_seed(0)  # a net may use random numbers
        inputs, targets = recursively_apply(
            lambda t, n=times: torch.cat([t] * n) if t.ndim else t, (batch.inputs, batch.targets)
        )
        losses.append(float(objective.loss(objective.forward(step.net, inputs), targets)))
    return abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    sys.path.insert(0, str(Path.cwd()))  # user code is imported from here first
    try:
        run(Trial(**settings))
    except DistTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(error.exit_code)
    end_process(0)


if __name__ == "__main__":
    main()
