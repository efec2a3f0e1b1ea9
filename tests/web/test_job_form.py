"""The form of a new job: what it shows reads back as the same settings, and each mistake is told at its field."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.loading import bundled_configs, load_config, parse_config
from dist_train.config.schema import Config
from dist_train.models.nets import Bks
from dist_train.runs.start_options import free_name
from dist_train.user_code import library
from dist_train.user_code.library import Kind
from dist_train.web.job_fields import FIELDS, LABELS, LINES, nearest_config, texts_of
from dist_train.web.job_form import Checked, check
from support.page import write_run
from support.processes import DIST_TRAIN, ROOT
from support.run_files import status

BASE = "mnist_bks"
BUNDLE = ROOT / "tests/bundles/mnist_bks"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The usual folder of runs, and an empty library."""
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def filled(runs: Path, **texts: str) -> Checked:
    """Return what the form means that shows BASE, with other texts in some fields; __ stands for a dot."""
    changes = {name.replace("__", "."): text for name, text in texts.items()}
    assert set(changes) <= {*LABELS}
    return check({**texts_of(load_config(BASE), BASE), "name": "job", **changes}, runs)


def settings_of(runs: Path, **texts: str) -> Config:
    found = filled(runs, **texts)
    assert found.job is not None, found.errors
    return found.job.config


@pytest.mark.parametrize("base", [BASE, "smoke", "mnist"])
@pytest.mark.parametrize("name", bundled_configs())
def test_each_config_reads_back_as_it_was_shown(name: str, base: str, runs: Path) -> None:
    config = load_config(name)
    found = check({**texts_of(config, base), "name": "job"}, runs)
    assert found.job is not None, found.errors
    assert found.job.config == config


def test_settings_without_field_read_back_too(runs: Path) -> None:
    config = parse_config({
        "seed": 5, "train_for": "600 steps", "keep_every": "2 epochs", "max_grad_norm": 1.5,
        "data": {"name": "own:Set", "root": "/a: b/ü #1", "args": {"x": [1, "1e-3"]}, "val_examples": 7},
        "model": {"name": "torchvision:resnet18", "args": {"width": "no"}},
        "optimizer": {"name": "sgd", "momentum": 0.9, "lr": 1e-5}, "early_stop": {"patience": 3},
        "tracking": {"tags": ["a b", "c, d"], "name": "not set"},
    })  # fmt: skip
    for base in (BASE, "cifar10_resnet18", nearest_config(config)):
        texts = texts_of(config, base)
        assert {texts["model"], texts["loader"], texts["dataset"]} == {"torchvision:resnet18", "own:Set", "/a: b/ü #1"}
        (runs.parent / "own.py").write_text("class Set: pass\n")
        found = check({**texts, "name": "job"}, runs)
        assert found.job is not None, found.errors
        assert found.job.config == config


def test_nearest_config_is_one_that_run_began_with() -> None:
    for name in bundled_configs():
        assert nearest_config(load_config(name, ["optimizer.lr=0.123", "seed=9"])) == name


def test_fields_change_their_settings(runs: Path) -> None:
    config = settings_of(
        runs, optimizer__name="rmsprop", optimizer__lr="3e-4", max_grad_norm="1", global_batch_size="96",
        train_for="2", keep_every="5", model="mlp", loader="fashion_mnist", nproc="3",
    )  # fmt: skip
    assert (config.optimizer.name, config.optimizer.lr, config.max_grad_norm) == ("rmsprop", 3e-4, 1.0)
    assert (config.global_batch_size, str(config.train_for), str(config.keep_every)) == (96, "2 epochs", "5 epochs")
    assert (config.model.name, config.data.name) == ("mlp", "fashion_mnist")
    assert config.data.normalize is None  # that of the config belongs to its own set
    assert str(settings_of(runs, train_for="600 steps").train_for) == "600 steps"
    assert settings_of(runs, lines="optimizer.lr=0.5\n\n seed = 7 ").seed == 7  # wins over the field
    assert settings_of(runs, lines="optimizer.lr=0.5").optimizer.lr == 0.5
    assert settings_of(runs, lines="optimizer.name=torch.optim:NAdam").optimizer.own_step
    assert settings_of(runs, config="mnist", optimizer__name="sgd").optimizer.betas is None  # so do those of adam
    assert settings_of(runs, model="mlp", lines="model.args.hidden=9").model.args == {"hidden": 9}


MISTAKES = [
    ({"optimizer__lr": "abc"}, "optimizer.lr", "optimizer.lr=abc: input should be a valid number"),
    ({"optimizer__lr": ""}, "optimizer.lr", "optimizer.lr=None: input should be a valid number"),
    ({"optimizer__lr": "["}, "optimizer.lr", 'The value of "optimizer.lr=[" is not YAML'),
    ({"lines": "optimizer.name=form_nets:Nett"}, LINES, "has no Nett. Did you mean Net?"),
    ({"lines": "optimizer.name=timm:lamb\nstep_mode=compile"}, LINES, "optimizer.name=timm:lamb takes its own step"),
    ({"optimizer__name": "adamm"}, "optimizer.name", "optimizer.name=adamm: no such optimizer. Did you mean adam?"),
    ({"max_grad_norm": "-1"}, "max_grad_norm", "max_grad_norm=-1: input should be greater than 0"),
    ({"train_for": "soon"}, "train_for", 'write a number and a unit: "3 epochs"'),
    ({"train_for": "30 s"}, "train_for", "train_for=30 s: write it in steps or epochs"),
    ({"train_for": "0"}, "train_for", "train_for=0 epochs trains nothing"),
    ({"global_batch_size": "63.5"}, "global_batch_size", "global_batch_size=63.5: "),
    ({"nproc": "3"}, "global_batch_size", "not a multiple of world_size=3 (3 x 21 = 63). World sizes that fit: 1, 2"),
    ({"nproc": "two"}, "nproc", "--nproc=two: write a whole number, 1 or more"),
    ({"nproc": "0"}, "nproc", "--nproc=0: "),
    ({"name": ""}, "name", "--run-name is empty"),
    ({"name": "../up"}, "name", "--run-name='../up'"),
    ({"name": "a" * 250}, "name", "at most 220 bytes"),  # or the bin could not take it
    ({"name": "taken"}, "name", "there is a run of this name. Use taken-2."),
    ({"config": "mnist_bkz"}, "config", "Did you mean mnist_bks?"),
    ({"model": "bsk"}, "model", "model.name=bsk: no such net. Did you mean bks?"),
    ({"model": "none/1-0"}, "model", "There is no none among the models"),
    ({"loader": "mnits"}, "loader", "data.name=mnits is not a known data set. Did you mean mnist?"),
    ({"loader": "emnist"}, "loader", "data.name=emnist needs data.split"),
    ({"dataset": "/nowhere"}, None, ""),  # it is made when the job runs
    ({"dataset": "mnist-emtpy"}, "dataset", "There is no mnist-emtpy among the datasets"),
    ({"weights": "/nowhere.pth"}, "weights", "model.weights=/nowhere.pth: no such file"),
    ({"weights": "none"}, "weights", "There is no none among the models"),
    ({"val_loader": "mnits"}, "val_loader", "There is no mnits among the loaders"),
    ({"val_loader": "/nowhere"}, "val_loader", "data.val_bundle=/nowhere goes with a data.bundle"),
    ({"val_dataset": "/x", "lines": "data.val_examples=5"}, LINES, "is a validation set of its own"),
    ({"lines": "optimizer.learning_rate=1"}, LINES, "Did you mean optimizer.lr?"),
    ({"lines": "optimizer.momentum=0.9"}, LINES, "adam has no momentum"),
    ({"lines": "momentum"}, LINES, '"momentum" is not a setting.'),
    ({"lines": "seed=["}, LINES, 'The value of "seed=[" is not YAML'),
    ({"lines": "optimizer.lr=x"}, LINES, "optimizer.lr=x: "),  # where it was typed
    ({"lines": "model.name=bsk"}, LINES, "Did you mean bks?"),
    ({"lines": "model.name=form_netss:Net"}, LINES, "no module form_netss, neither in "),
    ({"lines": "model.name=form_nets:Nett"}, LINES, "form_nets.py has no Nett. Did you mean Net?"),
    ({"lines": "model.name=form_nets:Other"}, None, ""),  # it may come from the module that is imported there
    ({"lines": "model.name=broken:Net"}, LINES, "broken.py:2: SyntaxError"),
    ({"lines": "data.name=form_nets:Sett"}, LINES, "form_nets.py has no Sett. Did you mean Set?"),
    ({"lines": "model.bundle=/nowhere"}, LINES, "model.bundle=/nowhere: no such file or folder"),
    ({"lines": "data.sampling=balance"}, LINES, "data.sampling=balance: input should be 'shuffled' or 'balanced'"),
    ({"lines": "data.sample_weights=/nowhere.npy"}, LINES, "data.sample_weights=/nowhere.npy: no such file"),
    ({"lines": "data.transforms=[RandAugmet]"}, LINES, "torchvision has no transform RandAugmet of one image. Did you"),
    ({"lines": "data.augment.mixup=0.2"}, LINES, "Did you mean data.augment.mixup_alpha?"),
    ({"lines": "data.augment={shift: 2, scale: [0.3, 1]}"}, LINES, "both choose a part; keep one of them"),
    ({"lines": "runs_dir=/x"}, LINES, "runs_dir is the folder that this page shows"),
    ({"where": "here"}, "where", "where=here: write local or slurm."),
    ({"where": "slurm", "time": "soon"}, "time", "--time=soon is not a time limit"),
    ({"where": "slurm", "time": "1"}, "time", "no time to train is left"),
    ({"where": "slurm", "nodes": "x"}, "nodes", "--nodes=x: "),
    ({"where": "slurm", "per_node": "3"}, "global_batch_size", "not a multiple of world_size=3"),
    ({"where": "slurm", "per_node": "2", "gpus_per_node": "1"}, "gpus_per_node", "Request them with --gpus-per-node=2"),
    ({"where": "slurm", "partition": "a\nb"}, "partition", "contains a control character"),
    ({"where": "slurm", "loader": "cifar10"}, "loader", "Fetch it here first: dist-train data fetch cifar10"),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "field", "message"), MISTAKES, ids=[str(each[0])[:60] for each in MISTAKES])
def test_mistake_is_told_at_its_field(texts: dict[str, str], field: str | None, message: str, runs: Path) -> None:
    write_run(runs, "taken")
    (runs.parent / "form_nets.py").write_text("from elsewhere import Other\nclass Net: pass\nclass Set: pass\n")
    (runs.parent / "broken.py").write_text("\nclass Net(:\n")
    found = filled(runs, **texts)
    assert list(found.errors) == ([field] if field else [])
    assert message in found.errors.get(field or "", "")
    assert (found.job is None) is bool(field)


def test_all_mistakes_are_told_at_once(runs: Path) -> None:
    found = filled(
        runs, name="a b", optimizer__lr="[", train_for="x", global_batch_size="y", nproc="z",
        lines="foo\nseed=1\nno_such=2\noptimizer.lrr=3", model="none/",
    )  # fmt: skip
    assert found.job is None
    assert set(found.errors) == {
        "name", "optimizer.lr", "train_for", "global_batch_size", "nproc", LINES, "model"
    }  # fmt: skip
    assert len(found.errors[LINES].splitlines()) == 3
    assert set(found.errors) <= set(LABELS)


NASTY = ["", "\0", "a\0b", "/", "~", "~no-such-user/x", "..", "a/b/c", "/etc", "/etc/passwd", "x:y", "os.path:no",
         "__main__:x", "torch.nn:Foo", "torchvision:", "a:b:c", ":", "a=b", "[", "{", "- a", "null", "&a [*a]", "1e999",
         "nan", "-1", "9" * 400, "0x" + "f" * 5000, "é" * 300, "a" * 3000, "1 epochs", "!!python/object:os.system x",
         "<<: 1", "a\nb", "12:30:00", "\u2028", "\u0661"]  # fmt: skip
KEYS = ["model.name", "data.name", "model.bundle", "data.bundle", "data.val_bundle", "model.weights", "seed", "data",
        "optimizer", "optimizer.betas", "runs_dir", "data.normalize", "", "..", "a.b.c", "model.args"]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, pytest.param(range(2, 40), marks=pytest.mark.full)])
def test_no_text_breaks_form(seed: int | range, runs: Path) -> None:
    for each in [seed] if isinstance(seed, int) else seed:
        rng = Random(each)
        for _ in range(80):
            lines = (f"{rng.choice(KEYS)}{rng.choice(['=', '', ' = '])}{rng.choice(NASTY)}" for _ in range(2))
            texts = {name: rng.choice(NASTY) for name in rng.sample(list(LABELS), 2)}
            found = filled(runs, **texts | {LINES: "\n".join(lines) if rng.random() < 0.5 else ""})
            assert (found.job is None) is bool(found.errors)
            assert found.errors.keys() <= LABELS.keys()


def test_names_are_free(runs: Path) -> None:
    assert free_name("bks", runs) == "bks-1"
    write_run(runs, "bks-1")
    write_run(runs, "bks-3")
    assert free_name("bks", runs) == free_name("bks-1", runs) == free_name("bks-3", runs) == "bks-2"
    assert free_name("lr1e-3", runs) == "lr1e-3-1"
    for odd in (".", 'my "run" (2)', "\u00fc" * 150, "a" * 255):  # an old run may have any name
        assert not filled(runs, name=free_name(odd, runs)).errors


# --- the library -----------------------------------------------------------------------------------------------------


def bundle(folder: Path, **sources: str) -> Path:
    folder.mkdir()
    for name, text in sources.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_uploaded_model_loader_and_data_set(runs: Path, tmp_path: Path) -> None:
    model = library.add_folder(Kind.MODELS, "bks", BUNDLE)
    loader = library.add_folder(Kind.LOADERS, "mnist", BUNDLE)
    empty = library.add_empty("mnist-empty")
    for version in (f"/{model.version}", "/"):
        config = settings_of(runs, model=f"bks{version}", loader="mnist/", dataset="mnist-empty")
        assert (config.model.bundle, config.data.bundle, config.data.root) == (model.path, loader.path, empty.path)
        assert (config.data.name, config.data.normalize) == ("mnist", None)
    other = settings_of(runs, loader="mnist/", val_loader="mnist/", val_dataset="mnist-empty", dataset="/elsewhere")
    assert (other.data.val_bundle, other.data.val_root) == (loader.path, empty.path)
    held_out = settings_of(runs, lines="data.val_examples=9")
    texts = {**texts_of(held_out, BASE), "name": "job", "val_dataset": "mnist-empty"}
    assert texts[LINES] == "data.val_examples=9"
    texts = texts_of(config, BASE)
    chosen = (f"bks/{model.version}", f"mnist/{loader.version}", f"mnist-empty/{empty.version}")
    assert (texts["model"], texts["loader"], texts["dataset"], texts[LINES]) == (*chosen, "")
    assert settings_of(runs, model="bks").model.bundle is None  # ours, of the same name
    assert "bks, version 1, was uploaded without weights" in filled(runs, weights="bks/").errors["weights"]


def test_weights_of_uploaded_model(runs: Path, tmp_path: Path) -> None:
    torch.save(Bks().state_dict(), tmp_path / "bks.pth")
    version = library.add_folder(Kind.MODELS, "bks", BUNDLE, weights=tmp_path / "bks.pth")
    text = f"bks/{version.version}"
    config = settings_of(runs, model=text, weights=text)
    assert config.model.weights == version.weights
    assert texts_of(config, BASE)["weights"] == text


def test_mistake_in_uploaded_code_is_told_at_its_field(runs: Path, tmp_path: Path) -> None:
    source = "from torch import nn\n\n\nclass UserModel(nn.Module):\n    def forward(self, x): ...\n\n    def los(self, output, target): ...\n"  # noqa: E501
    library.add_folder(Kind.MODELS, "wrong", bundle(tmp_path / "m", bks_model=source))
    found = filled(runs, model="wrong/")
    assert list(found.errors) == ["model"]
    assert "bks_model.py:4 UserModel has no method loss(output, target). Did you mean los?" in found.errors["model"]


def test_checking_runs_no_code_and_imports_no_torch(runs: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    code = f"open({str(written)!r}, 'w')\nclass UserModel: pass\nclass Net: pass\n"
    library.add_folder(Kind.MODELS, "evil", bundle(tmp_path / "evil", bks_model=code))
    (tmp_path / "evil_net.py").write_text(code)
    script = f"""
import sys
from pathlib import Path
from dist_train.config.loading import load_config
from dist_train.web.job_fields import texts_of
from dist_train.web.job_form import check
texts = texts_of(load_config("{BASE}"), "{BASE}") | {{"name": "job"}}
for changes in ({{"model": "evil/"}}, {{"lines": "model.name=evil_net:Net"}}, {{"lines": "data.name=evil_net:Nett"}},
                {{"lines": "model.bundle={tmp_path}/evil"}}, {{}}):
    check({{**texts, **changes}}, Path("runs"))
print(sorted({{"torch", "evil_net", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    assert not written.exists()


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_trains_same_run(runs: Path, tmp_path: Path) -> None:
    library.add_folder(Kind.MODELS, "bks", BUNDLE)
    texts = {"model": "bks/", "train_for": "2 steps", "optimizer__lr": "3e-4", "name": "a=1,b",
             "lines": "eval_every=0\ntracking.tags=[it's, 'a b']\nfinal_train_eval=false\nseed=4"}  # fmt: skip
    job = filled(runs, **texts).job
    assert job is not None
    words = shlex.split(job.command)
    assert words[:6] == ["dist-train", "train", "-c", BASE, "--nproc", "1"]
    assert words[-2:] == ["--run-name", "a=1,b"]
    assert len(words) - 8 == 7  # only what differs from the config
    done = subprocess.run([*DIST_TRAIN, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_config(str(runs / "a=1,b" / "config.yaml")) == job.config
    assert status(runs / "a=1,b") == "FINISHED"


def test_command_names_folder_if_it_is_not_usual_one(runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    found = filled(elsewhere)
    assert found.job is not None
    assert f"'runs_dir={elsewhere}'" in found.job.command
    again = filled(elsewhere, lines="seed=3").job
    assert again is not None
    texts = texts_of(again.config, BASE)
    assert texts[LINES] == "seed=3"  # not in the form


def test_command_submits_same_script(runs: Path) -> None:
    job = filled(runs, where="slurm", nodes="2", per_node="2", time="1:00:00", partition="low", train_for="1").job
    assert job is not None
    assert job.script is not None
    words = shlex.split(job.command)
    assert words[:3] == ["dist-train", "slurm", "submit"]
    shown = CliRunner().invoke(main, ["slurm", "render", *words[3:]])
    assert shown.exit_code == 0, shown.output
    assert shown.output == job.script.render()
    assert os.fspath(runs) not in shown.output
    assert set(FIELDS) <= set(LABELS)
