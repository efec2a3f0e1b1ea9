"""`dist-train verify` and `dist-train doctor`: all checks pass here, and each planted fault is found."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.config.loading import load_config
from dist_train.config.schema import Config
from dist_train.tools.verify.rank import freeze_for_comparison
from dist_train.tools.verify.suite import Check, verify
from support.planted import verify_on_forked_ranks
from support.processes import DIST_TRAIN, run

# Several DDP buckets, so that the order of their first layout matters; few images, as they are evaluated many times.
PART = "data.name=support.user_sets:mnist_part"
NET = ["model.name=conv", "per_device_batch_size=24", "global_batch_size=24", PART]


def small(*settings: str) -> Config:
    return load_config("smoke", [*NET, *settings])


def broken(checks: list[Check]) -> str:
    return "\n".join(f"{check.promise}: {check.result}" for check in checks if not check.kept)


@pytest.mark.parametrize(
    ("net", "optimizer", "nproc", "sampling", "frozen", "how_often"),
    [
        ("conv", "{lr: 1e-3}", 3, "shuffled", "nothing", "at most once"),
        ("bks", "{name: muon, lr: 1e-2}", 2, "balanced", "dropout off, Muon in float64", "as often as its epoch draws"),
    ],
)
def test_all_promises_hold(
    net: str, optimizer: str, nproc: int, sampling: str, frozen: str, how_often: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_on_forked_ranks(monkeypatch)
    checks = list(verify(small(f"model.name={net}", f"optimizer={optimizer}", f"data.sampling={sampling}"), nproc))
    assert not broken(checks)
    promises = "\n".join(check.promise for check in checks)
    for part in (f"losses of {nproc} processes", how_often, "evaluated once", "as if never stopped",
                 f"resumed on {nproc - 1}", "a batch joined", "SIGKILL"):  # fmt: skip
        assert part in promises
    assert checks[0].result == frozen


def test_layers_that_depend_on_batch_division_are_frozen() -> None:
    """In float64, within rounding: a kernel may sum in another order for another number of rows."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double()
    assert freeze_for_comparison(net) == ["BatchNorm frozen", "dropout off"]
    net.train()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    torch.testing.assert_close(net(inputs), torch.cat([net(inputs[:3]), net(inputs[3:])]), rtol=0, atol=1e-12)


class MeanOfPowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = 3.0


def test_only_dropout_probabilities_are_changed() -> None:
    pool = MeanOfPowers()
    assert freeze_for_comparison(nn.Sequential(pool, nn.Dropout(0.0))) == []
    assert pool.p == 3.0


@pytest.mark.parametrize(
    ("fault", "nproc", "found_by"),
    [
        ("a doubled shard", 2, ["losses of 2 processes", "at most once"]),
        ("a doubled evaluation", 2, ["2 processes: every example evaluated once"]),
        ("a mean per rank", 2, ["losses of 2 processes"]),
        ("a sum for a mean", 1, ["a batch joined"]),
        ("a missing warm-up", 3, ["as if never stopped"]),
    ],
)
def test_planted_fault_is_found(fault: str, nproc: int, found_by: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verify_on_forked_ranks(monkeypatch, fault)
    missing = set(found_by)
    for check in verify(small(), nproc):
        if not check.kept:
            missing -= {part for part in missing if part in check.promise}
        if not missing:
            return
    raise AssertionError(f"not found: {missing}")


def test_verify_command(tmp_path: Path) -> None:
    """Exit code 1 and a line with FAIL for a net whose loss is a sum, on ranks that a launcher starts."""
    (tmp_path / "mine.py").write_text(
        "from torch.nn.functional import cross_entropy\n"
        "from dist_train.models.nets import Mlp\n"
        "class Net(Mlp):\n"
        "    def loss(self, output, target):\n"
        "        return cross_entropy(output, target, reduction='sum')\n"
    )
    command = [*DIST_TRAIN, "verify", "-c", "smoke", "--nproc=2", "model.name=mine:Net", PART]
    done = run(command, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "FAIL  a batch joined to itself has the same loss" in done.stdout
    assert "promises broken." in done.stdout.splitlines()[-1]


def doctor(folder: Path, *arguments: str, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    command = [*DIST_TRAIN, "doctor", "-c", "smoke", "--json", *arguments]
    done = run(command, folder, **env)
    assert done.stdout, done.stderr
    return done.returncode, {row["what"]: row for row in json.loads(done.stdout)}


def test_doctor_on_healthy_machine(tmp_path: Path) -> None:
    code, found = doctor(tmp_path, "--nproc=2", OMP_NUM_THREADS="1")
    assert code == 0, found
    assert found.keys() == {
        "device", "threads", "versions", "data", "net", "port", "runs_dir", "room", "W&B", "Slurm", "all-reduce",
    }  # fmt: skip
    assert "2 ranks, 16 MiB in" in found["all-reduce"]["said"]
    assert "60,000 training examples" in found["data"]["said"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_doctor_starts_ranks_without_torch() -> None:
    code = """if True:
        import sys
        from dist_train.cli import main
        from dist_train.launch import subprocesses
        subprocesses.output_of_ranks = lambda nproc, *command, environment: '[]'
        try:
            main(["doctor", "--nproc=2", "--json"])
        finally:
            print(sorted({"torch", "accelerate", "pydantic"} & {*sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


def test_doctor_names_each_problem_with_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, found = doctor(
            tmp_path, "-o", "runs_dir=file/runs", "-o", "device=cuda", "-o", "data.name=fashion_mnist",
            MASTER_PORT=port, OMP_NUM_THREADS="99",
        )  # fmt: skip
    assert code == 1
    wrong = {what: row["fix"] for what, row in found.items() if row["fix"]}
    assert wrong.keys() >= {"device", "threads", "data and net", "port", "runs_dir"}
    assert "Unset MASTER_PORT" in wrong["port"]
    assert "DIST_TRAIN_RUNS_DIR" in wrong["runs_dir"]
    assert "dist-train data fetch" in wrong["data and net"]
