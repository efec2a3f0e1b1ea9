"""The checks of `dist-train verify`, each with its bound, the measured value, and whether the promise is kept."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.config.batch_plan import BatchPlan
from dist_train.config.loading import parse_config, to_yaml
from dist_train.config.schema import Config
from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import output_of, output_of_ranks
from dist_train.tools.verify.trial import Outcome, Trial

STEPS, SAVE_AT, KILLS = 20, 10, 3
BOUNDS = {"float32": 1e-5, "float64": 1e-9}  # relative, of each of the first 20 losses


@dataclass(frozen=True)
class Check:
    promise: str
    result: str
    kept: bool


def verify(config: Config, nproc: int) -> Iterator[Check]:
    """Yield one check after the other, on up to `nproc` processes of this machine.

    Raises:
        ConfigError: the global batch cannot be divided among `nproc` processes.
        LaunchError: the processes of a check failed; with the end of their stderr.
    """
    BatchPlan.of(config, nproc)
    sizes = [n for n in sorted({1, 2, 3, nproc}) if n <= nproc and config.global_batch_size % n == 0]
    config = _without_rounding(config)
    bound = BOUNDS[config.dtype]
    with tempfile.TemporaryDirectory() as folder:
        trials = _Trials(Path(folder), config)
        alone = trials.run(1)
        frozen = [*alone.frozen, *(["Muon in float64"] if config.optimizer.rounds_to_bf16 else [])]
        yield Check("frozen for these checks", ", ".join(frozen) or "nothing", True)
        outcomes = {1: alone}
        for size in sizes[1:]:
            outcomes[size] = trials.run(size)
            worst = _worst(outcomes[size].losses, alone.losses)
            promise = f"the first {STEPS} losses of {size} processes equal those of one, within {bound:.0e}"
            yield Check(promise, f"{worst:.1e}", worst <= bound)
        for size, outcome in outcomes.items():
            yield from _counts(size, outcome)
        joined_batch_error = max(
            o.joined_batch_error if math.isfinite(o.joined_batch_error) else math.inf for o in outcomes.values()
        )
        yield Check(
            "a batch joined to itself has the same loss, within 1e-05",
            f"{joined_batch_error:.1e}",
            joined_batch_error <= 1e-5,
        )
        yield from _resume(trials, sizes, bound)
        yield _killed_while_saving(trials)


def _counts(size: int, outcome: Outcome) -> Iterator[Check]:
    held, unseen, total = outcome.epoch
    promise, found = "at most once per epoch", f"{held} once, {outcome.duplicates} more often, {unseen} dropped"
    if outcome.replaces:
        promise, found = (
            "as often as its epoch draws it",
            f"{held} so, {outcome.duplicates} more often, {unseen} not drawn",
        )
    yield Check(
        f"{size} process{'es' if size > 1 else ''}: every example {promise}",
        f"{found} of {total}",
        outcome.duplicates == 0 and held + unseen == total,
    )
    once, total = outcome.evaluated
    if total:
        promise = f"{size} process{'es' if size > 1 else ''}: every example evaluated once"
        yield Check(promise, f"{once} of {total}", once == total)


def _resume(trials: _Trials, sizes: list[int], bound: float) -> Iterator[Check]:
    """Stop in mid-epoch on up to three processes, and resume on as many and on another number."""
    size = max(n for n in sizes if n <= 3)
    whole = trials.run(size, folder="saved", save_at=SAVE_AT)
    for again in (size, *[n for n in sizes if n != size][-1:]):
        resumed = trials.run(again, folder=trials.copy("saved", f"again_{again}"))
        left = whole.losses[SAVE_AT:]
        worst = _worst(resumed.losses, left) if resumed.began_at == SAVE_AT else float("inf")
        if again == size and whole.on_cpu:
            same = resumed.losses == left and resumed.weights == whole.weights
            promise = f"{size} processes, stopped after step {SAVE_AT} and resumed: as if never stopped, to the bit"
            yield Check(promise, "equal" if same else f"losses {worst:.1e}", same)
        else:
            promise = f"stopped on {size} processes, resumed on {again}: the same losses within {bound:.0e}"
            yield Check(promise, f"{worst:.1e}", worst <= bound)


def _killed_while_saving(trials: _Trials) -> Check:
    """Kill a process that saves after each step, at several moments."""
    began = []
    for kill in range(KILLS):
        folder = f"killed_{kill}"
        with suppress(LaunchError):
            trials.run(1, folder=folder, kill_after_s=0.05 + 0.037 * kill)
        began.append(trials.run(1, folder=folder, steps=0).began_at)
    result = f"after {KILLS} kills it resumed from steps {', '.join(map(str, began))}"
    return Check("SIGKILL during saves leaves a checkpoint to resume from", result, min(began) > 0)


def _without_rounding(config: Config) -> Config:
    """Return the config without what rounds by more than the bound.

    That is bf16, fp16 and a compiled update, which rounds in another order. Muon rounds to bf16 in any type, and then
    equally if what it rounds is equal to 1e-16.
    """
    exact = config.model_dump(mode="json") | {"mixed_precision": "no", "step_mode": "eager"}
    return parse_config(exact | ({"dtype": "float64"} if config.optimizer.rounds_to_bf16 else {}))


def _worst(ours: list[float], theirs: list[float]) -> float:
    pairs = zip(ours, theirs, strict=True)
    errors = [abs(one - other) / max(abs(other), 1e-12) for one, other in pairs]
    return max(each if math.isfinite(each) else math.inf for each in errors)


class _Trials:
    """Runs trials in child processes, on a copy of the config without settings that would hide a fault."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = folder / "config.yaml"
        self._config.write_text(to_yaml(config))

    def run(
        self, size: int, *, steps: int = STEPS, folder: str = "", save_at: int = 0, kill_after_s: float = 0.0
    ) -> Outcome:
        trial = Trial(
            config=str(self._config),
            steps=steps,
            folder=str(self._folder / folder) if folder else "",
            save_at=save_at,
            kill_after_s=kill_after_s,
        )
        program = "dist_train.tools.verify.rank", json.dumps(asdict(trial))
        printed = output_of_ranks(size, *program) if size > 1 else output_of(*program)
        # A user's net may print too.
        fields = json.loads(next(line for line in printed.splitlines() if line.startswith('{"began_at": ')))
        return Outcome(**fields | {name: tuple(fields[name]) for name in ("epoch", "evaluated")})

    def copy(self, folder: str, to: str) -> str:
        shutil.copytree(self._folder / folder, self._folder / to)
        return to
