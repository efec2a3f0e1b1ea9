"""docs/settings.md matches the schema."""

from __future__ import annotations

import re

from dist_train.config.loading import parse_config
from dist_train.config.reference import to_markdown
from support.processes import ROOT

OPTIONAL = {"early_stop": {"patience": 1}, "data": {"normalize": {"mean": [0.0], "std": [1.0]}, "augment": {}}}


def rows() -> dict[str, list[str]]:
    """Cells of each setting by its name."""
    lines = [re.split(r" ?(?<!\\)\| ?", line) for line in to_markdown().splitlines() if line.startswith("| `")]
    return {name.strip("`"): cells for _, name, *cells, _ in lines}


def test_page_equals_command_output() -> None:
    fix = "docs/settings.md is not up to date. Regenerate it: dist-train config reference > docs/settings.md"
    assert (ROOT / "docs/settings.md").read_text() == to_markdown(), fix


def test_every_setting_is_listed() -> None:
    names = set(rows())
    assert names >= set(parse_config({}).flat()) | set(parse_config(OPTIONAL).flat())


def test_settings_that_may_change_on_resume() -> None:
    config = parse_config(OPTIONAL)
    free = {name for name, (_, _, resume, _) in rows().items() if resume == "yes"}
    assert free == set(config.flat()) - set(config.result_settings())


def test_types_defaults_and_comments() -> None:
    found = rows()
    assert found["global_batch_size"][:3] == ["integer > 0, < 2^31", "`64`", "no"]
    assert found["save_every"][:3] == ["steps, epochs or seconds", "`1 epochs`", "yes"]
    assert found["data.num_workers"][0] == "integer ≥ 0, ≤ 1024"
    assert found["eval_every"][0] == "steps or epochs"
    assert found["optimizer.betas"][:2] == ["[number ≥ 0, < 1, number ≥ 0, < 1]", "not set"]
    assert found["optimizer.lr_scaling"][0] == "`none`, `linear`, `sqrt`"
    assert "muon" in found["optimizer.name"][-1]
    assert found["early_stop.patience"][:2] == ["integer > 0", "required"]
    assert found["device"][:2] == ["`auto`, `cpu`, `cuda`, `mps`", "`auto`"]
    assert found["final_train_eval"][0] == "`true` or `false`"
    assert "$DIST_TRAIN_RUNS_DIR" in found["runs_dir"][3]
    assert len(found["stall_timeout_s"][3]) > 20  # a comment above the field
