"""SIGKILL at a line of the product. On PYTHONPATH of the processes that tests/launch/test_queue_kills.py starts.

LINE_KILL is JSON: a process of this `role` (keeper, launcher, rank) kills itself when it reaches its `nth` new line of
dist_train/launch and dist_train/runs between the call of the role's function and its return. `folder` receives a file
`lines` with the names of the lines reached so far, and one `started` with a line for each launcher: its run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

KILL: dict[str, Any] = json.loads(os.environ.get("LINE_KILL", "{}"))
FUNCTIONS = {
    "keeper": ("dist_train.launch.keeper", "keep"),
    "launcher": ("dist_train.launch.jobs", "launch"),
    "rank": ("dist_train.runs.attempt", "begin_attempt"),
}
FOLDERS = ("dist_train/launch/", "dist_train/runs/")


def _role() -> str:
    command = " ".join(sys.orig_argv)
    if "RANK" in os.environ:
        return "rank" if "-m dist_train train" in command else ""
    if "-m dist_train queue work" in command:
        return "keeper"
    return "launcher" if "-m dist_train train --resume" in command else ""


class _Lines:
    """Counts new lines, and kills at the chosen one."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(folder in name for folder in FOLDERS):
            return None
        if event == "line" and (line := f"{Path(name).stem}:{frame.f_lineno}") not in self.seen:
            self.seen.add(line)
            _append("lines", line)
            if len(self.seen) == KILL["nth"]:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def _append(name: str, text: str) -> None:
    descriptor = os.open(Path(KILL["folder"], name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def _watch(module: ModuleType, name: str) -> None:
    original = getattr(module, name)

    @wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        sys.settrace(_Lines().trace)
        try:
            return original(*args, **kwargs)
        finally:
            sys.settrace(None)

    setattr(module, name, watched)


class _Imports:
    """The first finder in sys.meta_path: wraps the function of this role once its module is executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        module, function = FUNCTIONS[KILL["role"]]
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in sys.meta_path)))
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            _watch(module, function)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if KILL and (_me := _role()):
    if _me == "launcher":
        _append("started", Path(sys.orig_argv[sys.orig_argv.index("--resume") + 1]).name)
    if _me == KILL["role"]:
        sys.meta_path.insert(0, _Imports())
