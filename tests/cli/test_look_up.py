"""`config validate` and `--dry-run` look up net and data set, without running code whose source defines the name."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from support.processes import DIST_TRAIN
from support.ranks import run_forked

RUN = "raise RuntimeError('this was run')\n"
MODULES = {
    "shown.py": f"{RUN}class Net: ...\ndef make(): ...\nSet = make\n",
    "hidden.py": "globals()['Net'] = int\n",
    "failing.py": RUN,
    "broken.py": "class Net(:\n",
}
BUNDLE = f"{RUN}class UserModel: ...\nclass UserDataset: ...\n"


@pytest.fixture(autouse=True)
def _code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bundle").mkdir()
    for name in ("bks_model.py", "bks_dataset.py"):
        (tmp_path / "bundle" / name).write_text(BUNDLE)
    (tmp_path / "for_validation").mkdir()
    (tmp_path / "for_validation/bks_dataset.py").write_text(f"{RUN}class UserValDataset: ...\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


COMMANDS = [["config", "validate"], ["train", "--dry-run"]]


@pytest.mark.parametrize(
    "settings",
    [
        ["model.name=shown:Net"], ["model.name=shown:make"], ["data.name=shown:Set"], ["model.name=hidden:Net"],
        ["model.bundle=bundle", "data.bundle=bundle", "data.normalize=null"], ["model.name=torchvision:resnet18"],
        ["data.bundle=bundle", "data.val_bundle=for_validation", "data.val_root=anywhere", "data.normalize=null"],
        ["data.name=cifar10", "data.normalize=null"],  # it can be fetched
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_existing_names_are_valid(command: list[str], settings: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "-c", "smoke", *settings])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=mlpp", "Did you mean mlp?"),
        ("model.name=nothing:Net", "no module nothing"),
        ("model.name=shown:Nett", "this was run"),  # only an import can tell
        ("model.name=hidden:Nett", "has no Nett"),
        ("model.name=failing:Net", "failing.py:1"),
        ("model.name=broken:Net", "broken.py:1: SyntaxError"),
        ("model.name=torchvision:resnet19", "no such net"),
        ("model.bundle=nowhere", "no such file or folder"),
        ("data.name=mnisst", "Did you mean mnist?"),
        ("data.name=nothing:Set", "no module nothing"),
        ("data.name=image_folder data.image_size=8 data.root=nowhere", "There is no folder"),
        ("data.bundle=bundle data.normalize=null data.val_bundle=nowhere", "data.val_bundle=nowhere: no such file or"),
        (
            "data.bundle=bundle data.normalize=null data.val_bundle=empty",
            "data.val_bundle=empty: bks_dataset.py is",
        ),
        ("data.name=image_folder data.image_size=8 data.root=pictures data.val_root=nowhere", "Set data.val_root to"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_missing_names_are_reported(command: list[str], setting: str, message: str) -> None:
    found = CliRunner().invoke(main, [*command, "-c", "smoke", *setting.split()])
    assert found.exit_code in (1, 2)
    assert message in found.output
    assert "is fine" not in found.output


def test_fast_dev_run_writes_no_wandb_run(tmp_path: Path) -> None:
    command = [*DIST_TRAIN, "train", "-c", "smoke", "--fast-dev-run", "--run-name=r", "-q"]
    assert run_forked(command, tmp_path, WANDB_MODE="offline").returncode == 0
    assert not (tmp_path / "runs/r/wandb").exists()
