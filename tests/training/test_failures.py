"""Errors of libraries are translated into errors of this package."""

from __future__ import annotations

import pytest
import torch

from dist_train.config.loading import parse_config
from dist_train.distributed.devices import is_out_of_memory
from dist_train.distributed.process_info import detect_process
from dist_train.errors import DataError, OutOfMemory, PeerLost, UserCodeError
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.start_options import StartOptions
from dist_train.training.failures import FailureHandler

START = StartOptions("smoke")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore")])
def test_out_of_memory(error: Exception) -> None:
    config = parse_config({"global_batch_size": 96, "per_device_batch_size": 64})
    expected = r"per_device_batch_size=48 .* per_device_batch_size=32 needs less .*: 32 x 3 micro-steps x 1 processes"
    with pytest.raises(OutOfMemory, match=expected) as raised, FailureHandler(detect_process({}), config, START):
        raise error
    assert not str(raised.value).endswith("more")


def test_out_of_memory_with_one_example() -> None:
    config = parse_config({"global_batch_size": 7, "per_device_batch_size": 1})
    with pytest.raises(OutOfMemory, match="only one example"), FailureHandler(detect_process({}), config, START):
        raise MemoryError


@pytest.mark.parametrize("message", ["shape '[3]' is invalid", "Connection closed by peer"])
def test_other_errors_are_not_out_of_memory(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))
    first = message.split()[0]
    with pytest.raises(RuntimeError, match=first), FailureHandler(detect_process({}), parse_config({}), START):
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("message", "kind", "expected"),
    [
        ("CUDA error: device-side assert triggered\nmore", UserCodeError, "device=cpu"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", DataError, r"data\.num_workers"),
    ],
)
def test_errors_without_useful_traceback(message: str, kind: type[Exception], expected: str) -> None:
    """Raised by a kernel launched long before, or in a signal handler."""
    with pytest.raises(kind, match=expected) as raised, FailureHandler(detect_process({}), parse_config({}), START):
        raise RuntimeError(message)
    assert "\n" not in str(raised.value)


def test_out_of_memory_on_cpu() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("state", ["TRAINING", "FINISHED"])
def test_finished_run_has_no_error(state: str, run_dir: RunDir) -> None:
    """A rank that is lost during the exit does not affect the results."""
    begin_attempt(run_dir, parse_config({}), "id")
    run_dir.status.update(state=state)
    failure_handler = FailureHandler(detect_process({}), parse_config({}), START)
    failure_handler.run_dir = run_dir
    with pytest.raises(PeerLost), failure_handler:
        raise PeerLost("gone")
    finished = state == "FINISHED"
    assert run_dir.error.exists() != finished
    assert run_dir.status.read()["state"] == ("FINISHED" if finished else "ERROR")
