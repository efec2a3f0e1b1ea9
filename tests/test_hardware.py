"""What one rank computes with."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from dist_train.config_file import parse_config
from dist_train.distributed import World
from dist_train.errors import ConfigError
from dist_train.hardware import choose_precision
from support.ranks import join_group, run_on_ranks

PAGES = 12_288  # 48 MiB: more than malloc keeps if it is not told to


@pytest.mark.parametrize(
    ("ours", "theirs", "begun_with", "found"),
    [
        (None, None, None, "no"),
        (None, "bf16", None, "bf16"),
        ("no", "bf16", None, "no"),
        (None, "no", "bf16", "bf16"),  # `accelerate launch` always says no
        (None, None, "bf16", "bf16"),
        (None, "bf16", "bf16", "bf16"),
        ("bf16", "no", "bf16", "bf16"),
        ("no", "bf16", "no", "no"),
        (
            None,
            "bf16",
            "no",
            r"^ACCELERATE_MIXED_PRECISION=bf16, and the run was begun with no\. Unset it, or .*--run-name",
        ),
        ("no", None, "bf16", r"^mixed_precision=no, and the run was begun with bf16\. Set mixed_precision=bf16, or"),
    ],
)
def test_a_run_keeps_its_precision(
    ours: str | None, theirs: str | None, begun_with: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if theirs is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", theirs)
    config = parse_config({"mixed_precision": ours})
    if found in ("no", "bf16"):
        assert choose_precision(config, "cpu", begun_with) == found
    else:
        with pytest.raises(ConfigError, match=found):
            choose_precision(config, "cpu", begun_with)


def count_page_faults(out: Path) -> None:
    join_group("hardware")
    World.join(parse_config({"device": "cpu"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(PAGES * 1024)
    out.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


def test_memory_once_freed_is_used_again(tmp_path: Path) -> None:
    """The kernel is not asked for it each of the 50 times."""
    run_on_ranks(count_page_faults, tmp_path / "faults", world_size=1)
    assert int((tmp_path / "faults").read_text()) < 25 * PAGES
