"""BK.Synapse's tutorial, seed 000, on the page: two zips, an empty data set, a job, its numbers, its snapshot."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dist_train.atomic_files import read_json
from support.browser import needs_namespace, opened, serving, wait_for_state
from support.jobs import full
from support.patience import wait_until
from support.processes import ROOT
from support.run_files import status_of
from support.tutorial import accuracy_of, fill_form, shown_accuracy, upload_all, zipped

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# What the field for epochs holds, and the least accuracy.
LENGTHS = [("150 steps", 0.75), full("10", 0.95)]


@contextmanager
def held(run_dir: Path, state: str) -> Iterator[None]:
    """Stop the training in a state, so that the page shows it however fast the machine is."""
    wait_until(lambda: status_of(run_dir).get("state") == state, state)
    pid = status_of(run_dir)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@needs_namespace
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize(("length", "least"), LENGTHS)
def test_tutorial_in_browser(
    length: str, least: float, prefix: list[str], browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    run_dir = tmp_path / "runs/tutorial"
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        upload_all(page, page.url, tmp_path)
        fill_form(page, length)
        page.get_by_text("fine: global batch 64 = 64 per device").wait_for()
        page.get_by_role("button", name="Create and run").click()
        page.get_by_text("It waits in the queue").wait_for()
        for state in ("SETUP", "TRAINING"):
            with held(run_dir, state):
                wait_for_state(page, state)
        wait_for_state(page, "FINISHED")
        result = read_json(run_dir / "result.json")
        assert result["val/accuracy"] > least
        assert shown_accuracy(page) == f"{100 * result['val/accuracy']:.2f} %"
        if length == "10":  # each fifth epoch is kept, as by BK.Synapse
            assert page.locator("#step-4685 a").count() == page.locator("#step-9370 a").count() == 2
        link = page.locator("#epochs a", has_text=".pth").first
        assert (link.get_attribute("href") or "").endswith(f"/{result['step']}.pth")
        with page.expect_download() as download:
            link.click()
        assert accuracy_of(download.value.path(), tmp_path / "mnist") > least - 0.05
        page.get_by_role("link", name="Settings").click()
        page.get_by_text("model.bundle").first.wait_for()


@pytest.mark.parametrize(("length", "least"), LENGTHS)
def test_tutorial_by_curl(length: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of docs/web.md."""
    documented = (ROOT / "docs/web.md").read_text().partition("### The same with curl")[2]
    script = documented.partition("```sh\n")[2].partition("```")[0]
    script = script.replace("train_for=10 ", f"train_for='{length}' -d lines=final_train_eval=false ")
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    for name in ("bks_dataset", "bks_model"):
        zipped(tmp_path, name)
    with serving([], tmp_path) as address:
        page, _, token = address.partition("/?token=")
        script = script.replace("http://127.0.0.1:8080", page)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=os.environ | {"token": token},
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(tmp_path / "runs/tutorial/result.json")
    assert result["val/accuracy"] > least
    assert f'"val/accuracy": {result["val/accuracy"]}' in done.stdout
    assert accuracy_of(tmp_path / "snapshot.pth", tmp_path / "mnist") > least - 0.05
