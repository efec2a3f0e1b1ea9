"""Device, precision and memory of one rank."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.distributed.devices import choose_device, choose_precision
from dist_train.distributed.process_info import ProcessInfo
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, LaunchError
from dist_train.launch import jobs
from dist_train.runs.directory import RunDir
from support.processes import run
from support.ranks import join_group, run_on_ranks

PAGES = 12_288  # 48 MiB: more than malloc keeps by default


@pytest.mark.parametrize(
    ("ours", "theirs", "recorded_precision", "expected"),
    [
        (None, None, None, "no"),
        (None, "bf16", None, "bf16"),
        ("no", "bf16", None, "no"),
        (None, "no", "bf16", "bf16"),  # `accelerate launch` exports no by default
        (None, None, "bf16", "bf16"),
        (None, "bf16", "bf16", "bf16"),
        ("bf16", "no", "bf16", "bf16"),
        ("bf16", "fp16", "bf16", "bf16"),
        ("bf16", "fp16", None, "^mixed_precision=bf16 in the config, fp16 from accelerate launch"),
        ("no", "bf16", "no", "no"),
        (
            None,
            "bf16",
            "no",
            r"^ACCELERATE_MIXED_PRECISION=bf16, but the run started with no\. Unset it\.$",
        ),
        ("no", None, "bf16", r"^mixed_precision=no, but the run started with bf16\. Set mixed_precision=bf16\.$"),
    ],
)
def test_run_keeps_its_precision(
    ours: str | None, theirs: str | None, recorded_precision: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if theirs is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", theirs)
    config = parse_config({"mixed_precision": ours})
    if expected in ("no", "bf16"):
        assert choose_precision(config, "cpu", recorded_precision) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            choose_precision(config, "cpu", recorded_precision)


def count_page_faults(out: Path) -> None:
    join_group("hardware")
    World.join(parse_config({"device": "cpu"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(PAGES * 1024)
    out.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.parametrize(
    ("process", "devices", "rejected"),
    [
        (ProcessInfo(0, 0, 4, 4, "torchrun"), 2, True),  # all ranks see the same devices
        (ProcessInfo(3, 3, 4, 4, "torchrun"), 4, False),
        (ProcessInfo(3, 3, 4, 4, "srun"), 1, False),  # --gpus-per-task=1: sees only its own device, as index 0
        (ProcessInfo(3, 3, 4, 4, "the environment"), 1, False),
    ],
)
def test_device_count_limits_processes(
    process: ProcessInfo, devices: int, rejected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    config = parse_config({"device": "cuda"})
    if rejected:
        with pytest.raises(LaunchError, match=f"{process.local_world_size} processes on a machine with {devices} CUDA"):
            choose_device(config, process)
    else:
        assert choose_device(config, process) == "cuda"


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_missing_device_is_refused(device: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    place = ProcessInfo(0, 0, world_size, world_size, "torchrun" if world_size > 1 else "python")
    expected = rf"^device={device}, but no {device.upper()} device is available .* Set device=auto, .* or device=cpu\.$"
    with pytest.raises(ConfigError, match=expected):
        choose_device(parse_config({"device": device}), place)


@pytest.mark.parametrize("command", [["train"], ["launch", "--nproc=2"]], ids=" ".join)
def test_no_process_starts_for_a_missing_device(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "start_ranks", lambda spec: pytest.fail("processes were started"))
    refused = CliRunner().invoke(main, [*command, "-c", "smoke", "device=cuda"])
    assert refused.exit_code == 2
    assert refused.output.startswith("error: device=cuda, but no CUDA device is available")
    assert not (tmp_path / "runs").exists()


def share_devices(devices: list[str], error: str) -> None:
    join_group("devices")
    world = World.join(parse_config({"device": "cpu"}))
    if not error:
        world.check_exclusive_device(devices[world.rank])
        return
    with pytest.raises(LaunchError, match=error):
        world.check_exclusive_device(devices[world.rank])
    world.leave()


@pytest.mark.parametrize(
    ("devices", "error"),
    [(["GPU-a", "GPU-b"], ""), (["GPU-a", "GPU-b", "GPU-a"], "Ranks 0 and 2 share the device GPU-a")],
)
def test_two_ranks_on_one_device_are_refused(devices: list[str], error: str) -> None:
    """Every rank raises the same error: none waits for another."""
    run_on_ranks(share_devices, devices, error, world_size=len(devices))


def test_freed_memory_is_reused(tmp_path: Path) -> None:
    """Not each of the 50 allocations takes new pages from the kernel."""
    run_on_ranks(count_page_faults, tmp_path / "faults", world_size=1)
    assert int((tmp_path / "faults").read_text()) < 25 * PAGES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_ranks_on_the_cpu_of_a_machine_with_a_gpu_train(tmp_path: Path) -> None:
    """More of them than it has GPUs."""
    command = [sys.executable, "-m", "dist_train", "launch", f"--nproc={torch.cuda.device_count() + 1}", "-c", "smoke"]
    done = run([*command, "--run-name", "r", "device=cpu", "train_for=4 steps"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert RunDir(tmp_path / "runs/r").read_result()["step"] == 4
