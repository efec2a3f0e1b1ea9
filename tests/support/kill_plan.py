"""Kills of a run: point, process and count, drawn with a seed. Over the rounds each phase is hit in many ways."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ROUNDS = 6  # each hits every phase once
FILES = ("model.safetensors", "training.pt", "state.json", "manifest.json")


@dataclass(frozen=True)
class Kill:
    """See tests/faults/killer/sitecustomize.py."""

    phase: str
    point: str
    nth: int
    role: str
    target: str  # rank 0, another rank, launcher, torchrun, all
    victims: tuple[str, ...]
    hold: bool = False
    begun: bool | None = True  # whether the attempt has its number by then; None: either


@dataclass(frozen=True)
class Chain:
    """One run: each of its starts is killed except the last."""

    number: int
    nproc: int
    kills: tuple[Kill, ...]

    def __str__(self) -> str:
        return f"{self.number}-on-{self.nproc}"


# Any rank reaches these points. After a kill of the launcher the ranks agree on a stop.
ANYWHERE: dict[str, tuple[tuple[str, int], ...]] = {
    "set-up": (("before restore_latest", 1), ("after restore_latest", 1)),
    "warm-up": (("before warm_up", 1), ("before forward", 2), ("after forward", 2), ("after warm_up", 1)),
    "step": (("before take", 9), ("after take", 9), ("after forward", 30)),
    "evaluation": (("before tick evaluate", 15), ("after tick evaluate", 15)),
}
# Only rank zero reaches these. After a kill of the launcher it stays there until it is ended.
RANK_ZERO: dict[str, tuple[tuple[str, int], ...]] = {
    "start of the attempt": (
        ("before unlink token", 1),
        ("after begin_attempt", 1),
        ("after cut", 1),
        ("half run.json", 1),
    ),
    "metrics and status": (("half metrics.jsonl", 4), ("half status.json", 9), ("before fsync metrics.jsonl", 2)),
    "write model": (("half model.safetensors", 2), ("before write model.safetensors", 2)),
    "write training": (("half training.pt", 2), ("before write training.pt", 2)),
    "write state": (("half state.json", 2), ("before rename state.json", 2), ("after rename state.json", 2)),
    "write manifest": (
        ("half manifest.json", 2), ("before rename manifest.json", 2), ("after rename manifest.json", 2),
    ),
    "fsync of a file": tuple((f"{when} fsync {name}", 2) for name in FILES for when in ("before", "after")),
    "rename": (("before rename step", 2), ("after rename step", 2)),
    "fsync of a folder": tuple(
        (f"{when} fsync {name}", 2) for name in ("checkpoints", "writing") for when in ("before", "after")
    ),
    "unlink": tuple((f"{when} unlink {name}", 1) for name in FILES for when in ("before", "after")),
    "prune": (
        ("before rmdir removing", 1), ("after rename removing", 1), ("before rename removing", 1),
        ("before rename last", 2), ("after rename best", 2), ("after prune", 2),
    ),
}  # fmt: skip
SAVE = [phase for phase in RANK_ZERO if phase not in ("start of the attempt", "metrics and status")]
START_UP = (
    ("launcher", "import dist_train.launch.torchrun", "launcher", False),
    ("rank 0", "import torch", "rank 0", False),
    ("torchrun", "import torch.distributed.elastic", "torchrun", False),
    ("rank 1", "import accelerate", "another rank", False),
    ("rank 0", "before join", "all", False),
    ("launcher", "before unlink probe", "launcher", False),
    ("rank 1", "import dist_train.training.run", "all", False),
)
# The end of a run: all its steps are saved, so the next start saves the last one again.
RESULT = (("after rename result.json", 1), ("before FINISHED", 1))
REPLACE = (
    ("before rename replaced", 1), ("after rename replaced", 1), ("after rename step", 1), ("before rmdir replaced", 1),
)  # fmt: skip
FINISHED = (("after FINISHED", 1),)

PHASES = ("start-up", *ANYWHERE, *RANK_ZERO, "before FINISHED", "replace", "after FINISHED")


def victims_of(target: str, nproc: int, other: int) -> tuple[str, ...]:
    everyone = ("launcher", "torchrun", *(f"rank {rank}" for rank in range(nproc)))
    return {"all": everyone, "another rank": (f"rank {other}",)}.get(target, (target,))


def plan(seed: int = 0) -> Iterator[Chain]:
    """Yield all kills, three runs per round."""
    draw = random.Random(seed)
    for number in range(ROUNDS):
        yield from _round(number, 3, ["start-up", *ANYWHERE, *RANK_ZERO], draw)


def sample(seed: int = 0) -> Iterator[Chain]:
    """Yield a tenth of the kills: one per phase of a save and one at the end; the longer run uses two processes."""
    yield from _round(2, 2, [*SAVE], random.Random(seed))
    yield Chain(6, 2, (_at_the_end("after FINISHED", FINISHED, 0, 2, "rank 0"),))


def _round(number: int, runs: int, phases: list[str], draw: random.Random) -> Iterator[Chain]:
    """Yield one kill per phase over `runs` runs, the first on three processes. Ends vary with the round."""
    draw.shuffle(phases)
    for part in range(runs):
        nproc = 2 if part else 3
        kills = [_kill(phase, number, nproc, draw) for phase in phases[part::runs]]
        ending = (number + part) % 3
        if ending == 0:
            ends = (("before FINISHED", RESULT), ("replace", REPLACE))
            target = ("rank 0", "all")[number // 3 % 2]
            kills += [_at_the_end(phase, points, number, nproc, target) for phase, points in ends]
        elif ending == 1:
            kills.append(_at_the_end("after FINISHED", FINISHED, number, nproc, ("all", "rank 0")[number % 2]))
        yield Chain(runs * number + part, nproc, tuple(kills))


def _kill(phase: str, number: int, nproc: int, draw: random.Random) -> Kill:
    other = 1 + number % (nproc - 1)
    if phase == "start-up":
        role, point, target, begun = START_UP[number % len(START_UP)]
        return Kill(phase, point, 1, role, target, victims_of(target, nproc, other), begun=begun)
    points = ANYWHERE.get(phase) or RANK_ZERO[phase]
    point, most = points[number % len(points)]
    # Each phase starts the rotation with another target.
    targets = ("rank 0", "another rank", "all", "launcher" if number % 2 else "torchrun")
    target = targets[(number + PHASES.index(phase)) % 4]
    role = f"rank {other}" if phase in ANYWHERE and target == "another rank" else "rank 0"
    return Kill(
        phase, point, draw.randint(1, most), role, target, victims_of(target, nproc, other),
        hold=phase in RANK_ZERO and target in ("launcher", "torchrun"),
    )  # fmt: skip


def _at_the_end(phase: str, points: tuple[tuple[str, int], ...], number: int, nproc: int, target: str) -> Kill:
    point, nth = points[number % len(points)]
    return Kill(phase, point, nth, "rank 0", target, victims_of(target, nproc, 1))
