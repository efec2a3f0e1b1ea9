"""The update as one piece, from indices to new weights: compiled, or captured once as a CUDA graph and replayed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_train.config import Config, StepMode, user_cache
from dist_train.data.batches import Batches, ResidentBatches
from dist_train.distributed import World
from dist_train.objective import Objective, count_correct
from dist_train.plan import BatchPlan

Draw = tuple[Tensor, ...]  # what decides a batch: see ResidentBatches.draw


@dataclass(frozen=True)
class WholeUpdate:
    """Gather, normalise, forward, backward, clip, optimizer and metric sums, without a look from the host."""

    batches: ResidentBatches
    model: nn.Module
    objective: Objective
    parameters: Sequence[nn.Parameter]
    max_grad_norm: float | None
    optimize: Callable[[], None]
    sums: Tensor  # those of Counts, [3]

    def __call__(self, *draw: Tensor) -> Tensor | None:
        """The gradient's norm before clipping, [], if it is clipped."""
        inputs, targets = self.batches.make(*draw)
        output = self.objective.forward(self.model, inputs)
        loss = self.objective.loss(output, targets)
        # Not loss.backward(): that would end a compiled graph, and here is nothing to add to.
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        norm = None
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.detach()
            if self.max_grad_norm is not None:
                norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.optimize()
            self._count(loss.detach(), count_correct(output.detach(), targets), len(targets))
        return norm

    def _count(self, loss: Tensor, correct: Tensor | None, seen: int) -> None:
        """As `Counts.add`; compiled, that loses what it adds to views of the sums."""
        like = self.sums
        correct = torch.zeros_like(loss) if correct is None else correct
        self.sums.add_(torch.stack((loss.to(like) * seen, correct.to(like), torch.full_like(loss, seen).to(like))))


def compiled(update: WholeUpdate) -> Callable[..., Tensor | None]:
    """One graph of forward, backward and optimizer: 1.6x the eager update on mlp, where half a graph has no gain."""
    # Kept between runs, for each user; 17 s become 3.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "compiled"))
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad ends the graph
    torch._inductor.config.fallback_random = True  # dropout draws what it draws in eager
    torch._inductor.config.compile_threads = 1  # in this process: no helpers that a signal could hit or leave behind
    return torch.compile(update, fullgraph=True, dynamic=False)


def captured(update: WholeUpdate, draw: Draw) -> Callable[..., Tensor | None]:
    """One CUDA graph, replayed on static buffers: the host launches once where it launched for every kernel."""
    static = tuple(each.clone() for each in draw)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces before the capture
        for _ in range(3):
            update(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = update(*static)

    def replay(*draw: Tensor) -> Tensor | None:
        for buffer, value in zip(static, draw, strict=True):
            buffer.copy_(value)
        graph.replay()
        return norm

    return replay


def obstacle(mode: StepMode, config: Config, world: World, batches: Batches, plan: BatchPlan) -> str:
    """Why an update cannot be of this mode here, or nothing."""
    sgd = config.optimizer
    if world.size > 1:
        return f"{world.size} processes exchange gradients in the middle of it"
    if not isinstance(batches, ResidentBatches):
        return "the data is streamed, not resident on the device"
    if plan.grad_accum_steps > 1:
        return f"it has {plan.grad_accum_steps} micro-steps"
    if world.mixed_precision == "fp16":
        return "the scaler of fp16 asks at each step whether gradients are finite"
    if sgd.dampening and sgd.momentum:
        return "SGD with dampening has another first step"
    if mode == "graph" and world.device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, this is {world.device.type}"
    if mode == "compile" and world.device.type == "cpu" and not _compiler():
        return "there is no C++ compiler (g++ or clang++ on PATH, or CXX)"
    return ""


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )
