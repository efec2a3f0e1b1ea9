"""Kills at a chosen point of a run. On PYTHONPATH of the processes that tests/faults/test_kills.py starts.

FAULT is JSON: when the process with this `role` reaches `point` for the `nth` time, the processes with the roles in
`victims` get SIGKILL. `folder` receives the pids of all processes and, just before the kill, a file `hit`. With `hold`,
a process that kills only others waits at the point until it is ended. dist_train has no code for this: its calls are
wrapped here.
"""

from __future__ import annotations

import json
import os
import re
import shutil  # noqa: F401 - imported before os is patched: it looks up the original functions
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
STEP_S = 0.02  # minimum duration of a step: a run that lost its launcher must not finish before it notices
_fsync, _rename = os.fsync, os.rename
_pid = os.getpid()
_count = 0


def _role() -> str:
    command = " ".join(sys.orig_argv)
    if "RANK" in os.environ:
        return f"rank {os.environ['RANK']}" if "-m dist_train train" in command else ""
    if "-m torch.distributed.run" in command:
        return "torchrun"
    return "launcher" if "dist-train launch" in command else ""


def at(point: str, before: Callable[[], object] = lambda: None) -> None:
    """Kill if this is the chosen point. `before` imitates what a kill in the middle of a write leaves."""
    global _count
    if point != FAULT["point"] or os.getpid() != _pid:  # loader workers are forks of their rank
        return
    _count += 1
    if _count == FAULT["nth"]:
        if FAULT["hold"] or FAULT["role"] in FAULT["victims"]:  # otherwise this process continues
            before()
        _kill()


def _kill() -> None:
    folder = Path(FAULT["folder"])
    while not all((folder / role).exists() for role in FAULT["victims"]):  # a rank may have only just started
        time.sleep(0.01)
    pids = [int((folder / role).read_text()) for role in FAULT["victims"]]
    with (folder / ".hit").open("w") as file:
        file.write(FAULT["point"])
        file.flush()
        _fsync(file.fileno())
    _rename(folder / ".hit", folder / "hit")
    for pid in sorted(pids, key=lambda pid: pid == _pid):  # this process last
        os.kill(pid, signal.SIGKILL)
    if FAULT["hold"]:
        time.sleep(60)


# --- operating system calls -------------------------------------------------------------------------------------


def plain(path: object) -> str:
    """Return a file name without the parts that differ between writes."""
    name = Path(os.fsdecode(path)).name  # type: ignore[arg-type]
    for pattern, replacement in {
        r"\.writing_(\w+\.\w+)_[0-9a-f]{32}": r"\1",  # a file; other .writing_ names are folders
        r"step_\d+": "step",
        r"\.(writing|removing|replaced|probe|token)_.*": r"\1",
        r"\.(last|best)": r"\1",
    }.items():
        name = re.sub(f"^{pattern}$", replacement, name)
    return name


def _halve(path: object) -> None:
    os.truncate(path, os.stat(path).st_size // 2)  # type: ignore[arg-type]  # noqa: PTH116


def _watch_system_calls() -> None:
    replace, unlink, rmdir = os.replace, os.unlink, os.rmdir

    def watched_fsync(descriptor: int) -> None:
        name = plain(Path(f"/proc/self/fd/{descriptor}").readlink())
        at(f"before fsync {name}")
        _fsync(descriptor)
        at(f"after fsync {name}")

    def watched(call: Callable[..., None], what: str, source: Any, target: Any, **more: Any) -> None:
        name = plain(target)
        if name.endswith(".json"):
            at(f"half {name}", lambda: _halve(source))
        at(f"before {what} {name}")
        call(source, target, **more)
        at(f"after {what} {name}")

    def watched_removal(call: Callable[..., None], what: str, path: Any, **more: Any) -> None:
        at(f"before {what} {plain(path)}")
        call(path, **more)
        at(f"after {what} {plain(path)}")

    os.fsync = watched_fsync  # type: ignore[assignment]
    os.rename = lambda *args, **more: watched(_rename, "rename", *args, **more)
    os.replace = lambda *args, **more: watched(replace, "rename", *args, **more)
    os.unlink = lambda *args, **more: watched_removal(unlink, "unlink", *args, **more)
    os.rmdir = lambda *args, **more: watched_removal(rmdir, "rmdir", *args, **more)


# --- functions of dist_train and of torch, wrapped when their module is imported -------------------------------------


def _watch(owner: Any, name: str, label: str = "", of_class: bool = False) -> None:
    original, label = getattr(owner, name), label or name

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        at(f"before {label}")
        result = original(*args, **kwargs)
        at(f"after {label}")
        return result

    setattr(owner, name, staticmethod(watched) if of_class else watched)


def _torch(module: ModuleType) -> None:
    save = module.save

    def watched(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        at("before write training.pt")
        save(value, file, *args, **kwargs)
        at("half training.pt", lambda: _halve(file))

    module.save = watched  # type: ignore[attr-defined]


def _checkpoint(module: ModuleType) -> None:
    save_file = module.save_file

    def watched(tensors: Any, file: str, header: Any) -> None:
        at("before write model.safetensors")
        save_file(tensors, file, header)
        at("half model.safetensors", lambda: _halve(file))

    module.save_file = watched  # type: ignore[attr-defined]


def _checkpoints(module: ModuleType) -> None:
    _watch(module.Checkpoints, "prune")
    _watch(module.Checkpoints, "restore_latest")


def _metrics_file(module: ModuleType) -> None:
    owner = module.MetricsFile
    append = owner.append

    def watched(self: Any, line: Any) -> None:
        append(self, line)
        size = self.path.stat().st_size
        at("half metrics.jsonl", lambda: os.truncate(self.path, size - 20))

    owner.append = watched
    _watch(owner, "cut")


def _agreement(module: ModuleType) -> None:
    tick = module.Agreement.tick

    def watched(self: Any, phase: str = "train") -> None:
        at(f"before tick {phase}")
        tick(self, phase)
        at(f"after tick {phase}")

    module.Agreement.tick = watched


def _step(module: ModuleType) -> None:
    take = module.Step.take

    def slow(self: Any, step: int) -> None:
        time.sleep(STEP_S)
        take(self, step)

    module.Step.take = slow
    _watch(module.Step, "take")
    _watch(module.Step, "warm_up")


def _recorder(module: ModuleType) -> None:
    set_state = module.RunRecorder.set_state

    def watched(self: Any, state: str) -> None:
        at(f"before {state}")
        set_state(self, state)
        at(f"after {state}")

    module.RunRecorder.set_state = watched


_WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "torch": _torch,
    "dist_train.checkpoints.storage": _checkpoint,
    "dist_train.runs.metrics_log": _metrics_file,
    "dist_train.runs.attempt": lambda module: _watch(module, "begin_attempt"),
    "dist_train.training.agreement": _agreement,
    "dist_train.training.step.train_step": _step,
    "dist_train.training.recorder": _recorder,
    "dist_train.models.tasks.objective": lambda module: _watch(module.Objective, "forward"),
    "dist_train.distributed.world": lambda module: _watch(module.World, "join", of_class=True),
    "dist_train.checkpoints.manager": _checkpoints,
}


class _Imports:
    """The first finder in sys.meta_path: every import is a point, and some modules are wrapped once executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        at(f"import {name}")
        if name not in _WATCHED:
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)))
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            _WATCHED[name](module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if FAULT and (_me := _role()):
    Path(FAULT["folder"], f".{_me}").write_text(str(_pid))
    _rename(Path(FAULT["folder"], f".{_me}"), Path(FAULT["folder"], _me))
    if _me.startswith("rank") and _me != FAULT["role"]:
        FAULT["point"] = "none"  # it is still slowed down
    if _me.startswith("rank") or _me == FAULT["role"]:
        sys.meta_path.insert(0, _Imports())
        _watch_system_calls()
