"""BK.Synapse's tutorial, seed 000, on the page: two zips, an empty data set, a job, its numbers, its snapshot."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from dist_train.atomic_files import read_json
from dist_train.data.sets.named_sets import load_named
from dist_train.user_code.bundles import open_bundle
from support.browser import needs_namespace, opened, serving, wait_for_state
from support.jobs import full
from support.patience import wait_until
from support.processes import ROOT
from support.run_files import status_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TUTORIAL = ROOT / "tests/bundles/mnist_bks"
# What the field for epochs holds, and the least accuracy.
LENGTHS = [("150 steps", 0.75), full("10", 0.95)]


def zipped(folder: Path, name: str) -> Path:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.write(TUTORIAL / f"{name}.py", f"{name}.py")
    return folder / f"{name}.zip"


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


def add(page: Page, base: str, kind: str, name: str, archive: Path | None) -> None:
    """Upload a zip by the form of a kind, or create an empty data set."""
    page.goto(f"{base}{kind}")
    page.get_by_label("Name", exact=True).fill(name)
    if archive is None:
        page.get_by_role("button", name="Create an empty one").click()
    else:
        page.get_by_label("Zip", exact=True).set_input_files(archive)
        page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("link", name=f"Download {name} version 1").wait_for()


def accuracy_of(weights: Path, folder: Path) -> float:
    """Return the accuracy on 1000 test images of weights that torch alone reads."""
    _, test = load_named("mnist", folder, None)
    net = open_bundle(TUTORIAL, "bks_model.py", "model.bundle").UserModel()
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        logits = net.eval()((test.images[:1000] / 255 - 0.1307) / 0.3081)
    return float((logits.argmax(1) == test.labels[:1000]).float().mean())


@needs_namespace
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize(("length", "least"), LENGTHS)
def test_tutorial_in_browser(
    length: str, least: float, prefix: list[str], browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    run_dir = tmp_path / "runs/tutorial"
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        base = page.url
        add(page, base, "loaders", "mnist", zipped(tmp_path, "bks_dataset"))
        add(page, base, "models", "bks", zipped(tmp_path, "bks_model"))
        add(page, base, "datasets", "mnist-empty", None)
        page.get_by_role("link", name="New job").click()
        page.get_by_label("Name", exact=True).fill("tutorial")
        page.get_by_label("Model", exact=True).select_option("bks, version 1")
        page.get_by_label("Data loader", exact=True).select_option("mnist, version 1")
        page.get_by_label("Data set", exact=True).select_option("mnist-empty, version 1")
        page.get_by_label("Batch size").fill("64")
        page.get_by_label("Learning rate").fill("0.001")
        page.get_by_label("Epochs").fill(length)
        page.get_by_label("Snapshot every").fill("5")
        page.get_by_label("One name=value a line").fill("final_train_eval=false")
        page.get_by_text("fine: global batch 64 = 64 per device").wait_for()
        page.get_by_role("button", name="Create and run").click()
        page.get_by_text("It waits in the queue").wait_for()
        for state in ("SETUP", "TRAINING"):
            with held(run_dir, state):
                wait_for_state(page, state)
        wait_for_state(page, "FINISHED")
        result = read_json(run_dir / "result.json")
        assert result["val/accuracy"] > least
        assert page.locator("#epochs tbody tr").first.locator("td").nth(5).inner_text() == (
            f"{100 * result['val/accuracy']:.2f} % best"
        )
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
    [script] = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/web.md").read_text(), re.DOTALL)
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
