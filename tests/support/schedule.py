"""The start order of tests: the longest first, with a few clusters next to the tests that compute.

Cluster tests mostly wait. Each group of them goes to one pytest worker with one cluster for the whole group, while the
other workers compute.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

CLUSTERS = 2
# Files with slow tests, by measured time; the others follow in their own order.
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
    """Return the minutes of the test's mark, 1.5 by default, 0 for a test that needs no cluster."""
    mark = item.get_closest_marker("cluster")
    return mark.kwargs.get("minutes", 1.5) if mark else 0.0
