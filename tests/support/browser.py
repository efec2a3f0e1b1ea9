"""Rendering of a page in a real browser without network access."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or os.geteuid() != 0, reason="needs chromium, and root to disable its network"
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
