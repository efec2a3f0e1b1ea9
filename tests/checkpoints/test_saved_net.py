"""A net is rebuilt from the record of its run as the run's ranks built it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.atomic_files import write_atomically, write_json
from dist_train.checkpoints.contents import Snapshot, TrainerState
from dist_train.checkpoints.manifest import folder_of
from dist_train.checkpoints.saved_net import SavedNet
from dist_train.checkpoints.storage import write
from dist_train.config.loading import parse_config, to_yaml
from dist_train.errors import CheckpointError
from dist_train.inference.trained_net import TrainedNet, logits_of
from dist_train.launch.python_api import Result
from dist_train.models.registry import build_model
from dist_train.runs.directory import RunDir
from support.run_files import assert_equal

SPEC = {"in_channels": 1, "num_classes": 10, "image_size": 28}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def test_saved_net_is_built_as_the_run_built_it(dtype: torch.dtype, run_dir: RunDir) -> None:
    """The same one for scripts and for predictions, with what only the seed can draw again, in the run's dtype."""
    config = parse_config(
        {
            "model": {"name": "support.user_nets:Projecting"}, "seed": 3, "dtype": str(dtype).removeprefix("torch."),
            "data": {"normalize": {"mean": [0.3], "std": [0.7]}},
        }
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        net = build_model(config.model, SPEC, config.seed).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    write_atomically(run_dir.config, to_yaml(config))
    write_json(run_dir.run_json, {"data": {**SPEC, "classes": None, "pixels": True}})
    write(Snapshot(TrainerState(step=1), net.state_dict(), {}), folder_of(run_dir, 1), attempt=1)

    for built in (Result(run_dir.path, "FINISHED", {}).net, TrainedNet.open(run_dir.path, "last").net):
        assert_equal(dict(built.named_buffers()), dict(net.named_buffers()))
        assert_equal(built.state_dict(), net.state_dict())
        assert not built.training
    pixels = torch.arange(28 * 28, dtype=torch.uint8).view(1, 1, 28, 28)
    expected = net((pixels.to(dtype) / 255 - 0.3) / 0.7)
    logits = logits_of(TrainedNet.open(run_dir.path, "1"), pixels)
    assert expected.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.get_default_dtype() == torch.float32


def test_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no-run has no config\.yaml, so it is not a run"):
        SavedNet.find(tmp_path / "no-run", "last")
