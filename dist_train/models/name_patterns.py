"""Patterns over the names of a net's parameters."""

from __future__ import annotations

from fnmatch import fnmatchcase


def covers(pattern: str, name: str) -> bool:
    """Return whether the pattern, where * stands for any text, matches this name or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
