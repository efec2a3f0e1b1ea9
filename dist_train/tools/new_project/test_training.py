"""The config trains, and the net learns something."""

from pathlib import Path

import pytest

from dist_train import load_config, train


def test_net_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    overrides = [f"runs_dir={tmp_path}", "tracking.wandb=disabled", "tracking.pictures=false"]
    result = train(load_config("config.yaml", overrides), run_name="test")
    assert result.state == "FINISHED"
    assert result.metrics["test/accuracy"] > 0.9
