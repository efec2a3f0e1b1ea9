"""A real browser without network access: pages that are files, and the page of runs."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.patience import PATIENCE_S
from support.processes import DIST_TRAIN, started

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or os.geteuid() != 0, reason="needs chromium, and root to disable its network"
)
needs_namespace = pytest.mark.skipif(
    CHROMIUM is None or os.geteuid() != 0 or shutil.which("ip") is None, reason="needs chromium, iproute2 and root"
)

# Collects what a reader sees: table cells with their values, and the sizes of the images.
_COLLECT = """<script>addEventListener("load", () => {
  const tables = [...document.querySelectorAll("table")].map(table => ({
    columns: [...table.querySelectorAll("th")].map(cell => cell.innerText),
    rows: [...table.querySelectorAll("tbody tr")].map(row => [...row.cells].map(
      cell => ({text: cell.innerText, value: cell.dataset.value, best: cell.className == "best"})))}));
  const pictures = [...document.images].map(image => [image.alt, image.naturalWidth, image.naturalHeight]);
  document.body.innerHTML = "<pre>seen</pre>";
  document.querySelector("pre").dataset.seen = btoa(unescape(encodeURIComponent(JSON.stringify({tables, pictures}))));
})</script>"""


def render_page(page: Path, folder: Path) -> dict[str, Any]:
    """Return {"tables": [{"columns", "rows"}], "pictures": [[name, width, height]]} as rendered by the browser."""
    assert CHROMIUM is not None
    watched = folder / "watched.html"
    watched.write_text(page.read_text().replace("</body>", f"{_COLLECT}</body>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom")
    command = ["unshare", "--net", CHROMIUM, *options, "--virtual-time-budget=5000", watched.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r'data-seen="([^"]+)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(base64.b64decode(found[1]))
    return seen


@contextmanager
def namespace() -> Iterator[list[str]]:
    """Make a network namespace with nothing but a loopback, and yield the command prefix that runs programs in it."""
    name = f"page{os.getpid()}"
    for command in (f"ip netns add {name}", f"ip -n {name} link set lo up"):
        subprocess.run(command.split(), check=True)
    try:
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def chromium(prefix: list[str], folder: Path) -> Iterator[Browser]:
    """Start a browser in a namespace, driven through a pipe."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec {" ".join([*prefix, CHROMIUM])} "$@"\n')
    script.chmod(0o755)
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=script, args=options)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def serving(prefix: list[str], folder: Path, port: int = 0) -> Iterator[str]:
    """Serve the runs of `folder`/runs and yield the address with the token."""
    command = [*prefix, *DIST_TRAIN, "web", "--in", str(folder / "runs"), "--port", str(port)]
    own = folder / "server"  # its working directory: `started` kills by that
    own.mkdir(exist_ok=True)
    with started(command, own, None, XDG_STATE_HOME=str(folder / "state")) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """Log in and yield the page. A script error or a violation of the policy fails the test."""
    context: BrowserContext = browser.new_context(**options)
    context.set_default_timeout(1000 * PATIENCE_S)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
    page.goto(address)
    page.wait_for_url(lambda url: "token" not in url)
    try:
        yield page
    finally:
        context.close()
    assert errors == []


def wait_for_state(page: Page, state: str) -> None:
    page.wait_for_function("state => document.querySelector('#live')?.dataset.state === state", arg=state)
