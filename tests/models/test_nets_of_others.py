"""Nets of torchvision and timm: trained with averaged weights, resumed, evaluated, exported.

`make nets` tests all of them, a normal test run only two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.processes import DIST_TRAIN
from support.ranks import run_forked, run_on_ranks, train_here
from support.run_files import assert_bit_identical

# Keys: pixels per side of their images. Larger nets of a family are left out: they differ only in size.
TORCHVISION = {
    32: ["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small",
         "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_v2_s",
         "regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf",
         "convnext_tiny", "vgg11", "vgg11_bn", "densenet121", "densenet169", "shufflenet_v2_x0_5",
         "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"],
    64: ["alexnet", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "googlenet"],
    75: ["inception_v3"],
    224: ["vit_b_32", "maxvit_t"],
}  # fmt: skip
TIMM = {
    64: ["lcnet_035", "tinynet_e", "mobilenetv3_small_050", "ghostnet_050", "hardcorenas_a", "fbnetc_100", "repvgg_a0",
         "resnest14d", "seresnext26t_32x4d", "poolformer_s12", "edgenext_xx_small", "mobilevit_xxs"],
    160: ["test_byobnet", "test_convnext", "test_convnext2", "test_convnext3", "test_efficientnet",
          "test_efficientnet_gn", "test_efficientnet_ln", "test_mambaout", "test_nfnet", "test_resnet", "test_vit",
          "test_vit2", "test_vit3", "test_vit4", "test_coatnet", "test_maxvit"],
    224: ["deit_tiny_patch16_224", "levit_128s", "pit_ti_224", "xcit_nano_12_p16_224"],
}  # fmt: skip
ALWAYS_TESTED = ("torchvision:mnasnet0_5", "timm:test_vit")


def nets() -> list[Any]:
    named = [
        (f"{source}:{name}", size)
        for source, sizes in (("torchvision", TORCHVISION), ("timm", TIMM))
        for size, names in sizes.items()
        for name in names
    ]
    return [
        pytest.param(name, size, id=name, marks=[] if name in ALWAYS_TESTED else pytest.mark.full)
        for name, size in named
    ]


def train(settings: dict[str, Any], folder: Path) -> None:
    train_here(settings, folder / "whole")
    train_here(settings, folder / "r", stop_after=1)
    train_here(settings, folder / "r")


@pytest.mark.parametrize(("name", "size"), nets())
def test_net_trains_resumes_evaluates_and_exports(name: str, size: int, tmp_path: Path) -> None:
    settings = {
        "data": {"name": "support.user_sets:noise", "args": {"size": size}}, "model": {"name": name}, "device": "cpu",
        "global_batch_size": 4, "train_for": "3 steps", "ema_decay": 0.9, "eval_every": 0, "final_train_eval": False,
        "optimizer": {"name": "sgd", "lr": 1e-3}, "step_mode": "eager",
    }  # fmt: skip
    run_on_ranks(train, settings, tmp_path, world_size=1)
    assert_bit_identical(tmp_path / "r", tmp_path / "whole")
    result = json.loads((tmp_path / "r/result.json").read_text())
    evaluated = run_forked([*DIST_TRAIN, "evaluate", "r", "--json"], tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(result["test/loss"], rel=1e-5)
    exported = run_forked([*DIST_TRAIN, "export", "r", "out"], tmp_path)
    assert exported.returncode == 0, exported.stderr
