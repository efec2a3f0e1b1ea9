"""In which order tests start: what takes longest first, and a few clusters beside the tests that compute.

Tests of the cluster mostly wait. Each of their groups goes to one worker of pytest, which has one cluster for all of
it, while the other workers compute.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

CLUSTERS = 2
# Files in which single tests take long, by what they took; the others in their own order after them.
LONG = [
    "test_wandb.py", "test_wandb_offline.py", "test_surroundings.py", "test_kills.py", "test_verify.py",
    "test_bench.py", "test_sweep.py", "test_torchrun.py", "test_step_modes.py", "test_trained_net.py",
    "test_exactness.py", "test_end_to_end.py",
]  # fmt: skip


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    by_file = sorted(items, key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    on_clusters = sorted(filter(minutes_on_cluster, by_file), key=minutes_on_cluster, reverse=True)
    groups: list[list[pytest.Item]] = [[] for _ in range(CLUSTERS)]
    for item in on_clusters:
        shortest = min(groups, key=lambda group: sum(map(minutes_on_cluster, group)))
        shortest.append(item)
        item.add_marker(pytest.mark.xdist_group(f"cluster {groups.index(shortest)}"))
    return [*(item for group in groups for item in group), *(item for item in by_file if not minutes_on_cluster(item))]


def minutes_on_cluster(item: pytest.Item) -> float:
    """As the test's mark says, about one and a half if it does not; 0 for a test that needs no cluster."""
    mark = item.get_closest_marker("cluster")
    return mark.kwargs.get("minutes", 1.5) if mark else 0.0
