"""Mistakes of newcomers on the command line: one line that names the fix, before a step, and nothing is left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from support.processes import DIST_TRAIN
from support.ranks import run_forked
from support.trainings import SETTINGS

CODE = """
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
    def forward(self, images):
        return self.layer(images.flatten(1))

class Pair(Linear):
    def forward(self, images):
        return super().forward(images), images
class Dictionary(Linear):
    def forward(self, images):
        return {"logits": super().forward(images)}
class Five(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 5))
class Shape(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(100, 10))
class Needs(nn.Module):
    def __init__(self, hidden):
        super().__init__()
class NoSuper(nn.Module):
    def __init__(self):
        self.layer = nn.Linear(784, 10)
class PlainList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(784, 10)]
    def forward(self, images):
        return self.layers[0](images.flatten(1))
class Lightning(Linear):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
net = Linear()
def number():
    return 3

class Floats(Dataset):
    classes = list("abcdefghij")
    def __len__(self):
        return 600
    def __getitem__(self, index):
        return torch.zeros(1, 28, 28), self.target(index)
    def target(self, index):
        return float(index % 10)
class Strings(Floats):
    def target(self, index):
        return "cat"
class Large(Floats):
    def target(self, index):
        return index
class Negative(Floats):
    def target(self, index):
        return -1
class Pillow(Floats):
    def __getitem__(self, index):
        return Image.new("L", (28, 28)), 0
class Unequal(Floats):
    def __getitem__(self, index):
        return torch.zeros(1, 28 + index % 2, 28), 0
class Broken(Floats):
    def __getitem__(self, index):
        raise OSError("no file")
class Empty(Floats):
    def __len__(self):
        return 0
class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 28, 28), 0
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train", "No config. Name one, for example -c mnist."),
        ("train smoke", "No config. Did you mean -c smoke?"),
        ("train -c smok", "No config file smok. Did you mean smoke?"),
        ("train -c smoke --lr 0.1", "No option --lr. Did you mean -o optimizer.lr=VALUE?"),
        ("train -c smoke --epochs 3", 'No option --epochs. Did you mean -o train_for="N epochs"?'),
        ("train -c smoke --gpus 2", "No option --gpus. Did you mean --nproc?"),
        ("launch -c smoke --num-processes 2", "No option --num-processes. Did you mean --nproc?"),
        ("train -c smoke --zzz", "No option --zzz. main train --help lists all."),
        ("train -c smoke lr=0.1", "Unknown setting lr. Did you mean optimizer.lr?"),
        ("train -c smoke epochs=3", 'Unknown setting epochs. Did you mean train_for="N epochs"?'),
        ("train -c smoke train_for=3", "train_for=3: 3 epochs or 3 steps? Write the unit."),
        ("train -c smoke batch_size=64", "Unknown setting batch_size. Did you mean global_batch_size?"),
        ("train -c smoke bf16=true", "Unknown setting bf16. Did you mean mixed_precision?"),
        ("train -c smoke optimizer.lr", '"optimizer.lr" is not a setting. Write it as key=value'),
        ("train -c smoke optimizer=adam", "Did you mean optimizer.name=adam?"),
        ("train -c smoke optimizer.name=Adam", "Did you mean adam?"),
        ("train -c smoke data.augment=true", "data.augment is a section. Its settings: data.augment.shift, data.a"),
        ("train -c smoke device=gpu", "Did you mean cuda?"),
        ("train -c smoke tracking.wandb=off", "Did you mean disabled?"),
        ("train -c smoke --nproc 2 global_batch_size=97", "is not a multiple of world_size=2 (2 x 48 = 96)."),
        ("train -c smoke --resume nothing", "--resume=nothing has no config.yaml, so it is not a run."),
        ("train -c smoke --init-from nothing", "--init-from=nothing has no config.yaml, so it is not a run."),
    ],
)
def test_mistake_on_command_line(
    arguments: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments.split())
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.name=resnet18", "no such net. Did you mean torchvision:resnet18?"),
        ("model.name=mine", "name the class in mine.py too, model.name=mine:NAME."),
        ("model.name=mine.py:Pair", "name the module, not its file. Did you mean mine:Pair?"),
        ("model.name=mine:Pear", "has no Pear. Found: Linear (line 7), "),
        ("model.name=mine:net", "is of type Linear, not a class or function that returns a net."),
        ("model.name=mine:number", "returns a int, not a torch.nn.Module."),
        ("model.name=mine:Needs", "needs hidden. Set model.args.hidden=VALUE."),
        ("model.name=mine:NoSuper", "cannot assign module before Module.__init__() call"),
        ("model.name=mine:PlainList", "PlainList has no parameter that requires a gradient: nothing to train."),
        ("model.name=mine:Lightning", "Lightning.configure_optimizers is not called: optimizer and schedule are se"),
        ("model.name=mine:Pair", "but cross-entropy needs logits [B, K > 1]. Return only the logits, or give Pair "),
        ("model.name=mine:Dictionary", "Dictionary returns {logits: float32 [96, 10]}, but cross-entropy needs log"),
        ("model.name=mine:Five", "but Five has 5 classes, 0 to 4. Number the labels from 0, or give the net more ou"),
        ("model.name=mine:Shape", "mat1 and mat2 shapes cannot be multiplied (96x784 and 100x10)"),
        ("data.name=imagenet", "is not a known data set. Did you mean image_folder?"),
        ("data.name=mine", "name the class in mine.py too, data.name=mine:NAME."),
        ("data.name=mine:Floats", "The targets are float64 [96], but cross-entropy of float32 [96, 10] needs labels"),
        ("data.name=mine:Strings", "The targets are (str, str, str, str, ...), but cross-entropy"),
        ("data.name=mine:Large", "but Mlp has 10 classes, 0 to 9. Number the labels from 0, or give the net more ou"),
        ("data.name=mine:Negative", "has label -1, but Mlp has 10 classes, 0 to 9."),
        ("data.name=mine:Pillow", "Make each example (image tensor [C, H, W], label)"),
        ("data.name=mine:Unequal", "Return tensors of one shape from __getitem__"),
        ("data.name=mine:Broken", "Example 0 of Broken cannot be made: "),
        ("data.name=mine:Empty", "The train set holds no examples."),
        ("data.name=mine:Stream", "needs a map-style data set with __len__ and __getitem__"),
    ],
)
def test_mistake_in_code(setting: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    done = run_forked([*DIST_TRAIN, "train", *SETTINGS, setting], tmp_path)
    assert done.returncode in (1, 2)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert expected in line
    assert not re.search("checkpoint|Traceback", done.stderr)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("__")] == ["mine.py"]
