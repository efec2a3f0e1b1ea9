"""Schedules and optimizers of users."""

from __future__ import annotations


def halved(step: int, total: int) -> float:
    return 1.0 if step < total // 2 else 0.5


def negative(step: int, total: int) -> float:
    return 1.0 if step < total - 1 else -1.0


def of_one(step: int) -> float:
    return 1.0 / (1 + step)
