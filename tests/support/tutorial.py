"""BK.Synapse's tutorial, seed 000, as its user does it: two zips, an empty data set, a form."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dist_train.data.sets.named_sets import load_named
from dist_train.user_code.bundles import open_bundle
from support.bundle_files import TUTORIAL

if TYPE_CHECKING:
    from playwright.sync_api import Page


def zipped(folder: Path, name: str) -> Path:
    """Compress one of the two files of the tutorial."""
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        archive.write(TUTORIAL / f"{name}.py", f"{name}.py")
    return folder / f"{name}.zip"


def upload_all(page: Page, base: str, folder: Path) -> None:
    """Upload data loader and model, and create an empty data set."""
    _add(page, f"{base}loaders", "mnist", zipped(folder, "bks_dataset"))
    _add(page, f"{base}models", "bks", zipped(folder, "bks_model"))
    _add(page, f"{base}datasets", "mnist-empty", None)


def _add(page: Page, address: str, name: str, archive: Path | None) -> None:
    page.goto(address)
    page.get_by_label("Name", exact=True).fill(name)
    if archive is None:
        page.get_by_role("button", name="Create an empty one").click()
    else:
        page.get_by_label("Zip", exact=True).set_input_files(archive)
        page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_role("link", name=f"Download {name} version 1").wait_for()


def fill_form(page: Page, length: str) -> None:
    """Open the form of a new job and fill it in. `length`: what its field for epochs holds."""
    page.get_by_role("link", name="New job").click()
    page.locator("#new[data-htmx-powered]").wait_for()  # what is typed earlier is not checked
    page.get_by_label("Name", exact=True).fill("tutorial")
    page.get_by_label("Model", exact=True).select_option("bks, version 1")
    page.get_by_label("Data loader", exact=True).select_option("mnist, version 1")
    page.get_by_label("Data set", exact=True).select_option("mnist-empty, version 1")
    page.get_by_label("Batch size").fill("64")
    page.get_by_label("Learning rate").fill("0.001")
    page.get_by_label("Epochs").fill(length)
    page.get_by_label("Snapshot every").fill("5")
    page.get_by_label("One name=value a line").fill("final_train_eval=false")


def shown_accuracy(page: Page) -> str:
    """Return the validation accuracy of the newest evaluation, as the page of the run shows it."""
    return page.locator("#epochs tbody tr").first.locator("td").nth(5).inner_text().removesuffix(" best")


def accuracy_of(weights: Path, folder: Path) -> float:
    """Return the accuracy on 1000 test images of weights that torch alone reads."""
    _, test = load_named("mnist", folder, None)
    net = open_bundle(TUTORIAL, "bks_model.py", "model.bundle").UserModel()
    net.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        logits = net.eval()((test.images[:1000] / 255 - 0.1307) / 0.3081)
    return float((logits.argmax(1) == test.labels[:1000]).float().mean())
