"""The page's files from elsewhere are the released ones, with their licences."""

from __future__ import annotations

from hashlib import sha256

import pytest

from support.processes import ROOT

STATIC = ROOT / "dist_train" / "web" / "static"


@pytest.mark.parametrize(
    ("name", "licence", "digest"),
    [
        ("htmx-4.0.1.min.js", "htmx", "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"),
        (
            "uPlot-1.6.32.min.js",
            "uPlot",
            "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        ),
        (
            "uPlot-1.6.32.min.css",
            "uPlot",
            "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        ),
    ],
)
def test_vendored_files_are_unchanged(name: str, licence: str, digest: str) -> None:
    assert sha256((STATIC / name).read_bytes()).hexdigest() == digest
    assert (STATIC / f"LICENSE-{licence}.txt").read_text().strip()


def test_nothing_comes_from_another_host() -> None:
    for path in (ROOT / "dist_train" / "web").rglob("*"):
        if path.suffix in (".html", ".css") or path.name == "page.js":
            assert "://" not in path.read_text(), path
