"""One optimizer update over one global batch. Speed lives here; the loop does not change for it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train import nets
from dist_train.config import Config, StepMode
from dist_train.data.batches import Batches, ResidentBatches, seed_everything, seed_torch
from dist_train.distributed import World, is_peer_failure
from dist_train.errors import UserCodeError
from dist_train.metrics import Counts
from dist_train.models import not_invariant
from dist_train.objective import Objective, count_correct
from dist_train.optimizers import bare_step, build_optimizer, load_state, traceable_step
from dist_train.plan import BatchPlan
from dist_train.rehearsal import Update, rehearse, worth_trying
from dist_train.schedule import LearningRate
from dist_train.seeding import derive_seed
from dist_train.user_code import explained
from dist_train.whole_update import WholeUpdate, captured, compiled, obstacle

_log = logging.getLogger(__name__)


class Step:
    """The update. Everything a checkpoint needs besides the step number is in here."""

    def __init__(
        self,
        config: Config,
        world: World,
        net: nn.Module,
        batches: Batches,
        plan: BatchPlan,
        learning_rate: LearningRate,
    ) -> None:
        """Collective: every rank must call this."""
        self.world = world
        self.net = net
        self.batches = batches
        self.plan = plan
        self.learning_rate = learning_rate
        _check_state(net)
        self.objective = Objective(net, config.label_smoothing)
        self.window = Counts(world.device)  # since the last log
        self._config = config
        self._seed = config.seed
        self._max_grad_norm = config.max_grad_norm
        self._clipped_norm: Tensor | None = None

        net.to(world.device)
        if getattr(net, "channels_last", False):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A mask may well hold infinities; what was finite has to stay so.
        finite = [buffer for buffer in net.buffers() if buffer.isfinite().all()]
        self._stay_finite = [*net.parameters(), *finite]
        # Copied before Accelerate patches `forward`: the copy's would still be that of the original.
        # Infinities have no average: with them all buffers are copied.
        averages = len(finite) == len(list(net.buffers()))
        self.ema = _averaged(net, config.ema_decay, use_buffers=averages) if config.ema_decay else None
        self.evaluation_objective = Objective(self.evaluated_net, config.label_smoothing)
        self._seed_forward = _seeding_for(net)
        self._parameters = list(net.parameters())
        optimizer = build_optimizer(config.optimizer, net, world.device)
        accelerator = world.accelerator
        # Already on its device. Asked to place it, Accelerate looks for DTensors and imports sympy for that (0.5 s).
        self.model, self._prepared = accelerator.prepare(net, optimizer, device_placement=[False, False])
        # The prepared optimizer is needed for a gradient scaler alone and costs 88 us a step.
        self._scaled = accelerator.scaler is not None
        self.optimizer = self._prepared if self._scaled else optimizer
        self._update = self.optimizer.step if self._scaled else bare_step(optimizer)
        self.mode: StepMode = "eager"  # until the warm-up
        self._take: Update = self._eager

    @property
    def evaluated_net(self) -> nn.Module:
        """The weights that count: averaged ones if there are any."""
        return self.ema.module if self.ema is not None else self.net

    def take(self, step: int) -> None:
        """One update over one global batch, `step` (from 0) having gone before. Nothing here waits for the device."""
        self._take(step)
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def warm_up(self, step: int, mode: StepMode | Literal["auto"] = "eager") -> None:
        """Two passes whose gradients are thrown away, before the first counted step of any start.

        DDP lays out its buckets anew before its second forward. A resumed run would do its first step with the first
        layout where the uninterrupted one has the second, and gloo's ring adds in another order. Then the faster
        forms of the update are tried, if `mode` asks for one. No trace is left: weights, gradients, buffers and the
        training mode are as before.

        Collective: every rank must call this.

        Raises:
            UserCodeError: net, loss and data do not fit together.
        """
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        for _ in range(2):
            self.world.synchronize()
            started = time.perf_counter()
            batch = self.batches.at(step, 0)
            inputs = recursively_apply(torch.clone, batch.inputs)  # a net may change them in place
            self._seed_forward(derive_seed(self._seed, "forward", step, 0, self.world.rank))
            with explained(type(self.net).__name__, "failed on its first batch", unless=is_peer_failure):
                output = self.objective.forward(self.model, inputs)
                self.objective.loss(output, batch.targets).backward()
            self.world.synchronize()
            pass_s = time.perf_counter() - started
        self._forget_gradients()
        with torch.no_grad():
            for buffer, before in zip(self.net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self._choose_mode(step, mode, pass_s)

    def grad_norm(self) -> float:
        """L2 norm of the last update's gradient, before clipping. Waits for the device."""
        if self._clipped_norm is not None:
            return float(self._clipped_norm)
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def pop_window(self) -> dict[str, float]:
        """Sums (loss, correct, seen) over all ranks since the last call.

        Collective: every rank must call this.
        """
        totals = self.window.totals(self.world)
        self.window.sums.zero_()
        return totals

    def is_finite(self) -> bool:
        """Whether weights and the window's loss are finite on every rank. Waits for the device.

        Collective: every rank must call this.
        """
        tensors = [*self._stay_finite, self.window.sums]
        bad = sum((~torch.isfinite(t.detach())).sum().to(self.world.device, torch.float32) for t in tensors)
        return self.world.all_reduce(torch.as_tensor(bad, device=self.world.device)).item() == 0

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that decides the next update besides the weights, as it is on the device.

        Collective: every rank must call this.
        """
        scaler = self.world.accelerator.scaler
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "window": self.world.all_gather(self.window.sums),  # [world_size, 3]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """On the same world size each rank gets its own window back, else rank zero gets their sum."""
        self.net.load_state_dict(state["net"])
        load_state(self.optimizer, state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.world.accelerator.scaler is not None:
            self.world.accelerator.scaler.load_state_dict(state["scaler"])
        windows: Tensor = state["window"]
        if len(windows) == self.world.size:
            self.window.sums.copy_(windows[self.world.rank])
        elif self.world.is_rank_zero:
            self.window.sums.copy_(windows.sum(dim=0))

    # --- the update, eager -----------------------------------------------------------------------------------------

    def _eager(self, step: int) -> None:
        self._set_lr(step)
        self._forget_gradients()
        micro_steps = self.plan.grad_accum_steps
        for micro_step in range(micro_steps):
            batch = self.batches.at(step, micro_step)
            # Dropout and the like, of the net or of user code, as a function of where we are.
            self._seed_forward(derive_seed(self._seed, "forward", step, micro_step, self.world.rank))
            with self._sync_gradients(when=micro_step == micro_steps - 1):
                output = self.objective.forward(self.model, batch.inputs)  # [B, K]
                loss = self.objective.loss(output, batch.targets)
                # Micro-batches are equal parts of the rank's share, shares are equal and DDP averages them: the sum
                # of the parts is the mean over the global batch.
                self._backward(loss / micro_steps if micro_steps > 1 else loss)  # 40 us a step
            self.window.add(loss, count_correct(output, batch.targets), len(batch))
        if self._max_grad_norm is not None:
            self._clipped_norm = self.world.accelerator.clip_grad_norm_(self.net.parameters(), self._max_grad_norm)
        self._update()

    # --- the update, as one piece ----------------------------------------------------------------------------------

    def _choose_mode(self, step: int, wanted: StepMode | Literal["auto"], pass_s: float) -> None:
        """Keep the eager update, or take another whose outcome is the same and, if it is ours to choose, is faster."""
        left = self.learning_rate.total_steps - step
        mode = worth_trying(self.world.device.type, left, pass_s) if wanted == "auto" else wanted
        if mode == "eager":
            return
        why_not = obstacle(mode, self._config, self.world, self.batches, self.plan)
        if not why_not:
            why_not = self._try(step, mode, must_gain=wanted == "auto")
        if why_not:
            level = logging.INFO if wanted == "auto" else logging.WARNING
            _log.log(level, "step_mode=%s: the update stays eager: %s", wanted, why_not)

    def _try(self, step: int, mode: StepMode, must_gain: bool) -> str:
        """Rehearse this mode and take it; or say why not, and leave all as it was."""
        fresh = not self.optimizer.state
        if fresh:
            self._make_optimizer_state(step)
        state = [*self._parameters, *self.net.buffers(), self.window.sums, *_tensors_of(self.optimizer)]
        groups = [dict(group) for group in self.optimizer.param_groups]
        try:
            fast, found = rehearse(self._eager, lambda: self._prepare(step, mode), state, step, self.world.synchronize)
        except Exception as error:  # whatever a compiler finds to say of a user's net
            _log.debug("%s", traceback.format_exc())
            why_not = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            why_not = found.objection(must_gain)
        if why_not:
            for group, before in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(before)
            if fresh:
                self.optimizer.state.clear()
            self._forget_gradients()
        else:
            self._take, self.mode = fast, mode
            _log.info("step_mode=%s: %s", mode, found)
        return why_not

    def _make_optimizer_state(self, step: int) -> None:
        """All zero, as every optimizer of ours begins: what an update makes must be there before it is traced."""
        state = [*self._parameters, *self.net.buffers(), self.window.sums]
        before = [tensor.clone() for tensor in state]
        self._eager(step)
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            for tensor in _tensors_of(self.optimizer):
                tensor.zero_()

    def _prepare(self, step: int, mode: StepMode) -> Update:
        batches = cast(ResidentBatches, self.batches)
        lr = torch.tensor(self.learning_rate.at(step), device=self.world.device, dtype=torch.get_default_dtype())
        update = WholeUpdate(
            batches,
            self.model,
            self.objective,
            [parameter for parameter in self._parameters if parameter.requires_grad],
            self._max_grad_norm,
            traceable_step(self.optimizer, lr, fused=mode == "graph"),
            self.window.sums,
        )
        run = compiled(update) if mode == "compile" else captured(update, batches.draw(step, 0))

        def take(step: int) -> None:
            lr.fill_(self.learning_rate.at(step))
            self._seed_forward(derive_seed(self._seed, "forward", step, 0, self.world.rank))
            self._clipped_norm = run(batches.draw(step, 0))

        take(step)  # compiled at its first call
        return take

    # --- parts of an eager update ----------------------------------------------------------------------------------

    def _set_lr(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate.at(step)

    def _forget_gradients(self) -> None:
        """As `zero_grad`, without its record for the profiler: 60 us a step."""
        for parameter in self._parameters:
            parameter.grad = None

    def _backward(self, loss: Tensor) -> None:
        if self._scaled:
            self.world.accelerator.backward(loss)
        else:
            loss.backward()

    def _sync_gradients(self, when: bool) -> AbstractContextManager[None]:
        """One all-reduce per step: only the last micro-step's backward exchanges gradients."""
        return nullcontext() if when else self.world.accelerator.no_sync(self.model)


def _tensors_of(optimizer: Any) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _seeding_for(net: nn.Module) -> Callable[[int], None]:
    """What makes the forward of a step depend on the step alone, for as little as possible (35 us a step).

    Our own nets draw in dropout or not at all; user code may draw from Python's and numpy's generators too.
    """
    if type(net).__module__ != nets.__name__:
        return seed_everything
    return seed_torch if not_invariant(net) else lambda _seed: None


def _check_state(net: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserCodeError(f"{type(net).__name__} has no parameter that requires a gradient: nothing to train.")
    odd = [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise UserCodeError(
            f"{type(net).__name__}.state_dict() holds {odd[0]}, which is no tensor; a checkpoint is of tensors only. "
            f"Leave get_extra_state out, or register a buffer."
        )


def _averaged(net: nn.Module, decay: float, use_buffers: bool) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)
    return AveragedModel(net, multi_avg_fn=average, use_buffers=use_buffers).requires_grad_(False)
