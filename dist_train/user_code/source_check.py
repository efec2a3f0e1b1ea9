"""What the source of a bundle shows without being imported or run: missing classes and methods, with their lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SourceCheck:
    summary: str = ""  # what was found: "UserModel: loss, metrics"
    problems: tuple[str, ...] = ()  # one line each: "bks_model.py:31 UserModel has no method loss(output, target). ..."


def check_source(folder: Path, filename: str) -> SourceCheck:
    """Read `filename`, bks_model.py or bks_dataset.py, of a bundle's folder. Nothing is imported or run."""
    return SourceCheck()
