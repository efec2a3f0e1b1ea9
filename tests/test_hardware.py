"""What one rank computes with."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from dist_train.config_file import parse_config
from dist_train.distributed import World
from support.ranks import join_group, run_on_ranks

PAGES = 12_288  # 48 MiB: more than malloc keeps if it is not told to


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
