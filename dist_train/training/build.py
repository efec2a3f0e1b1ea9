"""Build a trainer: the components that need no run directory (sampler, learning rate, step), and all that do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.disk_space import CheckpointSize, check_room
from dist_train.checkpoints.initial_weights import load_initial_weights
from dist_train.checkpoints.manager import Checkpoints
from dist_train.checkpoints.manifest import find_checkpoint
from dist_train.checkpoints.storage import load_weights
from dist_train.checkpoints.weights import load_into
from dist_train.config.schema import Config
from dist_train.data.batches import training_batches
from dist_train.data.epoch_audit import ShardAudit
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import num_examples
from dist_train.data.splits import Splits
from dist_train.data.transforms import change_each
from dist_train.distributed import watchdog
from dist_train.distributed.job_scheduler import JobScheduler
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.world import World
from dist_train.errors import ConfigError
from dist_train.models.freezing import Frozen
from dist_train.models.registry import build_model, is_library_net
from dist_train.models.tasks.losses import loss_for
from dist_train.models.tasks.objective import Objective
from dist_train.models.tasks.split_metrics import check_gathered
from dist_train.runs.directory import RunDir
from dist_train.runs.progress import Screen
from dist_train.runs.start_options import StartOptions
from dist_train.training.agreement import Agreement
from dist_train.training.micro_batch import plan_of
from dist_train.training.provenance import collect_provenance
from dist_train.training.recorder import RunRecorder
from dist_train.training.start_report import report_limits, report_start
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.memory_format import is_faster_in_channels_last
from dist_train.training.step.train_step import Step
from dist_train.training.step_trace import StepTrace
from dist_train.training.tensorboard_graph import write_graph
from dist_train.training.tracking import Tracker
from dist_train.training.trainer import Trainer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    sampler: ShardSampler
    learning_rate: LearningRate
    step: Step
    channels_last: bool  # chosen by a trial


def build_components(
    config: Config,
    world: World,
    splits: Splits,
    channels_last: bool | None = None,
    change: Callable[[nn.Module], None] = lambda net: None,
    micro_batch: int | None = None,
) -> Components:
    """Build the components. `change` may modify the net before anything else holds a reference to it.

    `micro_batch`: its size when the run began, for `per_device_batch_size: auto`. None: to be found.
    `channels_last`: whether a net of torchvision or timm is trained in this memory format. None: if it is faster.

    Collective: every rank must call this.
    """
    plan = plan_of(config, world, splits, micro_batch)
    sampler = ShardSampler(num_examples(splits.train), plan, world.rank, config.seed, splits.sample_weights)
    learning_rate = LearningRate.of(config, sampler.steps_per_epoch)
    net = build_model(config.model, splits.input_spec, config.seed)
    if config.ddp.sync_batchnorm and world.device.type == "cuda" and world.size > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    change(net)
    net.to(world.device)
    batches = training_batches(splits.train, sampler, config.data, world.device, config.seed)
    loss = loss_for(net, config, splits, world.device)
    if channels_last is None:
        objective = Objective(net, loss)
        channels_last = is_library_net(config.model) and is_faster_in_channels_last(net, batches, objective, world)
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = None
    if config.model.freeze:
        until = config.model.freeze_until
        frozen = Frozen(net, config.model.freeze, until.to_steps(sampler.steps_per_epoch) if until else None)
    _check_best_by(config, net)
    step = Step(config, world, net, batches, plan, learning_rate, frozen, loss)
    return Components(sampler, learning_rate, step, channels_last)


def build_trainer(
    config: Config,
    world: World,
    run_dir: RunDir,
    splits: Splits,
    start: StartOptions,
    request: StopRequest,
    started: float,
    scheduler: JobScheduler,
) -> Trainer:
    """Build the trainer and restore the newest checkpoint.

    Collective: every rank must call this.
    """
    _check_sizes(config, splits)
    before = run_dir.read_provenance()
    channels_last = before.get("channels_last", False) if "step_mode" in before else None  # as when it began
    micro_batch = before.get("micro_batch", before.get("batch_plan", {}).get("per_device_batch_size"))
    components = build_components(config, world, splits, channels_last, micro_batch=micro_batch)
    sampler, learning_rate, step = components.sampler, components.learning_rate, components.step
    total_steps = learning_rate.total_steps
    checkpoints = Checkpoints(
        run_dir,
        world,
        config,
        config.keep_every.to_steps(sampler.steps_per_epoch),
        on_first_save=scheduler.on_first_save,
    )
    state, initial_weights = _restore(config, checkpoints, step, start)
    state.best_by, state.best_mode = config.best_by, config.best_is
    provenance = _start_attempt(config, world, run_dir, splits, components, state, start, initial_weights)
    audit = ShardAudit(sampler, world, state.step, state.audit)
    step.eager.batches.on_gather = audit.add
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
        trace=StepTrace(config.profile, run_dir, world.rank) if config.profile is not None else None,
    )


def _check_sizes(config: Config, splits: Splits) -> None:
    """Refuse at the start what would be refused when a split is evaluated, unless its number of classes is unknown."""
    evaluated = (splits.val, splits.test, splits.train if config.final_train_eval else None)
    if classes := splits.input_spec["num_classes"]:
        sizes = [num_examples(each) for each in evaluated if each is not None]
        check_gathered(config.task, config.metrics, max(sizes, default=0), classes)


def _check_best_by(config: Config, net: nn.Module) -> None:
    """Refuse a metric that no evaluation will have. Those of the net's own are known after the first evaluation."""
    name = (config.best_by or "val/loss").removeprefix("val/")
    counts = config.task == "classification" and config.ignore_index is None
    ours = ["loss", *(["accuracy"] if counts else []), *(["accuracy_tta"] if config.data.tta else []), *config.metrics]
    if name not in ours and getattr(net, "metrics", None) is None:
        raise ConfigError(
            f"best_by={config.best_by}: the evaluations have {', '.join(ours)}. Name one of them, or add it to metrics."
        )


def _restore(
    config: Config, checkpoints: Checkpoints, step: Step, start: StartOptions
) -> tuple[TrainerState, dict[str, Any] | None]:
    """Load the newest checkpoint, else the weights of `start.init_from` or `model.weights`.

    Also returns what run.json records of the file of `model.weights`, if that was read.

    Collective: every rank must call this.
    """
    size = CheckpointSize.of(step.net, config)
    checkpoints.world.on_rank_zero(lambda: check_room(checkpoints.run_dir, size))
    state = checkpoints.restore_latest(step)
    if state is not None:
        return state, None
    if start.init_from is not None:
        load_weights(step.net, find_checkpoint(RunDir(start.init_from), "last"))
    record = None
    if config.model.weights is not None:
        record = load_on_all(step.net, config.model.weights, checkpoints.world)
    if start.init_from is not None or config.model.weights is not None:
        step.restart_optimizer()
    return TrainerState(), record


def load_on_all(net: nn.Module, path: Path, world: World) -> dict[str, Any]:
    """Load initial weights from a file that rank zero reads; the others get its weights, whatever they find there.

    Collective: every rank must call this.
    """
    record = world.on_rank_zero(lambda: load_initial_weights(net, path))
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in net.state_dict().items()}
    world.broadcast([value for value in weights.values() if value.numel()])
    load_into(net, weights)
    return record


def _start_attempt(
    config: Config,
    world: World,
    run_dir: RunDir,
    splits: Splits,
    components: Components,
    state: TrainerState,
    start: StartOptions,
    initial_weights: dict[str, Any] | None,
) -> dict[str, Any]:
    """Warm the step up; on rank zero, report the start and record its provenance, which is returned.

    Collective: every rank must call this.
    """
    step, sampler = components.step, components.sampler
    before = run_dir.read_provenance() if state.step else {}
    init_from = before.get("init_from") if state.step else start.init_from_text
    provenance = collect_provenance(world, sampler.plan, world.hosts(), init_from) | {"data": splits.description}
    provenance["data_identity"] = before.get("data_identity") or splits.fingerprints
    if "extensions" in before:
        provenance["extensions"] = before["extensions"]
    if recorded := initial_weights or before.get("initial_weights"):
        provenance["initial_weights"] = recorded
    if world.is_rank_zero:
        run_dir.status.record_resume(state.step, world.size)
        total_steps = components.learning_rate.total_steps
        report_start(config, run_dir, splits, sampler, step, state, total_steps, provenance)
    # A resumed run keeps the mode that was chosen when it began.
    step.warm_up(state.step, before.get("step_mode", "auto") if config.step_mode == "auto" else config.step_mode)
    if config.per_device_batch_size == "auto":  # on another number of processes less may be divisible
        provenance["micro_batch"] = before.get("micro_batch", sampler.plan.per_device_batch_size)
    provenance |= {"step_mode": step.mode, "channels_last": components.channels_last}
    if world.is_rank_zero:
        report_limits(config, step, provenance, before)
        cut = run_dir.cut_metrics(state.step, evaluation_pending=state.evaluation_pending)
        if cut:
            _log.info("%d metric lines after step %d set aside: they are written again", cut, state.step)
        run_dir.write_provenance(provenance)
        run_dir.write_layers([asdict(layer) for layer in step.layers])
        if config.tracking.tensorboard and not state.step:
            inputs = change_each(lambda tensor: tensor[:2].cpu().clone(), step.eager.batches.at(0, 0).inputs)
            write_graph(
                run_dir.path / "tensorboard", lambda: build_model(config.model, splits.input_spec, config.seed), inputs
            )
    return provenance
