"""models.registry and models.nets: nets by name, their weights, and the error messages."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.schema import ModelConfig
from dist_train.errors import ConfigError, DataError, UserCodeError
from dist_train.models.invariance import world_size_dependent_layers
from dist_train.models.nets import MODELS
from dist_train.models.registry import build_model
from dist_train.torchvision_compat import import_torchvision
from support.processes import ROOT

import_torchvision()  # here and not in a test: importing it changes the environment (torch._dynamo does)

BUNDLE = ROOT / "tests/bundles/mnist_bks"
DROPOUT, BATCHNORM = "dropout (drawn per rank and micro-batch)", "BatchNorm (statistics per forward)"


def build(
    name: str = "mlp",
    *,
    in_channels: int | None = 1,
    num_classes: int | None = 10,
    image_size: int | None = 28,
    seed: int = 0,
    **settings: Any,
) -> Any:
    config = ModelConfig(name=name, **settings)
    known = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    return build_model(config, known, seed)


def num_weights(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def fails(kind: type[Exception], name: str, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        build(name, **settings)
    return str(caught.value)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with my_own_nets.py in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / "my_own_nets.py"
    file.write_text(
        "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
        "class Fixed(nn.Linear):\n"
        "    def __init__(self): super().__init__(784, 10)\n"
        "class Sized(nn.Linear):\n"
        "    def __init__(self, num_classes, in_channels=3, width=2):\n"
        "        super().__init__(in_channels * width, num_classes)\n"
        "class Drops(nn.Linear):\n"
        "    def __init__(self): super().__init__(4, 4)\n"
        "    def forward(self, x):\n"
        "        return F.dropout(super().forward(x), training=self.training)\n"
        "class Drops2(Drops):\n"
        "    def forward(self, x): return super().forward(x)\n"
        "class NoDrop(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 4)  # F.dropout(x)\n"
        "        self.dropout = nn.Dropout(0.0)\n"
        "    def forward(self, x): return self.dropout(super().forward(x))\n"
        "class Broken(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(2, -2)\n"
        "class OddLoss(nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 4)\n"
        "        self.loss = 'mse'\n"
        "def no_net(): return [1]\n"
        "THREE = 3\n"
        "class Drawn(nn.Linear):\n"
        "    def __init__(self):\n"
        "        import random, numpy\n"
        "        super().__init__(2, 2)\n"
        "        self.drawn = random.random(), numpy.random.rand()\n"
        "class Lazy(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Flatten(), nn.LazyLinear(10))\n"
        "class Made(Lazy):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self(torch.zeros(1, 784))\n"
    )
    yield file
    sys.modules.pop("my_own_nets", None)


# --- the nets of the tutorials ---


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 39_760), ("bks", 21_840), ("guide", 22_270), ("conv", 181_276), ("fast", 108_874), ("speedrun", 38_650)
    ],
)  # fmt: skip
def test_number_of_weights_and_shapes(name: str, count: int) -> None:
    assert num_weights(build(name)) == count
    other = build(name, in_channels=3, num_classes=7, image_size=32)
    assert other(torch.rand(5, 3, 32, 32)).shape == (5, 7)


def test_weight_counts_cover_every_net() -> None:
    assert list(MODELS) == ["mlp", "bks", "guide", "conv", "fast", "speedrun"]


class TutorialConv(nn.Module):
    """The layers of the fourth tutorial in their original order: ReLU, then pooling."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, 32, 3, stride=1, padding=1) for channels in (1, 32, 32))
        pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.convs = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), pool, third, nn.ReLU(), pool)
        sizes = [(1568, 100), (100, 50), (50, 10)]
        layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
        self.linears = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linears(self.convs(x).view(x.size(0), -1))
        return logits


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Check that gradients are equal bit by bit for equal weights, also in training: dropout draws the same."""
    theirs.load_state_dict(ours.state_dict())  # equal names and shapes, or it raises
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    for training in (False, True):
        for model in (ours, theirs):
            model.train(training)
            model.zero_grad()
            torch.manual_seed(3)
            F.cross_entropy(model(images), labels).backward()
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad)
            assert mine.grad.abs().sum() > 0


def test_conv_equals_tutorial() -> None:
    assert_same_gradients(build("conv"), TutorialConv())


def test_bks_equals_tutorial() -> None:
    assert_same_gradients(build("bks"), build(bundle=BUNDLE))


def test_bks_without_dropout_draws_nothing() -> None:
    model = build("bks", args={"dropout": 0.0}).train()
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(model(images), model(images))
    assert torch.equal(model(images), model.eval()(images))
    dropping = build("bks").train()
    assert not torch.equal(dropping(images), dropping(images))


def test_too_small_images_are_refused() -> None:
    assert fails(ConfigError, "bks", image_size=15) == ("model.name=bks needs image_size of at least 16, not 15.")
    assert build("bks", image_size=16)(torch.rand(2, 1, 16, 16)).shape == (2, 10)


# --- initial weights ---


@pytest.mark.parametrize("settings", [{"name": "conv"}, {"bundle": BUNDLE}, {"name": "torchvision:squeezenet1_1"}])
def test_weights_depend_only_on_seed(settings: dict[str, Any]) -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in build(seed=seed, **settings).parameters()])

    first = weights(0)
    torch.manual_seed(99)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_building_net_leaves_generators_unchanged() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(3).tolist(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    build("fast")
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


def test_net_that_uses_other_generators_depends_only_on_seed(own_module: Path) -> None:
    first, second, other = (build("my_own_nets:Drawn", seed=seed).drawn for seed in (0, 0, 1))
    assert first == second
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_nets_use_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = build("fast")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}


# --- nets of torchvision, timm and the user ---


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_net(channels: int) -> None:
    model = build("torchvision:resnet18", in_channels=channels, num_classes=7)
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)
    assert num_weights(model) == 11_689_512 - 513 * (1000 - 7) - (3 - channels) * 64 * 49
    assert world_size_dependent_layers(model) == [BATCHNORM]


def test_torchvision_nets_return_only_logits() -> None:
    model = build("torchvision:googlenet", args={"init_weights": False}).train()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 10)
    assert world_size_dependent_layers(model) == [BATCHNORM, DROPOUT]


def test_timm_net() -> None:
    pytest.importorskip("timm")
    model = build("timm:test_vit", num_classes=7, args={"img_size": 28, "patch_size": 7})
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_failed_weight_download_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The error without a network: huggingface_hub's LocalEntryNotFoundError or urllib's URLError, both an OSError.

    A log line announces the wait before it: ours for timm; for torchvision torch's own, replaced here.
    """
    timm = pytest.importorskip("timm")
    caplog.set_level(logging.INFO)

    def fail(*_: object, **__: object) -> None:
        announced = [text for text in caplog.messages if "fetching its weights, which may take a minute" in text]
        assert len(announced) == name.startswith("timm")
        raise FileNotFoundError("An error happened while trying to locate the file.\nPlease check your connection.")

    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    args = {"pretrained": True} if name.startswith("timm") else {"weights": "IMAGENET1K_V1", "num_classes": 1000}
    text = fails(DataError, name, args=args)
    assert f"The weights of model.name={name} could not be fetched (FileNotFoundError: An error" in text
    assert "\n" not in text
    assert text.endswith('True)"' if name.startswith("timm") else """weights='IMAGENET1K_V1')\"""")


def test_missing_timm_names_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert fails(ConfigError, "timm:resnet10t").endswith("needs timm: pip install 'dist-train[timm]'.")


def test_user_classes_get_arguments_they_accept(own_module: Path) -> None:
    assert build("my_own_nets:Fixed", in_channels=None, num_classes=None, image_size=None).out_features == 10
    sized = build("my_own_nets:Sized", num_classes=5, args={"width": 4})
    assert (sized.in_features, sized.out_features) == (4, 5)
    assert build("my_own_nets:Sized", in_channels=None).in_features == 6  # its own default
    assert build("my_own_nets:Sized", num_classes=None, args={"num_classes": 9}).out_features == 9


# --- errors ---


def test_unknown_names_get_suggestion() -> None:
    text = fails(ConfigError, "convv")
    assert text.startswith("model.name=convv: no such net. Did you mean conv? Nets: mlp, bks, guide, conv, fast, speed")
    assert "Did you mean torchvision:resnet18?" in fails(ConfigError, "torchvision:resnet19")
    assert "Did you mean timm:resnet10t?" in fails(ConfigError, "timm:resnet10")


def test_error_of_unknown_arguments_lists_valid_ones(own_module: Path) -> None:
    text = fails(ConfigError, "mlp", args={"hiden": 3})
    assert text.startswith("Unknown setting model.args.hiden. Did you mean model.args.hidden? It takes: in_channels, ")
    assert "model.args.zero_init_residual" in fails(ConfigError, "torchvision:resnet18", args={"zero_init_resid": 1})
    assert "foo=1: ResNet" in fails(ConfigError, "timm:resnet10t", args={"foo": 1})
    assert fails(ConfigError, "my_own_nets:Sized", args={"depth": 1}).endswith(
        "It takes: num_classes, in_channels, width."
    )
    assert "dropout=3.0: dropout probability" in fails(ConfigError, "bks", args={"dropout": 3.0})


@pytest.mark.parametrize("name", ["mlp", "torchvision:resnet18", "timm:resnet10t", "my_own_nets:Sized"])
def test_missing_number_of_classes_is_named(name: str, own_module: Path) -> None:
    text = fails(ConfigError, name, num_classes=None)
    assert text.startswith(
        f"model.name={name} needs num_classes, which the data set does not provide. Give the data set's"
    )
    assert "`classes` or `num_classes`" in text


def test_user_classes_with_wrong_interface_are_refused(own_module: Path) -> None:
    text = fails(UserCodeError, "my_own_nets:Broken")
    assert text.startswith(f"model.name=my_own_nets:Broken cannot be constructed: {own_module}:23: RuntimeError: ")
    assert "returns a list, not a torch.nn.Module" in fails(UserCodeError, "my_own_nets:no_net")
    assert "is of type int, not a class" in fails(UserCodeError, "my_own_nets:THREE")
    assert fails(UserCodeError, "my_own_nets:OddLoss").startswith(
        "OddLoss.loss is of type str. Make it a method loss(output"
    )
    assert "has no Fixd. Found: Fixed (line 4)" in fails(UserCodeError, "my_own_nets:Fixd")


def test_lazy_layer_is_named(own_module: Path) -> None:
    assert fails(UserCodeError, "my_own_nets:Lazy").startswith("Lazy: layer 1 is a LazyLinear without a size")
    one, other = build("my_own_nets:Made"), build("my_own_nets:Made")
    assert torch.equal(one[1].weight, other[1].weight)


# --- what depends on the world size ---


def test_world_size_dependent_layers(own_module: Path) -> None:
    for name in ("mlp", "guide", "conv", "fast", "my_own_nets:NoDrop", "my_own_nets:Fixed"):
        assert world_size_dependent_layers(build(name)) == [], name
    assert world_size_dependent_layers(build("bks", args={"dropout": 0.0})) == []
    for name in ("bks", "my_own_nets:Drops", "my_own_nets:Drops2"):
        assert world_size_dependent_layers(build(name)) == [DROPOUT], name
    assert world_size_dependent_layers(build(bundle=BUNDLE)) == [DROPOUT]
    assert world_size_dependent_layers(nn.Sequential(nn.SyncBatchNorm(3), nn.Dropout1d())) == [BATCHNORM, DROPOUT]
    assert world_size_dependent_layers(nn.LSTM(2, 2, num_layers=2, dropout=0.1)) == [DROPOUT]
    assert world_size_dependent_layers(nn.Dropout(0.0)) == []
