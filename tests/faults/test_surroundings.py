"""Faults in the environment of a training: disk, memory, clock, a rank. Uses real mounts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO

import pytest

from support.mounts import needs_mounts
from support.patience import wait_until
from support.processes import alive, run, started
from support.run_files import assert_bit_identical, metrics, step_of
from support.trainings import release, train

CLOCK = Path(__file__).parent / "clock"
TABLE, COLUMNS = "environment faults", ("fault", "outcome", "seconds until exit", "verified")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_up_to(process: subprocess.Popen[str], *texts: str) -> str:
    """Return the output of a process up to the line by which each of `texts` has appeared."""
    assert process.stdout is not None
    out, missing = "", set(texts)
    for line in process.stdout:
        out += line
        missing = {text for text in missing if text not in line}
        if not missing:
            break
    return out


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the disk completely, including space that is freed meanwhile, by a failed save for example."""
    over = threading.Event()
    with (folder / "filler").open("wb", buffering=0) as file:
        filler = threading.Thread(target=_fill, args=(file, over))
        filler.start()
        try:
            yield
        finally:
            over.set()
            filler.join()
    (folder / "filler").unlink()


def _fill(file: IO[bytes], over: threading.Event) -> None:
    while not over.is_set():
        for size in (2**16, 1):
            with suppress(OSError):
                while True:
                    file.write(b"x" * size)
        over.wait(0.005)


# --- the disk --------------------------------------------------------------------------------------------------------


@needs_mounts
def test_disk_full_temporarily(undisturbed_alone: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    """Saves fail, lines of metrics are kept and training continues; once there is room again, nothing is missing."""
    runs = tmp_path / "runs"
    with mounted(runs, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        with started(train(nproc=None), tmp_path) as process:
            wait_until(lambda: step_of(runs / "r") >= 8, "training")
            with full(runs):
                out = read_up_to(process, "A checkpoint could not be written", "metrics.jsonl cannot be written")
            release(tmp_path)
            assert process.stdout is not None
            assert process.stderr is not None
            out, err = out + process.stdout.read(), process.stderr.read()
            assert process.wait() == 0, err
        assert "Training continues" in out
        # One warning instead of a hundred, and another one if a line found some room in between.
        assert 1 <= out.count("metrics.jsonl cannot be written") <= 3
        assert "Traceback" not in out + err
        assert_bit_identical(runs / "r", undisturbed_alone)
        assert json.loads((runs / "r/result.json").read_text())["attempt"] == 1
    row("the disk is full temporarily, during saves", "continues, warns, retries", "-", "to the bit")


@needs_mounts
def test_disk_stays_full(undisturbed: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    """The last state cannot be saved: exit 1 with the fix. With room again it resumes from the last good checkpoint."""
    runs = tmp_path / "runs"
    with mounted(runs, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        with started(train(), tmp_path) as process:
            wait_until(lambda: step_of(runs / "r") >= 8, "training")
            with full(runs):
                release(tmp_path)
                out, err = process.communicate()
        assert process.returncode == 1, out + err
        assert re.search(r"error \[rank 0\]: .*could not be written.*Make room there", out), out
        assert "Traceback" not in out + err
        again = run(train(), tmp_path)
        assert again.returncode == 0, again.stderr
        assert_bit_identical(runs / "r", undisturbed)
    row(
        "the disk stays full until the end", "exit 1, `Make room there`; the next start resumes", "-",
        "to the bit, resumed",
    )  # fmt: skip


@needs_mounts
def test_disk_turns_read_only(undisturbed_alone: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    """As ext4 does after an error: even open files can no longer be written."""
    runs, image = tmp_path / "runs", tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with mounted(runs, "-o", "loop", str(image)):
        with started(train(nproc=None), tmp_path) as process:
            wait_until(lambda: step_of(runs / "r") >= 8, "training")
            subprocess.run(["mount", "-o", "remount,abort", str(runs)], check=True)
            release(tmp_path)
            began = time.monotonic()
            out, err = process.communicate()
            seconds = time.monotonic() - began
        assert process.returncode == 1, out + err
        assert "Training continues" in out
        assert re.search(r"error: .*Read-only file system", err), out
        assert "Traceback" not in out + err
    # Use a copy: the image itself may still be mounted in another test's processes.
    again_image = tmp_path / "again"
    subprocess.run(["cp", "--sparse=always", str(image), str(again_image)], check=True)
    subprocess.run(["fsck.ext4", "-p", str(again_image)], check=False, capture_output=True)
    runs.rmdir()
    with mounted(runs, "-o", "loop", str(again_image)):
        again = run(train(nproc=None), tmp_path)
        assert again.returncode == 0, again.stderr
        assert_bit_identical(runs / "r", undisturbed_alone)
    row(
        "the run directory turns read-only (ext4, as after an error)",
        "trains to the end, exit 1 because nothing could be saved; the next start resumes",
        f"{seconds:.0f}", "to the bit, resumed",
    )  # fmt: skip


# --- a rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nproc", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_rank_hangs(nproc: int, rank: int, tmp_path: Path, row: Callable[..., None]) -> None:
    """The rank hangs in C code that holds the GIL, so none of its Python code runs."""
    net = ["model.name=support.user_nets:Hanging", "model.args.call=15", f"model.args.rank={rank}"]
    with started(train(*net, "stall_timeout_s=20", nproc=nproc), tmp_path) as process:
        written = tmp_path / "runs/r/metrics.jsonl"  # status.json lags by a second
        wait_until(lambda: written.exists() and '"step": 12,' in written.read_text(), "training")
        began = time.monotonic()
        _out, err = process.communicate()
        seconds = time.monotonic() - began
    assert process.returncode == 1
    assert f"rank {rank} made no progress" in err
    assert re.search(r"hung in:\n  File \".*/user_nets.py\", line \d+ in forward\n", err), err
    assert "The last good checkpoint is" in err
    assert f"dist-train train --resume {tmp_path}/runs/r" in err
    assert not alive(tmp_path)
    row(
        f"rank {rank} of {nproc} hangs in C code that holds the GIL (stall_timeout_s=20)",
        "exit 1, prints its stack and the command to resume", f"{seconds:.0f}", "no process left",
    )  # fmt: skip


def test_rank_frozen(tmp_path: Path, row: Callable[..., None]) -> None:
    """The frozen rank cannot exit by itself, and the others do not wait for it."""
    with started(train("stall_timeout_s=20"), tmp_path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5") as process:
        wait_until(lambda: step_of(tmp_path / "runs/r") >= 8, "training")
        (pid,) = [pid for pid in alive(tmp_path) if b"RANK=1\0" in (Path("/proc") / f"{pid}/environ").read_bytes()
                  and b"dist_train" in (Path("/proc") / f"{pid}/cmdline").read_bytes()]  # fmt: skip
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        _out, err = process.communicate()
        seconds = time.monotonic() - began
    assert process.returncode == 1
    assert "did not answer within stall_timeout_s=20" in err or "rank 1 was killed by SIGKILL" in err
    assert not alive(tmp_path)
    row(
        "rank 1 of 2 is frozen (SIGSTOP; stall_timeout_s=20)", "exit 1; torchrun kills the rank",
        f"{seconds:.0f}", "no process left",
    )  # fmt: skip


def test_clock_jumps(undisturbed_alone: Path, tmp_path: Path, row: Callable[..., None]) -> None:
    """Timed saves, agreements and time accounting use a monotonic clock."""
    path = os.pathsep.join([str(CLOCK), os.environ["PYTHONPATH"]])
    with started(train("save_every=1 s", "model.args.slow_s=0.05", nproc=None), tmp_path, PYTHONPATH=path) as process:
        _out, err = process.communicate()
    assert process.returncode == 0, err
    assert_bit_identical(tmp_path / "runs/r", undisturbed_alone)
    lines = metrics(tmp_path / "runs/r")
    times = [line["time"] for line in lines]
    seconds = json.loads((tmp_path / "runs/r/result.json").read_text())["seconds"]
    assert max(times) - times[0] > 300 * 86_400 > 0 > times[-1] - times[0], "the clock did not jump in mid-run"
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) < 80_000
    last_but_one = sorted((tmp_path / "runs/r/checkpoints").glob("step_*"))[-2]
    set_back = next(line for line, later in pairwise(lines) if later["time"] < line["time"])
    assert int(last_but_one.name.removeprefix("step_")) > set_back["step"], "no timed save after the clock was set back"
    row(
        "the clock is set a year ahead, then a day back (Python's clock, in every process)", "finishes normally", "-",
        "to the bit",
    )  # fmt: skip


@pytest.mark.parametrize("nproc", [1, 2])
def test_memory_runs_out(nproc: int, tmp_path: Path, row: Callable[..., None]) -> None:
    """The error names a smaller per_device_batch_size, which works and gives the same result."""
    net = ["model.name=conv", "model.args={}"]
    large = ["global_batch_size=60000", "per_device_batch_size=60000", "train_for=1 steps"]
    limited = ["prlimit", f"--as={4 * 10**9}", *train(*net, *large, nproc=nproc)]
    done = run(limited, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    smaller = 60_000 // nproc // 2
    assert f"Out of memory with per_device_batch_size={2 * smaller}" in done.stderr
    assert f"per_device_batch_size={smaller} needs less" in done.stderr
    assert "Traceback" not in done.stderr
    row(f"memory runs out, nproc={nproc}", f"exit 1, names per_device_batch_size={smaller}", "-", "-")
