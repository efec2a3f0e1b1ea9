"""One optimizer update over one global batch. Speed lives here; the loop does not change for it."""

from __future__ import annotations

import logging
import time
import traceback
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.checkpoints.weights import load_into
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config, StepMode, WantedMode
from dist_train.data.batches import Batch, Batches, ResidentBatches
from dist_train.distributed.world import World
from dist_train.errors import UserCodeError
from dist_train.models.tasks.objective import Objective
from dist_train.training.step.averaging import AveragedNet
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.fused import prepare, unsupported_reason
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.mode_selection import Update, mode_to_try, try_update
from dist_train.training.step.observation import Observation, first_of
from dist_train.training.step.optimizers import load_state

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
        _check_state(net)
        self.world = world
        self.net = net
        self._config = config
        net.to(world.device)
        if getattr(net, "channels_last", False):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # A mask may well hold infinities; what was finite has to stay so.
        finite = [buffer for buffer in net.buffers() if buffer.isfinite().all()]
        self._stay_finite = [*net.parameters(), *finite]
        # Copied before Accelerate patches `forward`: the copy's would still be that of the original.
        self.ema = AveragedNet(net, config.ema_decay) if config.ema_decay else None
        self.evaluation_objective = Objective(self.evaluated_net, config.label_smoothing)
        self.mode: StepMode = "eager"  # until the warm-up
        self.warm_up_s = 0.0
        self.eager = EagerUpdate(config, world, net, batches, plan, learning_rate)
        self.window = self.eager.window
        self._update: Update = self.eager
        self.observed = Observation(net)  # in the warm-up
        self._former_norm: float | None = None  # until this attempt has taken a step

    @property
    def evaluated_net(self) -> nn.Module:
        """The weights that count: averaged ones if there are any."""
        return self.ema.module if self.ema is not None else self.net

    def take(self, step: int) -> None:
        """One update over one global batch, `step` (from 0) having gone before. Nothing here waits for the device."""
        self._update(step)
        self._former_norm = None
        if self.ema is not None:
            self.ema.update_parameters(self.net)

    def warm_up(self, step: int, wanted: WantedMode = "eager") -> None:
        """Two passes whose gradients are thrown away, before the first counted step of any start.

        DDP lays out its buckets anew before its second forward. A resumed run would do its first step with the first
        layout where the uninterrupted one has the second, and gloo's ring adds in another order. Then the update gets
        the mode that is `wanted`: auto, eager, compile or graph. No trace is left of all this: weights, gradients,
        buffers and the training mode are as before.

        Collective: every rank must call this.

        Raises:
            UserCodeError: net, loss and data do not fit together.
        """
        began = time.perf_counter()
        eager = self.eager
        for _ in range(2):
            self.world.synchronize()
            started = time.perf_counter()
            batch = eager.batches.at(step, 0)
            # Code of the user may change what it is given, which the first step is given again.
            inputs, targets = deepcopy((batch.inputs, batch.targets))
            eager.seed_forward(step, 0)
            with eager.error_context("on its first batch", batch), self.observed.watch_pass():
                output = eager.objective.forward(eager.model, inputs)
                eager.objective.check(output, targets)
                eager.objective.loss(output, targets).backward()
            self.world.synchronize()
            pass_s = time.perf_counter() - started
            self._check_gradients()
        self.observed.check_loss(eager.objective, output, batch.targets, len(batch))
        if isinstance(eager.batches, ResidentBatches):  # all of them now: a graph or a compiled step could not tell
            labels = eager.batches.labels
            with eager.error_context("on its data", Batch(None, labels, torch.arange(len(labels)))):
                eager.objective.check_labels(output, labels)
        eager.clear_gradients()
        self._choose_mode(step, wanted, pass_s)
        self.warm_up_s = time.perf_counter() - began

    def _check_gradients(self) -> None:
        """DDP waits for the gradient of each parameter, and would wait for ever."""
        if self.world.size == 1 or self._config.ddp.find_unused_parameters:
            return
        unused = [name for name, each in self.net.named_parameters() if each.requires_grad and each.grad is None]
        if unused:
            raise UserCodeError(
                f"No gradient comes to {first_of(unused)} of "
                f"{type(self.net).__name__}, and {self.world.size} processes exchange those of all parameters. Set "
                f"ddp.find_unused_parameters=true, or take out what the forward does not use."
            )

    @property
    def data_wait_s(self) -> float:
        """Seconds spent waiting for data since the start."""
        return self.eager.batches.wait_s

    def grad_norm(self) -> float:
        """L2 norm of the last update's gradient, before clipping. Waits for the device."""
        return self.eager.grad_norm() if self._former_norm is None else self._former_norm

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
            "optimizer": self.eager.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "overflows": self.eager.overflows.counts if self.eager.overflows is not None else None,
            "grad_norm": self.grad_norm(),
            "window": self.world.all_gather(self.window.sums),  # [world_size, 3]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """On the same world size each rank gets its own window back, else rank zero gets their sum."""
        load_into(self.net, state["net"])
        load_state(self.eager.optimizer, state["optimizer"])
        if self.ema is not None:
            load_into(self.ema, state["ema"])
        if self.world.accelerator.scaler is not None:
            self.world.accelerator.scaler.load_state_dict(state["scaler"])
        if self.eager.overflows is not None and state.get("overflows") is not None:
            self.eager.overflows.counts.copy_(state["overflows"])
        self._former_norm = state.get("grad_norm")
        windows: Tensor = state["window"]
        if len(windows) == self.world.size:
            self.window.sums.copy_(windows[self.world.rank])
        elif self.world.is_rank_zero:
            self.window.sums.copy_(windows.sum(dim=0))

    # --- the mode of the update ------------------------------------------------------------------------------------

    def _choose_mode(self, step: int, wanted: WantedMode, pass_s: float) -> None:
        """Keep the eager update, or take one with the same outcome that is asked for or, on `auto`, is faster."""
        left = self.eager.learning_rate.total_steps - step
        mode = mode_to_try(self.world.device.type, left, pass_s) if wanted == "auto" else wanted
        if mode == "eager":
            if wanted == "auto":
                _log.info(
                    "step_mode=auto: eager, since trying another would not repay in the %d steps that are left", left
                )
            return
        why_not = unsupported_reason(self.eager, mode, self._config) or self._try(
            step, mode, must_gain=wanted == "auto"
        )
        if why_not:
            level = logging.INFO if wanted == "auto" else logging.WARNING
            _log.log(level, "step_mode=%s: the update stays eager: %s", wanted, why_not)

    def _try(self, step: int, mode: StepMode, must_gain: bool) -> str:
        """Rehearse this mode and take it; or say why not, and leave all as it was."""
        eager, optimizer = self.eager, self.eager.optimizer
        fresh = not optimizer.state
        if fresh:
            eager.make_optimizer_state(step)
        doing = "capturing" if mode == "graph" else "compiling"
        _log.info("step_mode=%s: %s the update, which may take a minute where it was not done before", mode, doing)
        groups = [dict(group) for group in optimizer.param_groups]
        try:
            update, found = try_update(
                eager, eager.perturbed, lambda: prepare(eager, mode, step), eager.state(), step, self.world.synchronize
            )
            why_not = found.rejection_reason(must_gain)
        except Exception as error:  # whatever a compiler finds to say of a user's net
            _log.debug("%s", traceback.format_exc())
            why_not = " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:2]])
        if why_not:
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
            if fresh:
                optimizer.state.clear()
            eager.clear_gradients()
        else:
            self._update, self.mode = update, mode
            _log.info("step_mode=%s: %s", mode, found)
        return why_not


def _check_state(net: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserCodeError(f"{type(net).__name__} has no parameter that requires a gradient: nothing to train.")
    odd = [name for name, value in net.state_dict().items() if not isinstance(value, Tensor)]
    if odd:
        raise UserCodeError(
            f"{type(net).__name__}.state_dict() holds {odd[0]}, which is no tensor; a checkpoint is of tensors only. "
            f"Leave get_extra_state out, or register a buffer."
        )
