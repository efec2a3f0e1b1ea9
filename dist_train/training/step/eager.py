"""One optimizer update in eager mode, which supports any net, world size and data."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.schema import Config
from dist_train.data.batches import Batch, Batches, PerturbedBatches
from dist_train.distributed.rng import derive_seed
from dist_train.distributed.world import World
from dist_train.models.invariance import seeding_for
from dist_train.models.tasks.losses import Loss, one_over
from dist_train.models.tasks.objective import ErrorContext, Objective
from dist_train.training.step.counts import Counts, Overflows
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.mode_selection import unchanged
from dist_train.training.step.optimizers import bare_step, build_optimizer, seeded_step
from dist_train.training.step.parameter_groups import set_learning_rate
from dist_train.training.step.weight_averaging import AveragedNet


class EagerUpdate:
    """Forward and backward of each micro-batch, one all-reduce of gradients, clipping, optimizer step, sums."""

    def __init__(
        self,
        config: Config,
        world: World,
        net: nn.Module,
        batches: Batches,
        plan: BatchPlan,
        learning_rate: LearningRate,
        ema: AveragedNet | None,
        loss: Loss,
    ) -> None:
        """Collective: every rank must call this."""
        self.world = world
        self.net = net
        self.batches = batches
        self.plan = plan
        self.learning_rate = learning_rate
        self.ema = ema
        self.window = Counts(world.device)  # since the last log
        self.objective = Objective(net, loss)
        self.parameters = list(net.parameters())
        self.max_grad_norm = config.max_grad_norm
        self.norm: Tensor | None = None  # of the last update's gradient, once something has computed it
        self._seed = config.seed
        self._seed_generators = seeding_for(net, training=True)

        optimizer = build_optimizer(config.optimizer, net, world.device)
        accelerator = world.accelerator
        # The net is on its device. With device placement, Accelerate looks for DTensors and imports sympy (0.5 s).
        self.model, prepared = accelerator.prepare(net, optimizer, device_placement=[False, False])
        world.exchange_gradients(self.model)
        # Only a gradient scaler needs the prepared optimizer, which costs 88 us per step.
        self.overflows = Overflows(accelerator.scaler, world.device) if accelerator.scaler is not None else None
        self.optimizer = prepared if self.overflows else optimizer
        update = self.optimizer.step if self.overflows else bare_step(optimizer)
        self.optimize: Callable[[int], object] = lambda _step: update()
        if config.optimizer.own_step:
            self.optimize = seeded_step(self.optimizer, config.optimizer.name, config.seed)

    def __call__(self, step: int) -> None:
        """Do update number `step` (from 0)."""
        set_learning_rate(self.optimizer.param_groups, self.learning_rate.at(step))
        self.clear_gradients()
        scale = self.overflows.scale() if self.overflows is not None else None
        micro_steps = self.plan.grad_accum_steps
        counted: list[tuple[Tensor, Tensor | None, int]] = []
        weights: list[Tensor] = []
        for micro_step in range(micro_steps):
            batch = self.batches.at(step, micro_step)
            self.seed_forward(step, micro_step)
            with (
                self.sync_gradients(when=micro_step == micro_steps - 1),
                self.error_context(f"at step {step + 1}", batch),
            ):
                output = self.objective.forward(self.model, batch.inputs)  # [B, K]
                self.objective.check_labels(output, batch.labels)
                loss = self.objective.loss(output, batch.targets)
                # Micro-batches are equal parts of a rank's share, all shares are equal and DDP averages them: the
                # sum of the parts is the mean over the global batch.
                self._backward(loss / micro_steps if micro_steps > 1 else loss)  # saves 40 us per step
            counted.append((loss.detach(), self.objective.correct(output, batch.targets), len(batch)))
            if (weight := self.objective.mean_weight(batch.targets)) is not None:
                weights.append(weight)
        if weights:
            factor = self._divide_by_weight(weights)
            counted = [(loss * factor, correct, seen) for loss, correct, seen in counted]
        for loss, correct, seen in counted:
            self.window.add(loss, correct, seen)
        self.norm = None
        if self.max_grad_norm is not None:
            self.norm = self.world.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimize(step)
        if self.overflows is not None and scale is not None:
            self.overflows.record_update(scale)
        if self.ema is not None:
            self.ema.update(self.net, is_first=step == 0)

    def _divide_by_weight(self, weights: list[Tensor]) -> Tensor:
        """Divide the gradients by the mean weight of the global batch, given that of each micro-batch; return 1 / it.

        They are divided here and not their losses before: the weights of the last micro-batch would have to be known
        before the first backward pass, and all micro-batches of a step be kept until then.

        Collective: every rank must call this.
        """
        factor = one_over(self.world.all_reduce(torch.stack(weights).mean()) / self.world.size)
        torch._foreach_mul_([each.grad for each in self.parameters if each.grad is not None], factor)
        return factor

    def perturbed(self, step: int) -> None:
        """Do the update on inputs with rounding errors added, to measure the effect of rounding alone."""
        exact = self.batches
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.world.mixed_precision)
        self.batches = PerturbedBatches(exact, torch.finfo(dtype or torch.get_default_dtype()).eps)
        try:
            self(step)
        finally:
            self.batches = exact

    def error_context(self, when: str, batch: Batch) -> ErrorContext:
        """Return a context that reports an error of the net or its loss on `batch` in one line."""
        return ErrorContext(self.net, when, batch.indices, self.batches.examples)

    def seed_forward(self, step: int, micro_step: int) -> None:
        """Seed dropout and other random draws, in the net or in user code, by the position in the run."""
        self._seed_generators(derive_seed(self._seed, "forward", step, micro_step, self.world.rank))

    def clear_gradients(self) -> None:
        """Like `zero_grad`, without its profiler record: saves 60 us per step."""
        for parameter in self.parameters:
            parameter.grad = None

    def grad_norm(self) -> float:
        """Return the L2 norm of the last update's gradient, before clipping. Waits for the device."""
        if self.norm is None:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            self.norm = nn.utils.get_total_norm(gradients)
        return float(self.norm)

    def _backward(self, loss: Tensor) -> None:
        if self.overflows is not None:
            self.world.accelerator.backward(loss)
        else:
            loss.backward()

    def sync_gradients(self, when: bool) -> AbstractContextManager[None]:
        """Return a context for one all-reduce per step: only the last micro-step's backward exchanges gradients."""
        return nullcontext() if when else self.world.accelerator.no_sync(self.model)

    def wrap_again(self) -> None:
        """Wrap the net in DDP anew: it exchanges the gradients of those parameters that require one when it is made.

        Collective: every rank must call this.
        """
        if self.model is self.net:
            return
        self.model = self.net
        gc.collect()  # the old DDP may be in a circle of references, and while it lives it exchanges gradients too
        if "_original_forward" in vars(self.net):  # Accelerate would patch its own patch, for mixed precision
            self.net.forward = vars(self.net).pop("_original_forward")
        self.model = self.world.accelerator.prepare(self.net, device_placement=[False])
        self.world.exchange_gradients(self.model)

    # --- the state that an update changes --------------------------------------------------------------------------

    def state(self) -> list[Tensor]:
        """Return the device tensors that an update changes: weights, buffers, sums, averages, optimizer state."""
        averages = self.ema.state_dict().values() if self.ema is not None else ()
        return [*self.net.parameters(), *self.net.buffers(), self.window.sums, *averages, *self._optimizer_state()]

    def make_optimizer_state(self, step: int) -> None:
        """Create the optimizer state that the next update creates, set to zero as in all our optimizers.

        That is all of it before the first update, and later that of parameters which were frozen until now.
        """
        known = self._optimizer_state()
        with unchanged(self.state()):
            self(step)
        for tensor in self._optimizer_state():
            if not any(tensor is each for each in known):
                tensor.zero_()

    def _optimizer_state(self) -> list[Tensor]:
        values = (value for state in self.optimizer.state.values() for value in state.values())
        return [value for value in values if isinstance(value, Tensor)]
