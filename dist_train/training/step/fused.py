"""The fused update, from indices to new weights: compiled, captured once as a CUDA graph and replayed, or both."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dist_train.config.paths import user_cache
from dist_train.config.schema import Config, StepMode
from dist_train.data.batches import ResidentBatches
from dist_train.models.tasks.losses import one_over
from dist_train.models.tasks.objective import Objective
from dist_train.training.step.eager import EagerUpdate
from dist_train.training.step.forward_effects import ForwardEffects, first_of
from dist_train.training.step.mode_selection import Update
from dist_train.training.step.optimizers import traceable_step
from dist_train.training.step.parameter_groups import set_learning_rate
from dist_train.training.step.weight_averaging import AveragedNet

T = TypeVar("T")
Selection = tuple[Tensor, ...]  # what determines a batch: see ResidentBatches.select


@dataclass(frozen=True)
class FusedUpdate:
    """Gather, normalise, forward, backward, clip, optimizer and sums, without a host synchronisation.

    Called, it is the whole update of one process with one micro-batch. `to_exchange` and `after_exchange` are its parts
    for several, between which the gradients of micro-batches and ranks are added.
    """

    batches: ResidentBatches
    model: nn.Module
    objective: Objective
    parameters: Sequence[nn.Parameter]
    micro_steps: int
    max_grad_norm: float | None
    optimize: Callable[[], None]
    sums: Tensor  # of Counts, [3]

    def __call__(self, *selection: Tensor) -> Tensor:
        """Do the update and return the gradient's L2 norm before clipping, []."""
        loss, weight, correct, seen = self._forward(*selection)
        if weight is not None:  # this batch is the global one
            loss = loss * one_over(weight)
        # Not loss.backward(): it would break the compiled graph, and there are no gradients to add to.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return self._apply(gradients, self._counts(loss, correct, seen))

    def to_exchange(self, *selection: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added over micro-batches and ranks, [N], and the counts of this micro-batch, [3].

        N is the number of parameters, and one more where examples have weights.
        """
        loss, weight, correct, seen = self._forward(*selection)
        gradients = torch.autograd.grad(loss / self.micro_steps, self.parameters)
        parts = [*gradients, *([] if weight is None else [weight / self.micro_steps])]
        return torch.cat([part.detach().flatten() for part in parts]), self._counts(loss, correct, seen)

    def after_exchange(self, mean: Tensor, counts: Tensor) -> Tensor:
        """Do the rest of the update with the mean over the ranks; return as `__call__` does."""
        sizes = [parameter.numel() for parameter in self.parameters]
        if len(mean) > sum(sizes):
            factor = one_over(mean[-1])
            mean, counts = mean * factor, counts * torch.stack((factor, *torch.ones_like(factor).expand(2)))
        parts = mean[: sum(sizes)].split(sizes)
        gradients = [
            part.view_as(parameter).to(parameter) for part, parameter in zip(parts, self.parameters, strict=True)
        ]
        return self._apply(gradients, counts)

    def _forward(self, *selection: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """Return loss, mean weight of the examples, correct ones and number of a micro-batch."""
        inputs, targets = self.batches.materialise(*selection)
        output = self.objective.forward(self.model, inputs)
        loss = self.objective.loss(output, targets)
        correct = self.objective.correct(output.detach(), targets)
        return loss, self.objective.mean_weight(targets), correct, len(inputs)

    def _counts(self, loss: Tensor, correct: Tensor | None, seen: int) -> Tensor:
        """Return what `Counts.add` adds: compiled, its additions to views of the sums are lost (torch 2.13)."""
        loss, like = loss.detach(), self.sums
        correct = torch.zeros_like(loss) if correct is None else correct
        return torch.stack((loss.to(like) * seen, correct.to(like), torch.full_like(loss, seen).to(like)))

    @torch.no_grad()
    def _apply(self, gradients: Sequence[Tensor | None], counts: Tensor) -> Tensor:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.detach()
        # The compiler cannot fuse torch's get_total_norm, which takes 30 us of mlp's 320.
        norms = [gradient.detach().square().sum() for gradient in gradients if gradient is not None]
        norm = torch.stack(norms).sum().sqrt()
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimize()
        self.sums.add_(counts)
        for parameter in self.parameters:
            parameter.grad = None  # no longer needed: the compiler need not write it to memory
        return norm


def prepare(eager: EagerUpdate, mode: StepMode, step: int) -> Update:
    """Return the same update in another mode. Runs it a few times; the caller restores the state.

    Raises: any error of compiling or capturing the net.
    """
    batches = eager.batches
    assert isinstance(batches, ResidentBatches)  # see `unsupported_reason`
    divided = eager.world.size > 1 or eager.plan.grad_accum_steps > 1
    update = FusedUpdate(
        batches,
        eager.net,  # not DDP, which would exchange the gradients by itself
        eager.objective,
        [parameter for parameter in eager.parameters if parameter.requires_grad],
        eager.plan.grad_accum_steps,
        eager.max_grad_norm,
        traceable_step(eager.optimizer, eager.world.device, fused=mode == "graph"),
        eager.window.sums,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compiler warnings about torch's own code do not help a user
        return _in_two_graphs(update, eager, step) if divided else _in_one(update, eager, mode, step)


def _in_one(update: FusedUpdate, eager: EagerUpdate, mode: StepMode, step: int) -> Update:
    ema, net, batches = eager.ema, eager.net, update.batches
    captured = eager.world.device.type == "cuda"
    run: Callable[..., Tensor] = update

    def take(step: int) -> None:
        set_learning_rate(eager.optimizer.param_groups, eager.learning_rate.at(step))
        eager.seed_forward(step, 0)
        eager.norm = run(*batches.select(step, 0))
        if ema is not None and (step == 0 or not captured):  # the captured update averages, which is wrong at step 0
            ema.update(net, is_first=step == 0)

    if mode == "compile":
        run = _compiled(update, eager.world.device)
    if captured:
        run = _captured(run if ema is None else _averaged(run, ema, net), batches.select(step, 0))
    take(step)  # the first call compiles
    return take


def _in_two_graphs(update: FusedUpdate, eager: EagerUpdate, step: int) -> Update:
    """Return an update that adds micro-batches, and averages over the ranks, between its two compiled parts.

    Both are compiled here without an exchange, so that a rank that fails to compile leaves no other waiting.
    """
    to_exchange = _compiled(update.to_exchange, eager.world.device)
    after_exchange = _compiled(update.after_exchange, eager.world.device)

    def take(step: int) -> None:
        set_learning_rate(eager.optimizer.param_groups, eager.learning_rate.at(step))
        total, counts = micro_batch(step, 0)
        for micro_step in range(1, update.micro_steps):
            part, count = micro_batch(step, micro_step)
            total.add_(part)
            counts.add_(count)
        eager.norm = after_exchange(eager.world.average(total), counts)
        if eager.ema is not None:
            eager.ema.update(eager.net, is_first=step == 0)

    def micro_batch(step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        eager.seed_forward(step, micro_step)
        found: tuple[Tensor, Tensor] = to_exchange(*update.batches.select(step, micro_step))
        return found

    set_learning_rate(eager.optimizer.param_groups, eager.learning_rate.at(step))
    after_exchange(*micro_batch(step, 0))
    return take


def _averaged(update: Callable[..., Tensor], ema: AveragedNet, net: nn.Module) -> Callable[..., Tensor]:
    """Return the update followed by that of the averaged weights."""

    def both(*selection: Tensor) -> Tensor:
        norm = update(*selection)
        ema.update(net, is_first=False)
        return norm

    return both


def _compiled(update: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """Compile all of it as one graph: forward, backward and optimizer of mlp take 0.29 ms instead of 0.46."""
    # A cache for the user's next run, which then compiles in 3 s instead of 8 to 18.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad breaks the graph
    torch._inductor.config.fallback_random = True  # dropout draws the same as in eager mode
    torch._inductor.config.compile_threads = 1  # no worker processes that a signal could hit or a kill leave behind
    if device.type == "cuda":
        torch._inductor.config.loop_ordering_after_fusion = False  # torch 2.11 fails on Adam's foreach kernels
    return torch.compile(update, fullgraph=True, dynamic=False)


def _captured(update: Callable[..., Tensor], selection: Selection) -> Callable[..., Tensor]:
    """Capture one CUDA graph on static buffers: the host launches once instead of once for every kernel."""
    static = tuple(each.clone() for each in selection)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            update(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            norm = update(*static)
    except RuntimeError as error:
        raise RuntimeError(
            "a CUDA graph cannot hold what the net or its loss does, such as .item(), which waits for the device"
        ) from error

    def replay(*selection: Tensor) -> Tensor:
        for buffer, value in zip(static, selection, strict=True):
            buffer.copy_(value)
        graph.replay()
        return norm

    return replay


def unsupported_reason(eager: EagerUpdate, effects: ForwardEffects, mode: StepMode, config: Config) -> str:
    """Return why the update cannot run in this mode, "" if it can."""
    world, sgd = eager.world, config.optimizer
    if not isinstance(eager.batches, ResidentBatches):
        return "the data is streamed, not resident on the device"
    if world.device.type == "cuda" and world.size > 1:
        return f"{world.size} processes exchange gradients within the update, which a CUDA graph does not hold"
    if world.device.type == "cuda" and eager.plan.grad_accum_steps > 1:
        return f"it has {eager.plan.grad_accum_steps} micro-steps, which a CUDA graph does not hold"
    if world.size > 1 and config.ddp.find_unused_parameters:
        return "some parameters may have no gradient to exchange (ddp.find_unused_parameters=true)"
    if world.size > 1 and effects.changed_buffers:
        return f"each forward changes {first_of(effects.changed_buffers)}, which DDP keeps equal on all processes"
    if world.mixed_precision == "fp16":
        return "the fp16 scaler checks at each step whether gradients are finite"
    if sgd.dampening and sgd.momentum:
        return "the first step of SGD with dampening differs from the others"
    if mode == "graph" and world.device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, this is {world.device.type}"
    if world.device.type == "cuda" and effects.replay_obstacle:
        return effects.replay_obstacle
    if mode == "compile" and world.device.type == "cpu" and not any(map(shutil.which, _COMPILERS)):
        return "there is no C++ compiler; install g++"
    return ""


_COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")  # where torch looks
