"""What needs torch or a user's code, in child processes: low priority, one at a time, with limits."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dist_train.errors import LaunchError
from dist_train.launch import trial
from dist_train.launch.resume import environment_of
from dist_train.launch.subprocesses import limited_output_of
from dist_train.runs.directory import RunDir
from dist_train.runs.train_arguments import TrainArguments

MAX_IMAGE_BYTES = 16 * 10**6
_PREDICT_S, _EXPORT_S = 60.0, 300.0

_one_at_a_time = threading.Lock()


def predict(run_dir: RunDir, image: bytes) -> dict[str, Any]:
    """Return what the run's net predicts for an image: `classes` by their probability, or `numbers`.

    The child runs where the run did and with its interpreter, if they are there: the net may be one of the user's own.

    Raises:
        LaunchError: it is no image, the net does not take images, another child is at work, or it took too long.
    """
    with _child(), tempfile.NamedTemporaryFile(prefix="dist_train-") as file:
        file.write(image)
        file.flush()
        provenance = run_dir.read_provenance()
        folder, python = Path(provenance.get("cwd", ".")), shutil.which(provenance.get("python", ""))
        answer = limited_output_of(
            "predict", str(run_dir.path), file.name, "--json", timeout_s=_PREDICT_S, memory_bytes=trial.memory_bytes(),
            python=python or "", folder=folder if folder.is_dir() else None,
            environment=environment_of(provenance),
        )  # fmt: skip
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return {name: found[name] for name in ("classes", "numbers") if name in found}


def export_pth(run: Path, step: int) -> BinaryIO:
    """Return an open file with a checkpoint's weights as `torch.save` writes them. It is gone once it is closed.

    Raises:
        LaunchError: there is no such checkpoint, another child is at work, or it took too long.
    """
    with _child(), tempfile.TemporaryDirectory(prefix="dist_train-") as folder:
        out = Path(folder) / "weights.pth"
        options = ("--checkpoint", str(step))
        limited_output_of(
            "export", str(run), str(out), *options, timeout_s=_EXPORT_S, memory_bytes=trial.memory_bytes()
        )  # fmt: skip
        return out.open("rb")


def export_comparison(runs: Sequence[Path], suffix: str, axis: str) -> bytes:
    """Return the file that `dist-train runs compare --out` writes, for a suffix such as .html.

    Raises:
        LaunchError: matplotlib is missing, another child is at work, or it took too long.
    """
    with _child(), tempfile.TemporaryDirectory(prefix="dist_train-") as folder:
        out = Path(folder) / f"comparison{suffix}"
        options = ("--out", str(out), "--by", axis)
        limited_output_of(
            "runs", "compare", *map(str, runs), *options, timeout_s=_EXPORT_S, memory_bytes=trial.memory_bytes()
        )  # fmt: skip
        return out.read_bytes()


def try_batch(arguments: TrainArguments) -> str:
    """Do as `trial.try_batch`.

    Raises:
        LaunchError: as that, or another child is at work.
    """
    with _child():
        return trial.try_batch(arguments)


@contextmanager
def _child() -> Iterator[None]:
    if not _one_at_a_time.acquire(blocking=False):
        raise LaunchError("Another picture, export or trial is being worked on. Try again in a moment.")
    try:
        yield
    finally:
        _one_at_a_time.release()
