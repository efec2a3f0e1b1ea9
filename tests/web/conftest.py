"""A browser for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.browser import chromium, namespace

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def prefix() -> Iterator[list[str]]:
    with namespace() as found:
        yield found


@pytest.fixture(scope="module")
def browser(prefix: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(prefix, tmp_path_factory.mktemp("browser")) as found:
        yield found
