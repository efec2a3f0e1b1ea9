"""user_code.source_check: what loading a bundle would find wrong is found without importing it, and nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.data.sets.bundle import load_dataset_bundle
from dist_train.errors import DistTrainError
from dist_train.models.bundle import load_model_bundle
from dist_train.torchvision_compat import import_torchvision
from dist_train.user_code.source_check import DATASET_FILE, MODEL_FILE, check_source
from support.bundle_files import DATASET, TUTORIAL

import_torchvision()  # here and not in a test: importing it changes the environment

MODEL = """
from torch import nn

class UserModel(nn.Linear):
    def __init__(self, width=2):
        super().__init__(width, 1)
    def loss(self, output, target):
        return (output - target).square().mean()
"""


@pytest.fixture(autouse=True)
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules that a test imports are removed from sys.modules afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def bundle(folder: Path, source: str, **others: str) -> tuple[Path, str]:
    """Write a bundle with `source` as the file that its class belongs to. Returns the folder and that file's name."""
    filename = DATASET_FILE if "UserDat" in source else MODEL_FILE
    (folder / filename).write_text(source)
    for name, text in others.items():
        (folder / f"{name}.py").write_text(text)
    return folder, filename


def is_loaded(folder: Path, filename: str) -> bool:
    """Whether the bundle can be used, as a training finds out by importing it."""
    try:
        if filename == MODEL_FILE:
            load_model_bundle(folder)
        else:
            load_dataset_bundle(folder, folder / "data")
    except DistTrainError:
        return False
    return True


WRONG = [
    (
        MODEL.replace("UserModel", "UserModl"),
        "bks_model.py: class UserModel is missing. Found: UserModl (line 4). Did you ",
    ),
    (
        MODEL.replace("def loss", "def losss"),
        "bks_model.py:4 UserModel has no method loss(output, target). Did you mean losss?",
    ),
    (
        MODEL.replace("output, target)", "output)"),
        "bks_model.py:7 UserModel.loss cannot be called as loss(output, target): ",
    ),
    (MODEL.replace("def loss(self,", "def loss(self, *, weight,"), "bks_model.py:7 UserModel.loss cannot be called as"),
    (
        MODEL.replace("    def loss", "    @staticmethod\n    def loss"),
        "bks_model.py:8 UserModel.loss cannot be called",
    ),
    (
        MODEL.replace("nn.Linear", "object").replace("width, 1", ""),
        "bks_model.py:4 UserModel is not a torch.nn.Module.",
    ),
    (MODEL.replace("(nn.Linear)", ""), "bks_model.py:4 UserModel is not a torch.nn.Module."),
    (MODEL + "    metrics = 3\n", "bks_model.py:4 UserModel has no method metrics(output, target)."),
    (MODEL + "    loss = None\n", "bks_model.py:4 UserModel has no method loss(output, target)."),
    (
        MODEL + "    def metrics(self): pass\n",
        "bks_model.py:9 UserModel.metrics cannot be called as metrics(output, target)",
    ),
    (MODEL.replace("(nn.Linear):", "(nn.Linear:"), "bks_model.py:4 SyntaxError: "),
    (MODEL + "\0", "bks_model.py"),
    ("import nets\nclass UserModel(nets.Net): pass\n", "bks_model.py:2 UserModel has no method loss(output, target)."),
    ("from nets import Nett\n" + MODEL, "bks_model.py:1 nets.py has no Nett. Did you mean Net?"),
    ("import broken\n" + MODEL, "broken.py:3 IndentationError: "),
    ("import indirect\n" + MODEL, "broken.py:3 IndentationError: "),
    (
        DATASET.replace("UserDataset", "UserDatset"),
        "bks_dataset.py: class UserDataset is missing. Found: UserDatset (line 4).",
    ),
    (
        DATASET.replace("collate(self", "colate(self"),
        "bks_dataset.py:4 UserDataset has no method collate(batch). Did you ",
    ),
    (DATASET.replace("__len__", "length"), "bks_dataset.py:4 UserDataset has no method __len__."),
    (DATASET.replace("__getitem__", "get"), "bks_dataset.py:4 UserDataset has no method __getitem__."),
    (
        DATASET.replace("Dataset,", "IterableDataset,").replace("(Dataset)", "(IterableDataset)"),
        "bks_dataset.py:4 UserDataset is an IterableDataset.",
    ),
    (
        DATASET.replace("self, data_path", "self"),
        "bks_dataset.py:5 UserDataset.__init__ cannot be called as __init__(data_path)",
    ),
    (
        DATASET.replace("__init__", "init"),
        "bks_dataset.py:4 UserDataset has no method __init__(data_path). Did you mean init?",
    ),
    (
        DATASET + "class UserValDataset(UserDataset):\n    collate = 5\n",
        "bks_dataset.py:13 UserValDataset has no method collate",
    ),
]
OTHERS = {
    "nets": "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(1, 1)\n",
    "broken": "# a line\nclass Nothing:\nx = 1\n",
    "indirect": "import broken\n",
}


@pytest.mark.parametrize(("source", "problem"), WRONG, ids=[problem[:40] for _, problem in WRONG])
def test_what_loading_refuses_is_found_with_its_line(source: str, problem: str, tmp_path: Path) -> None:
    folder, filename = bundle(tmp_path, source, **OTHERS)
    [found] = check_source(folder, filename).problems
    assert found.startswith(problem)
    assert not is_loaded(folder, filename)


def test_missing_forward_is_found(tmp_path: Path) -> None:
    source = MODEL.replace("nn.Linear", "nn.Module").replace("width, 1", "")
    assert check_source(*bundle(tmp_path, source)).problems == (
        "bks_model.py:4 UserModel has no method forward(input).",
    )


LOSS = "    def loss(self, output, target): return output\n"
RIGHT = [
    MODEL,
    MODEL.replace("self, output, target", "self, *everything"),
    MODEL.replace("output, target)", "output, target, weight=None, *, scale=1, **more)"),
    MODEL.replace("    def loss(self,", "    @staticmethod\n    def loss("),
    MODEL + "    metrics = lambda self, output, target: {}\n",
    # The class or its base comes from another file of the bundle.
    "from whole import UserModel\n",
    "from whole import *\n",
    "from whole import UserModel as Base\nclass UserModel(Base): pass\n",
    "import whole as w\nclass UserModel(w.UserModel): pass\n",
    "import parts.deep\nclass UserModel(parts.deep.UserModel): pass\n",
    "from parts import deep\nUserModel = deep.UserModel\n",
    "from parts.deep import UserModel\n",
    # Names that are bound in other ways.
    "from whole import UserModel as Net\nUserModel = Net\n",
    "from whole import UserModel as Net\ndef make(): return Net\nUserModel = make()\n",
    "from whole import UserModel as Net\nglobals()['UserModel'] = Net\n",
    ("import sys\nfrom whole import UserModel as Net\nsetattr(sys.modules[__name__], 'UserModel', Net)\n"),
    "def make():\n    global UserModel\n    from whole import UserModel\nmake()\n",
    (
        "try:\n"
        "    from nothing_like_it import Base\n"
        "except ImportError:\n"
        "    from whole import UserModel as Base\n"
        "class UserModel(Base): pass\n"
    ),
    "try:\n    from whole import Missing\nexcept ImportError:\n    Missing = None\n" + MODEL,
    "import torch\nif torch.cuda.is_available() or True:\n    from whole import UserModel\n",
    # Methods that come in other ways.
    MODEL.replace("    def loss(self, output, target)", "    @property\n    def other(self)")
    + "UserModel.loss = lambda self, output, target: output\n",
    MODEL.replace("def loss", "def other")
    + "def patch(cls):\n    cls.loss = cls.other\n    return cls\nUserModel = patch(UserModel)\n",
    "def add(cls):\n    cls.loss = lambda self, output, target: output\n    return cls\n"
    + MODEL.replace("class", "@add\nclass").replace("def loss", "def other"),
    MODEL.replace("def loss", "def other") + "    loss = other\n",
    "import torch\n" + MODEL.replace("    def loss", "    @torch.no_grad()\n    def loss"),
    MODEL.replace("    def loss(self, output, target)", "    if True:\n      def loss(self, output, target)"),
    (
        "from torch.optim.swa_utils import AveragedModel\n"
        "from torch import nn\n"
        "class UserModel(AveragedModel):\n"
        "    def __init__(self): super().__init__(nn.Linear(1, 1))\n"
    )
    + LOSS,
    "import torch\nclass Mixin:\n" + LOSS + "class UserModel(Mixin, torch.nn.Flatten): pass\n",
    (
        "import torch.nn as nn\n"
        "from typing import Generic, TypeVar\n"
        "T = TypeVar('T')\n"
        "class Base(nn.Flatten, Generic[T]): pass\n"
        "class UserModel(Base[int]):\n"
    )
    + LOSS,
    "import warnings\n" + MODEL + "    pattern = '\\d'\n",
    # Data sets.
    DATASET,
    DATASET.replace("(Dataset)", ""),
    DATASET + "UserValDataset = UserDataset\n",
    DATASET
    + (
        "class UserValDataset(UserDataset):\n"
        "    def __init__(self, path, split='val'):\n"
        "        super().__init__(path)\n"
    ),
    (
        "from torch.utils.data import TensorDataset as Base, default_collate\n"
        "import torch\n"
        "class UserDataset(Base):\n"
        "    def __init__(self, path): super().__init__(torch.ones(3))\n"
        "    collate = staticmethod(default_collate)\n"
    ),
    DATASET.replace("__init__(self, data_path)", "__new__(cls, data_path)")
    .replace("self.path = data_path", "return super().__new__(cls)")
    .replace("    def __len__", "    def __init__(self, *_): pass\n    def __len__"),
]


@pytest.mark.filterwarnings("ignore:.*invalid escape:SyntaxWarning", "ignore:.*invalid escape:DeprecationWarning")
@pytest.mark.parametrize("source", RIGHT)
def test_nothing_is_said_of_what_can_be_loaded(source: str, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/__init__.py").touch()
    for path in (tmp_path / "whole.py", tmp_path / "parts/deep.py"):
        path.write_text(MODEL)
    folder, filename = bundle(tmp_path, source)
    assert is_loaded(folder, filename)
    assert check_source(folder, filename).problems == ()


def test_summary_names_what_was_found() -> None:
    assert check_source(TUTORIAL, MODEL_FILE).summary == "UserModel: loss, metrics"
    assert check_source(TUTORIAL, DATASET_FILE).summary == "UserDataset, UserValDataset"
    assert check_source(TUTORIAL, MODEL_FILE).problems == check_source(TUTORIAL, DATASET_FILE).problems == ()


def test_nothing_is_run(tmp_path: Path) -> None:
    hit = tmp_path / "hit"
    attack = f"import pathlib\npathlib.Path({str(hit)!r}).touch()\n"
    folder, filename = bundle(tmp_path, attack + "import helper\n" + MODEL, helper=attack)
    assert check_source(folder, filename).problems == ()
    assert not hit.exists()
    assert is_loaded(folder, filename)
    assert hit.exists()


LADDER = "".join(f"class A{number}(A{number - 1}, A{number - 1}): pass\n" for number in range(1, 50))


@pytest.mark.parametrize(
    "source",
    [
        "(" * 10_000,
        "x = " + "-" * 100_000 + "1",
        "A = A\nclass UserModel(A): pass\n",
        "class UserModel(UserModel): pass\n",
        "class UserModel(UserModel, UserModel): pass\n",
        f"class A0: pass\n{LADDER}class UserModel(A49, A49): pass\n",
        f"from {'.' * 90}x import UserModel\n",
        "from bks_model import UserModel\n",
        "from bks_model import *\n",
        "import a\nfrom a import UserModel\n",
        "# coding: nothing\n",
        "x" * (5 * 2**20),
        "",
    ],
    ids=lambda source: str(len(source)),
)
def test_hostile_source_is_answered(source: str, tmp_path: Path) -> None:
    folder, filename = bundle(tmp_path, source, a="from b import UserModel\n", b="from a import UserModel\n")
    for problem in check_source(folder, filename).problems:
        assert "\n" not in problem
        assert len(problem) < 300


def test_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "bks_modl.py").write_text(MODEL)
    [problem] = check_source(tmp_path, MODEL_FILE).problems
    assert problem == "bks_model.py is missing or in several folders. Found: bks_modl.py. Did you mean bks_modl.py?"
