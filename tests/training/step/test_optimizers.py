"""Optimizers by name: bit-identical to torch's own, without an import of torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.optimizer import OptimizerConfig
from dist_train.errors import UserCodeError
from dist_train.training.step.optimizers import bare_step, build_optimizer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"name": "adam", "betas": (0.5, 0.99), "weight_decay": 0.1}, torch.optim.Adam),
        ({"name": "adamw", "weight_decay": 0.1}, torch.optim.AdamW),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ({"name": "adadelta", "rho": 0.8}, torch.optim.Adadelta),
        ({"name": "rmsprop", "alpha": 0.9, "centered": True}, torch.optim.RMSprop),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_optimizers_are_bit_identical_to_torch(settings: dict[str, Any], reference: Any) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(40, 30), nn.Linear(40, 30)
    theirs.load_state_dict(ours.state_dict())
    arguments = {key: value for key, value in settings.items() if key != "name"}
    fused = {"fused": True} if settings["name"] in ("adam", "adamw", "sgd") else {}
    optimizer = build_optimizer(OptimizerConfig(lr=1e-2, **settings), ours, CPU)
    step, other = bare_step(optimizer), reference(theirs.parameters(), lr=1e-2, **arguments, **fused)
    for _ in range(5):
        images = torch.randn(8, 40)
        for net in (ours, theirs):
            net.zero_grad()
            net(images).square().mean().backward()
        step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_run_imports_no_compiler(tmp_path: Any) -> None:
    """torch._dynamo takes 1.5 s, sympy 0.5, torchvision 1.1: a run with a bundled set needs none of them."""
    settings = ["train_for=2 steps", "final_train_eval=false", "tracking.wandb=disabled", f"runs_dir={tmp_path}"]
    code = (
        "import sys\nfrom dist_train.cli import main\n"
        f"main(['train', '-q', '-c', 'smoke', *{settings}], standalone_mode=False)\n"
        "unused = {'torch._dynamo', 'sympy', 'torchvision', 'torchmetrics', 'wandb', 'matplotlib'}\n"
        "print(sorted(unused & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def test_net_with_configure_optimizers_is_refused() -> None:
    class Net(nn.Linear):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(UserCodeError, match=r"Net\.configure_optimizers is not called: .* optimizer\.name=adamw"):
        build_optimizer(OptimizerConfig(), Net(2, 2), CPU)
