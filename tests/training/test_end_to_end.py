"""Runs as a user starts them, from the command line to the files in the run directory."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional

from dist_train.atomic_files import read_json, write_json
from dist_train.inference.trained_net import TrainedNet
from dist_train.runs.directory import RunDir
from support.processes import DIST_TRAIN, ROOT, run
from support.ranks import run_forked, run_on_ranks, train_here, train_on_ranks
from support.run_files import metrics, train_losses, weights
from support.user_sets import mnist_part

BUNDLE = ROOT / "tests/bundles/mnist_bks"
SHORT = ["-o", "train_for=60 steps", "-o", "eval_every=30 steps", "-o", "log_every=10", "-o", "final_train_eval=false"]
RESULT_KEYS = {
    "state", "step", "epoch", "attempt", "world_size", "global_batch_size", "mixed_precision", "train_s",
    "samples_per_s", "total_s", "train/loss", "train/accuracy", "train/seen", "val/accuracy", "test/accuracy",
    "test/seen", "best/accuracy", "best/step",
}  # fmt: skip


def test_run_writes_all_its_files(tmp_path: Path) -> None:
    """With two processes: result, metrics, checkpoint, logs, pictures, a complete offline W&B run, exact counts."""
    command = [*DIST_TRAIN, "train", "-c", "smoke", "--nproc", "2", "--run-name", "r"]
    done = run([*command, "tracking.pictures=true", "tracking.artifact=true"], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert re.search(r"test accuracy \d\d\.\d\d % \(\d+ / 10000\)", done.stdout)
    assert "Traceback" not in done.stdout
    run_dir = tmp_path / "runs/r"
    result = json.loads((run_dir / "result.json").read_text())
    assert result.keys() >= RESULT_KEYS
    assert (result["train/seen"], result["test/seen"], result["step"]) == (60_000, 10_000, 200)
    assert result["test/accuracy"] > 0.85
    assert 0 < result["train_s"] < result["total_s"]
    assert result["samples_per_s"] == pytest.approx(200 * 96 / result["train_s"], rel=0.01)
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == list(range(20, 201, 20))
    assert [line["step"] for line in metrics(run_dir) if "val/loss" in line] == [100, 200]
    assert (run_dir / "checkpoints/last").resolve().name == "step_00000200"
    assert json.loads((run_dir / "run.json").read_text())["batch_plan"]["world_size"] == 2
    assert all((run_dir / f"logs/rank_{rank:05d}.log").read_text() for rank in range(2))
    (offline,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert offline.stem == f"run-{json.loads((run_dir / 'status.json').read_text())['wandb_id']}"
    check_recorded(offline.parent, run_dir, result)
    assert not [path for path in run_dir.rglob(".*") if path.name != ".lock"], "temporary files left behind"


def check_recorded(offline: Path, run_dir: Path, result: dict[str, Any]) -> None:
    """Check what W&B itself reads in its file."""
    output = run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(offline)], run_dir).stdout
    records = [json.loads(line) for line in output.splitlines()]
    history = [each["history"]["item"] for each in records if each["type"] == "history"]
    mirrored = {(key, line["step"]): value for line in history for key, value in line.items() if "/" in key}
    ours = {(key, line["step"]): value for line in metrics(run_dir) for key, value in line.items() if "/" in key}
    assert {name: value for name, value in mirrored.items() if not name[0].startswith("pictures/")} == ours
    # Each picture is recorded exactly, and named in the last line of history.
    for name in ("curves", "confusion", "mistakes"):
        (media,) = offline.glob(f"files/media/images/pictures/{name}_200_*.png")
        with Image.open(media) as theirs, Image.open(run_dir / f"pictures/{name}.png") as mine:
            assert theirs.convert("RGB").tobytes() == mine.convert("RGB").tobytes()
        assert mirrored[f"pictures/{name}.filenames", 200] == [str(media.relative_to(offline / "files"))]
    summary: dict[str, Any] = {}
    for each in records:
        summary |= each.get("summary", {}).get("update", {})
    assert summary["test/accuracy"] == result["test/accuracy"]
    assert summary["best/step"] == result["best/step"]
    by_class = summary["test/accuracy_by_class"]
    assert by_class == result["test/accuracy_by_class"]
    assert by_class.keys() == set("0123456789")
    (artifact,) = [each["artifact"] for each in records if each["type"] == "artifact"]
    assert (artifact["type"], set(artifact["aliases"])) == ("model", {"latest", "best"})
    (best,) = artifact["manifest"]["contents"]
    assert Path(best["local_path"]) == (run_dir / "checkpoints/best").resolve() / "model.safetensors"


def test_tutorial_bundle_runs_unchanged(tmp_path: Path) -> None:
    """The two files of seed 000 in a zip (test_bundle.py: in a folder), no settings, no network, two processes."""
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in BUNDLE.glob("*.py"):
            archive.write(file, file.name)
    (tmp_path / "bundle.yaml").write_text(f"data: {{bundle: {path}}}\nmodel: {{bundle: {path}}}\n")
    options = ["-o", "eval_every=0", "-q", "--run-name", "r"]
    done = run_forked([*DIST_TRAIN, "train", "-c", "bundle.yaml", *SHORT, *options], tmp_path, world_size=2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/r/result.json").read_text())
    assert result["val_source"] == "UserValDataset"
    assert result["val/seen"] == 10_000
    assert result["val/accuracy"] > 0.5


def test_progress_bar_on_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*DIST_TRAIN, "train", "-c", "smoke", *SHORT, "--run-name", "r"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert "60/60" in text
    assert re.search(r"epoch 0\.10 \S+ 60/60 loss \d\.\d{4}  [\d.]+%  lr 1\.0e-03  [\d,]+/s 0:00:00", text)
    rows = [line.split() for line in text.splitlines() if re.fullmatch(r" +(epoch|\d\.\d\d) .*", line.rstrip())]
    assert " ".join(rows[0]) == "epoch step train loss train acc val loss val acc seconds"
    lines: dict[int, dict[str, Any]] = {30: {}, 60: {}}
    for line in metrics(tmp_path / "runs/r"):
        lines.get(line["step"], {}).update(line)
    assert [row[1:6] for row in rows[1:]] == [
        [
            f"{step}",
            f"{line['train/loss']:.4f}", f"{line['train/accuracy']:.2%}",
            f"{line['val/loss']:.4f}", f"{line['val/accuracy']:.2%}",
        ]
        for step, line in lines.items()
    ]  # fmt: skip
    logs = "".join(path.read_text() for path in (tmp_path / "runs/r/logs").glob("*.log"))
    assert "\x1b" not in logs


def test_wheel_works_outside_source_tree(tmp_path: Path) -> None:
    """Built from the tree, with nothing else on the path: it contains MNIST and the configs."""
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert not shutil.which("dist_train", path=str(tmp_path))
    command = [sys.executable, "-m", "dist_train", "train", "-c", "mnist", "--fast-dev-run", "--run-name", "r", "-q"]
    data = tmp_path / "data"
    done = run(command, tmp_path, PYTHONPATH=str(tmp_path / "site"), DIST_TRAIN_DATA_DIR=str(data))
    assert done.returncode == 0, done.stderr
    code = "import dist_train; print(dist_train.__file__)"
    where = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert where.stdout.strip().startswith(str(tmp_path / "site"))
    assert (data / "MNIST/raw/train-images-idx3-ubyte").exists()


def test_help_is_fast_and_needs_no_torch(tmp_path: Path) -> None:
    """Under 0.2 s is measured by hand (docs/benchmarks.md). It requires that torch and pydantic are not imported."""
    code = (
        "import sys\nfrom dist_train.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pydantic', 'accelerate', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


SMALL = {
    "data": {"name": "support.user_sets:Jittered"},
    "model": {"name": "support.user_sets:WithDropout"},
    "global_batch_size": 16,
    "log_every": 5,
}


def test_net_that_does_not_fit_data_is_reported_with_file_and_line(tmp_path: Path) -> None:
    body = "    def forward(self, images):\n        return super().forward(images)\n"
    (tmp_path / "mine.py").write_text(f"from torch import nn\nclass Net(nn.Linear):\n{body}")
    command = [*DIST_TRAIN, "train", "-c", "smoke", "-o", "model.name=mine:Net", "--run-name", "r"]
    done = run_forked([*command, "-o", "model.args={in_features: 10, out_features: 10}"], tmp_path)
    assert done.returncode != 0
    assert f"error: Net failed on its first batch: {tmp_path / 'mine.py'}:4: RuntimeError: mat1 and mat2" in done.stderr
    assert "Traceback" not in done.stderr


def own(**settings: Any) -> dict[str, Any]:
    common = {"data": {"name": "support.user_sets:mnist_part"}, "global_batch_size": 96, "final_train_eval": False}
    return common | {"train_for": "10 steps", "log_every": 1, "eval_every": "10 steps"} | settings


def test_user_code_that_draws_from_any_generator_is_seeded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_on_ranks(own(model={"name": "support.user_nets:Drawing"}), tmp_path / name)
    assert train_losses(tmp_path / "a") == train_losses(tmp_path / "b")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_net_trains_without_targets(num_workers: int, tmp_path: Path) -> None:
    data = {"name": "support.user_sets:Unlabelled", "num_workers": num_workers}
    settings = own(model={"name": "support.user_nets:Encoding"}, data=data, global_batch_size=32)
    train_on_ranks(settings, tmp_path / "r", world_size=2 - num_workers)
    losses = train_losses(tmp_path / "r")
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "r/result.json").read_text())["test/seen"] == 101


def test_infinite_mask_is_not_divergence(tmp_path: Path) -> None:
    train_on_ranks(own(model={"name": "support.user_nets:Masked"}, ema_decay=0.9), tmp_path / "r")
    mask = weights(tmp_path / "r")["mask"]
    assert (mask.isneginf().sum(), mask.isnan().sum()) == (6, 0)


def test_averaged_weights_are_evaluated_with_their_own_loss(tmp_path: Path) -> None:
    train_on_ranks(own(model={"name": "support.user_nets:OwnLoss"}, ema_decay=0.9), tmp_path / "r")
    result = json.loads((tmp_path / "r/result.json").read_text())
    done = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path)
    assert json.loads(done.stdout)["loss"] == pytest.approx(result["test/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": {"name": "support.user_nets:Frozen"}}, "Frozen has no parameter that requires a gradient"),
        (
            {"model": {"name": "support.user_nets:Extra"}},
            r"Extra\.state_dict\(\) holds _extra_state, which is not a tensor",
        ),
        (
            {"data": {"name": "support.user_nets:negative"}},
            "Example 3 of ImageSet has label -100, but Mlp has 10 classes, 0 to 9.",
        ),
    ],
)
def test_nets_and_labels_that_cannot_be_trained_are_rejected(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=expected):
        train_on_ranks(own(**settings), tmp_path / "r")


def finish_before_lock(run_dir: Path) -> None:
    """Finish the run between the check of the state and the lock."""
    lock = RunDir.lock

    def finish_then_lock(self: RunDir) -> None:
        write_json(self.status.path, {"state": "FINISHED", "attempt": 1})
        write_json(self.result, {"step": 7})
        lock(self)

    RunDir.lock = finish_then_lock  # type: ignore[method-assign]
    assert train_here(SMALL, run_dir) == "FINISHED"


def test_run_finished_by_another_start_is_not_changed(tmp_path: Path) -> None:
    run_on_ranks(finish_before_lock, tmp_path, world_size=1)
    assert RunDir(tmp_path).status.read() == {"state": "FINISHED", "attempt": 1}
    assert RunDir(tmp_path).read_result() == {"step": 7}


def test_diverged_runs_stop_and_save_only_finite_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom dist_train.models.nets import Mlp\n"
        "class Net(Mlp):\n"
        "    calls = 0\n"
        "    def forward(self, images):\n"
        "        Net.calls += self.training\n"
        "        return super().forward(images) * (float('nan') if Net.calls > 40 else 1)\n"
    )
    common = [*DIST_TRAIN, "train", "-c", "smoke", "-q", "-o", "model.name=mine:Net"]
    done = run_forked([*common, "-o", "save_every=10", "-o", "log_every=15", "--run-name", "r"], tmp_path, world_size=2)
    assert done.returncode == 1
    message = json.loads((tmp_path / "runs/r/error.json").read_text())["message"]
    assert re.search(r"not finite between step (31 and 40|31 and 45)", message), message
    assert re.search("step_000000[23]0", message), message  # that of step 30 may still be being written
    assert [path.name for path in (tmp_path / "runs/r/checkpoints").glob("step_*")] != []
    assert max((tmp_path / "runs/r/checkpoints").glob("step_*")).name == "step_00000030"


def test_training_accuracy_of_first_tutorial(tmp_path: Path) -> None:
    """One of its three epochs shows that net, data and optimizer are right: about 94 %."""
    command = [*DIST_TRAIN, "train", "-c", "mnist_mlp", "-o", "train_for=1 epochs", "-q", "--run-name", "r"]
    assert run_forked(command, tmp_path).returncode == 0
    result = json.loads((tmp_path / "runs/r/result.json").read_text())
    assert 0.93 < result["test/accuracy"] < 0.97
    assert result["train/seen"] == 60_000


def test_loss_in_bf16_is_not_rounded_to_bf16(tmp_path: Path) -> None:
    """With averaged weights, which Accelerate has not prepared; in the run and in `evaluate`."""
    train_on_ranks(own(model={"name": "mlp"}, ema_decay=0.9, mixed_precision="bf16"), tmp_path / "r")
    ours = json.loads((tmp_path / "r/result.json").read_text())["test/loss"]
    saved, test = TrainedNet.open(tmp_path / "r", "last"), mnist_part(train=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = saved.net(test.images / 255)
    assert logits.dtype == torch.bfloat16
    assert ours == pytest.approx(float(functional.cross_entropy(logits.double(), test.labels)), rel=1e-6)
    done = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path, ACCELERATE_MIXED_PRECISION="fp16")
    assert json.loads(done.stdout)["loss"] == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize(("recorded", "exported"), [("no", "bf16"), ("fp16", "fp16")])
def test_evaluation_uses_precision_of_run(recorded: str, exported: str, tmp_path: Path) -> None:
    """A net trained in fp16 can be evaluated on a CPU."""
    train_on_ranks(own(model={"name": "mlp"}), tmp_path / "r")
    facts = read_json(tmp_path / "r/run.json")
    write_json(tmp_path / "r/run.json", facts | {"mixed_precision": recorded})
    done = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path, ACCELERATE_MIXED_PRECISION=exported)
    assert done.returncode == 0, done.stderr
    ours = read_json(tmp_path / "r/result.json")["test/loss"]
    assert json.loads(done.stdout)["loss"] == pytest.approx(ours, rel=1e-6)
