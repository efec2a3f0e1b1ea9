"""What an error is called that a library raised."""

from __future__ import annotations

import pytest
import torch

from dist_train.config.loading import parse_config
from dist_train.distributed.devices import is_out_of_memory
from dist_train.distributed.process import detect_process
from dist_train.errors import DataError, OutOfMemory, PeerLost, UserCodeError
from dist_train.runs.directory import RunDir
from dist_train.training.failures import FailureHandler


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore")])
def test_out_of_memory(error: Exception) -> None:
    config = parse_config({"global_batch_size": 96, "per_device_batch_size": 64})
    expected = r"per_device_batch_size=48 .* per_device_batch_size=32 needs less .*: 32 x 3 micro-steps x 1 processes"
    with pytest.raises(OutOfMemory, match=expected) as found, FailureHandler(detect_process({}), config, None):
        raise error
    assert not str(found.value).endswith("more")


def test_nothing_smaller_is_left() -> None:
    config = parse_config({"global_batch_size": 7, "per_device_batch_size": 1})
    with pytest.raises(OutOfMemory, match="one example already"), FailureHandler(detect_process({}), config, None):
        raise MemoryError


@pytest.mark.parametrize("said", ["shape '[3]' is invalid", "Connection closed by peer"])
def test_other_errors_are_not_of_memory(said: str) -> None:
    assert not is_out_of_memory(RuntimeError(said))
    with pytest.raises(RuntimeError, match=said.split()[0]), FailureHandler(detect_process({}), parse_config({}), None):
        raise RuntimeError(said)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("CUDA error: device-side assert triggered\nmore", UserCodeError, "device=cpu"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", DataError, r"data\.num_workers"),
    ],
)
def test_what_may_come_from_anywhere(said: str, kind: type[Exception], told: str) -> None:
    """Of a kernel launched long before, or of a signal's handler."""
    with pytest.raises(kind, match=told) as found, FailureHandler(detect_process({}), parse_config({}), None):
        raise RuntimeError(said)
    assert "\n" not in str(found.value)


def test_what_a_cpu_says() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)


@pytest.mark.parametrize("state", ["TRAINING", "FINISHED"])
def test_a_finished_run_has_no_error(state: str, run_dir: RunDir) -> None:
    """A rank that is lost on the way out, after the results, takes nothing of them."""
    run_dir.begin_attempt(parse_config({}), "id")
    run_dir.set_status(state=state)
    failure_handler = FailureHandler(detect_process({}), parse_config({}), None)
    failure_handler.run_dir = run_dir
    with pytest.raises(PeerLost), failure_handler:
        raise PeerLost("gone")
    ended_well = state == "FINISHED"
    assert run_dir.error.exists() != ended_well
    assert run_dir.read_status()["state"] == ("FINISHED" if ended_well else "ERROR")
