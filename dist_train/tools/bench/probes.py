"""Measurements inside a process of this harness: the parts of a step, the stall of a save, growth with the data.

`python -m dist_train.tools.bench.probes NAME ARGUMENT` prints one line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dist_train.checkpoints.contents import TrainerState
from dist_train.checkpoints.manager import Checkpoints
from dist_train.config.batch_plan import BatchPlan
from dist_train.config.durations import is_due
from dist_train.config.loading import parse_config
from dist_train.config.paths import default_data_root
from dist_train.config.schema import Config
from dist_train.data.batches import training_batches
from dist_train.data.epoch_audit import ShardAudit
from dist_train.data.sampler import ShardSampler
from dist_train.data.sets.image_set import ImageSet
from dist_train.data.sets.named_sets import load_named
from dist_train.distributed import watchdog
from dist_train.distributed.devices import peak_memory_gib
from dist_train.distributed.signals import StopRequest
from dist_train.distributed.world import World
from dist_train.models.registry import build_model
from dist_train.models.tasks.objective import count_correct
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.metrics_log import MetricsFile
from dist_train.training.agreement import Agreement
from dist_train.training.step.lr_schedule import LearningRate
from dist_train.training.step.train_step import Step

_STEPS = 200


def _step(config: Config, world: World, copies: int = 1) -> Step:
    one = load_named("mnist", default_data_root(), None)[0]
    examples = (
        one if copies == 1 else ImageSet(one.images.repeat(copies, 1, 1, 1), one.labels.repeat(copies), one.classes)
    )
    plan = BatchPlan.of(config, 1)
    sampler = ShardSampler(len(examples), plan, 0, config.seed)
    batches = training_batches(examples, sampler, config.data, world.device, config.seed)
    net = build_model(config.model, {}, config.seed)
    step = Step(config, world, net, batches, plan, LearningRate(1e-3, 10**6))
    step.warm_up(0)
    return step


def breakdown(net: str) -> dict[str, float]:
    """Return the median milliseconds of each part of an eager step at batch 64, synchronised after each part."""
    config = parse_config({"model": {"name": net}, "data": {"normalize": {"mean": [0.1307], "std": [0.3081]}}})
    world = World.join(config)
    step = _step(config, world)
    eager = step.eager
    times: dict[str, list[float]] = {}
    started = 0.0

    def done(part: str) -> None:
        nonlocal started
        world.synchronize()
        times.setdefault(part, []).append(1000 * (time.perf_counter() - started))
        started = time.perf_counter()

    for number in range(_STEPS):
        eager.clear_gradients()
        started = time.perf_counter()
        batch = eager.batches.at(number, 0)
        done("gather and normalise")
        output = eager.objective.forward(eager.model, batch.inputs)
        done("forward")
        loss = eager.objective.loss(output, batch.targets)
        done("loss")
        loss.backward()
        done("backward")
        eager.optimize(number)
        done("optimizer")
        eager.window.add(loss, count_correct(output, batch.targets), len(batch))
        done("metric sums")
    for number in range(_STEPS):
        step.take(number)
        done("whole step")
    return {part: statistics.median(each[20:]) for part, each in times.items()}


@contextmanager
def _checkpoints(config: Config, world: World) -> Iterator[Checkpoints]:
    """The checkpoints of a run in a temporary folder."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("DIST_TRAIN_RUNS_DIR")) as folder:
        run_dir = RunDir(Path(folder))
        run_dir.create()
        begin_attempt(run_dir, config, "id")
        checkpoints = Checkpoints(run_dir, world, config, keep_every_steps=0)
        yield checkpoints
        checkpoints.close()


_SAVES = 100
# The parts of a save that are measured. What is left of `snapshot` is the copy, allocation included; what is left of
# `save`, the wait for the former write and the start of this one.
_PARTS = {"check": (Step, "is_finite"), "state": (Step, "state_dict"), "copy": (Checkpoints, "snapshot"),
          "lines": (MetricsFile, "flush"), "hand over": (Checkpoints, "save")}  # fmt: skip


@contextmanager
def _parts_of_save() -> Iterator[dict[str, float]]:
    """Yield the milliseconds that each part of the saves inside takes, without those of the parts that it calls."""
    taken = dict.fromkeys(_PARTS, 0.0)

    def measured(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            inside, started = sum(taken.values()), time.perf_counter()
            result = method(*args)
            taken[name] += 1000 * (time.perf_counter() - started) - (sum(taken.values()) - inside)
            return result

        return run

    with ExitStack() as stack:
        for name, (owner, method) in _PARTS.items():
            stack.enter_context(patch.object(owner, method, measured(name, getattr(owner, method))))
        yield taken


def stall(hidden: str) -> dict[str, float]:
    """Return the milliseconds that a save stalls the loop, and that its write takes; mlp with `hidden` units.

    Of 100 saves, with training steps in between until each is written. `long PART`: how many stalls took more than
    twice the median, and most of it in this part.
    """
    config = parse_config({"model": {"name": "mlp", "args": {"hidden": int(hidden)}}})
    world = World.join(config)
    step = _step(config, world)
    parameters = sum(parameter.numel() for parameter in step.net.parameters())
    stalls, cpu, writes, longest = [], [], [], []
    number = 0
    with _checkpoints(config, world) as checkpoints, _parts_of_save() as parts:
        for _ in range(2 + _SAVES):  # the first two warm up
            step.take(number)
            number += 1
            before, started, cpu_started = dict(parts), time.perf_counter(), time.thread_time()
            checkpoints.save(TrainerState(step=number), step)
            stalls.append(1000 * (time.perf_counter() - started))
            cpu.append(1000 * (time.thread_time() - cpu_started))
            longest.append(max(parts, key=lambda name: parts[name] - before[name]))
            while checkpoints.is_writing:
                step.take(number)
                number += 1
                checkpoints.poll()
            checkpoints.finish()
            writes.append(1000 * checkpoints.run_dir.status.fields["save_s"])
    median = statistics.median(stalls[2:])
    long = Counter(part for part, each in zip(longest[2:], stalls[2:], strict=True) if each > 2 * median)
    return {
        "parameters": parameters, "stall_ms": median, "p99_stall_ms": statistics.quantiles(stalls[2:], n=100)[98],
        "worst_stall_ms": max(stalls[2:]), "cpu_ms": statistics.median(cpu[2:]),
        "p99_cpu_ms": statistics.quantiles(cpu[2:], n=100)[98], "write_ms": statistics.median(writes[2:]),
        **{f"long {part}": long[part] for part in _PARTS},
    }  # fmt: skip


def growth(copies: str) -> dict[str, float]:
    """Return step time, start of an epoch and memory with MNIST repeated `copies` times; mlp, batch 64."""
    config = parse_config({"model": {"name": "mlp"}})
    world = World.join(config)
    step = _step(config, world, int(copies))
    for number in range(_STEPS):
        step.take(number)
    world.synchronize()
    rows = []
    for row in range(5):
        started = time.perf_counter()
        for number in range(_STEPS):
            step.take(row * _STEPS + number)
        world.synchronize()
        rows.append(1000 * (time.perf_counter() - started) / _STEPS)
    memory = peak_memory_gib(world.device)

    def epoch_start_ms(examples: int) -> float:
        sampler = ShardSampler(examples, step.eager.plan, 0, 0).on(world.device)
        world.synchronize()
        started = time.perf_counter()
        sampler.indices(0)
        world.synchronize()
        return 1000 * (time.perf_counter() - started)

    examples = 60_000 * int(copies)
    return {
        "examples": examples, "step_ms": statistics.median(rows), "epoch_start_ms": epoch_start_ms(examples),
        "epoch_start_of_ten_million_ms": epoch_start_ms(10**7), "peak_memory_gib": memory,
    }  # fmt: skip


# Blocks of steps with and without guards alternate. They are short and many, as the machine's own speed drifts.
_BLOCKS, _BLOCK_STEPS = 150, 100


def guards(contestant: str) -> dict[str, float]:
    """Return the milliseconds of a step alone and with all guards of a run, batch 64; the median of paired ratios.

    `contestant`: a net, over a resident set; or NET,streamed. The guards are the audit of the examples, the context
    that reports errors of the net as one line, the agreement about every second with the heartbeat, the check of
    request files and of the current write, and the watchdog; at each log also status.json and the check for a newer
    attempt.
    """
    net, _, streamed = contestant.partition(",")
    config = parse_config({"model": {"name": net}, "data": {"resident": not streamed}})
    world = World.join(config)
    step = _step(config, world)
    sampler = ShardSampler(60_000, step.eager.plan, 0, config.seed)
    with _checkpoints(config, world) as checkpoints:
        run_dir = checkpoints.run_dir
        agreement = Agreement(world, StopRequest(), run_dir, poll=checkpoints.poll, on_agreed=lambda: watchdog.arm(600))
        audit = ShardAudit(sampler, world, 0)
        eager, no_context = step.eager, nullcontext()
        no_audit, error_context = eager.batches.on_gather, eager.error_context

        def block(first: int, *, guarded: bool) -> float:
            eager.batches.at(first, 0)  # a streamed set reopens its loader where the second block starts
            eager.batches.on_gather = audit.add if guarded else no_audit
            eager.error_context = error_context if guarded else lambda *_: no_context  # type: ignore[method-assign, assignment]
            world.synchronize()
            started = time.perf_counter()
            for number in range(first, first + _BLOCK_STEPS):
                step.take(number)
                if guarded:
                    agreement.tick()
                    if is_due(number + 1, 100, 10**6):
                        run_dir.status.check_not_superseded()  # as before a metrics line
                        run_dir.status.update(step=number)
            world.synchronize()
            return 1000 * (time.perf_counter() - started) / _BLOCK_STEPS

        # Both blocks of a pair take the same steps. Their order alternates: the second has a warmer cache.
        pairs = []
        for number in range(_BLOCKS):
            order = (False, True) if number % 2 else (True, False)
            times = {guarded: block(number * _BLOCK_STEPS, guarded=guarded) for guarded in order}
            audit = ShardAudit(sampler, world, 0)
            pairs.append((times[False], times[True]))
        watchdog.disarm()
    ratios = [guarded / bare for bare, guarded in pairs[2:]]
    return {
        "bare_ms": statistics.median(bare for bare, _ in pairs[2:]),
        "guarded_ms": statistics.median(guarded for _, guarded in pairs[2:]),
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
    }


def main() -> None:
    probe = {"breakdown": breakdown, "stall": stall, "growth": growth, "guards": guards}[sys.argv[1]]
    print(json.dumps(probe(sys.argv[2])), flush=True)


if __name__ == "__main__":
    main()
