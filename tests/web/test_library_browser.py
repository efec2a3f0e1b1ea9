"""Models, data loaders and data sets in a real browser without a network: uploads survive what happens to them."""

from __future__ import annotations

import json
import random
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from dist_train.user_code.library import Kind, Version, add_empty, add_zip, entries, library_root
from support.browser import needs_namespace, opened, serving
from support.bundle_files import TUTORIAL
from support.patience import PATIENCE_S
from support.processes import ROOT, started

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request, Route

pytestmark = [needs_namespace, pytest.mark.xdist_group("browser")]

MIB = 2**20


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def zipped(archive: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive


def tutorial(folder: Path) -> Path:
    return zipped(folder / "bks.zip", **{path.name: path.read_bytes() for path in TUTORIAL.glob("*.py")})


def large(folder: Path, size: int = 20 * MIB) -> Path:
    """A data set of three chunks."""
    return zipped(folder / "large.zip", **{"a.bin": random.Random(0).randbytes(size)})


def versions(kind: Kind) -> list[Version]:
    return [version for entry in entries(kind) for version in entry.versions]


def choose(page: Page, name: str, archive: Path) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Zip", exact=True).set_input_files(archive)


def wait_for_parts(page: Page, sizes: list[int]) -> None:
    """Wait until the server has uploads of these sizes; the page's requests go on meanwhile."""
    until = time.monotonic() + PATIENCE_S
    while (seen := [part.stat().st_size for part in library_root().glob(".uploads/*.part")]) != sizes:
        assert time.monotonic() < until, seen
        page.wait_for_timeout(50)


def test_zip_is_uploaded_checked_and_deleted(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    broken = (TUTORIAL / "bks_model.py").read_bytes().replace(b"def loss", b"def losss")
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.get_by_role("link", name="Models").click()
        page.get_by_text("None yet.").wait_for()
        assert not page.locator("#sending, #upload-state").filter(visible=True).count()
        choose(page, "bks", tutorial(tmp_path))
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_text("UserModel: loss, metrics").wait_for()  # it appears by itself
        choose(page, "bks", zipped(tmp_path / "broken.zip", **{"bks_model.py": broken}))
        page.keyboard.press("Enter")
        page.get_by_text("bks_model.py:26 UserModel has no method loss(output, target). Did you mean losss?").wait_for()
        [new, old] = versions(Kind.MODELS)[::-1]
        with page.expect_download() as download:
            page.get_by_role("link", name="Download bks version 1").click()
        with zipfile.ZipFile(download.value.path()) as file:
            assert {name: file.read(name) for name in file.namelist()} == {
                path.name: path.read_bytes() for path in old.path.iterdir()
            }
        questions: list[str] = []

        def accept(dialog: Dialog) -> None:
            questions.append(dialog.message)
            dialog.accept()

        page.on("dialog", accept)
        page.get_by_role("button", name="Delete bks version 2").click()
        page.get_by_text("It is deleted.").wait_for()
        assert questions == ["Delete bks version 2 for good?"]
        assert versions(Kind.MODELS) == [old]
        assert not new.path.exists()
        assert list((library_root() / ".uploads").iterdir()) == []


def test_upload_survives_broken_line_closed_tab_and_killed_server(
    prefix: list[str], browser: Browser, tmp_path: Path
) -> None:
    archive, sent = large(tmp_path), []

    def break_second(route: Route, request: Request) -> None:
        if request.method == "PATCH":
            sent.append(int(request.headers["upload-offset"]))
        if request.method == "PATCH" and len(sent) == 2:
            route.abort()
        else:
            route.continue_()

    def hold_last(route: Route, request: Request) -> None:
        if request.method != "PATCH" or request.headers["upload-offset"] == "0":
            route.continue_()

    with serving(prefix, tmp_path) as address:
        port = int(address.split(":")[2].split("/")[0])
        context = browser.new_context()
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        page.goto(address)
        page.wait_for_url(lambda url: "token" not in url)
        base = page.url
        page.route("**/uploads/*", hold_last)
        page.goto(f"{base}datasets")
        choose(page, "set", archive)
        page.get_by_role("button", name="Add", exact=True).click()
        wait_for_parts(page, [8 * MIB])
        page.close()
    [part] = library_root().glob(".uploads/*.part")
    came_to = part.stat().st_size  # what was held may still go out, in part, when its tab closes
    with serving(prefix, tmp_path, port) as again:
        assert again == address
        page = context.new_page()
        page.route("**/uploads/*", break_second)
        page.goto(f"{base}datasets")
        choose(page, "set", archive)
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_role("link", name="Download set version 1").wait_for()
        assert sent[0] == came_to >= 8 * MIB  # from where the first tab came to
        assert sent[1] == sent[2]  # and again what the broken line carried
        context.close()
    [version] = versions(Kind.DATASETS)
    with zipfile.ZipFile(archive) as file:
        assert (version.path / "a.bin").read_bytes() == file.read("a.bin")


def test_upload_is_paused_and_cancelled(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    held = ["PATCH"]

    def hold(route: Route, request: Request) -> None:
        if request.method not in held:
            route.continue_()

    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.goto(f"{page.url}datasets")
        page.route("**/uploads/*", hold)
        choose(page, "set", large(tmp_path))
        with page.expect_request(lambda request: request.method == "PATCH"):
            page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_role("button", name="Pause").click()
        held.clear()
        page.get_by_role("button", name="Go on").wait_for()
        page.wait_for_timeout(300)
        wait_for_parts(page, [0])
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("Cancelled: nothing was added.").wait_for()
        wait_for_parts(page, [])
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_role("link", name="Download set version 1").wait_for()
    assert len(versions(Kind.DATASETS)) == 1


def test_refused_uploads_say_why(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    full = {"status": 507, "headers": {"x-dist-train": "1"}, "body": json.dumps({"error": "The disk is full."})}
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.goto(f"{page.url}loaders")
        state = page.locator("#upload-state")
        page.route("**/uploads/*", lambda route: route.fulfill(**full))
        choose(page, "bks", tutorial(tmp_path))
        page.get_by_role("button", name="Add", exact=True).click()
        state.get_by_text("The disk is full.").wait_for()
        page.unroute("**/uploads/*")
        page.get_by_role("button", name="Go on").click()
        page.get_by_role("link", name="Download bks version 1").wait_for()
        (tmp_path / "not.zip").write_text("not a zip")
        choose(page, "other", tmp_path / "not.zip")
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_text("other was not added. The zip of other is not a readable zip").wait_for()
        page.get_by_role("button", name="Dismiss other").click()
        page.get_by_text("was not added").wait_for(state="detached")
        with (tmp_path / "big.zip").open("wb") as file:
            file.truncate(300 * MIB)
        choose(page, "big", tmp_path / "big.zip")
        page.get_by_role("button", name="Add", exact=True).click()
        state.get_by_text("more than 268.4 MB").wait_for()


def test_two_tabs_upload_one_file(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    archive = large(tmp_path)
    with serving(prefix, tmp_path) as address, opened(browser, address) as first:
        second = first.context.new_page()
        for page in (first, second):
            page.goto(f"{first.url.split('datasets')[0]}datasets")
            choose(page, "set", archive)
        for page in (first, second):
            page.get_by_role("button", name="Add", exact=True).click()
        for page in (first, second):
            page.get_by_role("link", name="Download set version 1").wait_for()
    assert len(versions(Kind.DATASETS)) == 1


def test_keyboard_alone_creates_and_deletes(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.goto(f"{page.url}datasets")
        page.on("dialog", lambda dialog: dialog.accept())

        def tab_to(name: str) -> None:
            active = "(({ariaLabel, labels, textContent}) => ariaLabel || labels?.[0]?.textContent || textContent)"
            for _ in range(40):
                page.keyboard.press("Tab")
                if page.evaluate(f"{active}(document.activeElement)") == name:
                    return
            raise AssertionError(f"{name} is not reached")

        tab_to("Name")
        page.keyboard.type("mnist")
        tab_to("Create an empty one")
        page.keyboard.press("Enter")
        page.get_by_text("It is being added").wait_for()
        page.get_by_role("link", name="Download mnist version 1").wait_for()
        tab_to("Delete mnist version 1")
        page.keyboard.press("Enter")
        page.get_by_text("It is deleted").wait_for()
    assert versions(Kind.DATASETS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_phone(scheme: Any, prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    add_zip(Kind.MODELS, "bks", tutorial(tmp_path))
    add_zip(Kind.MODELS, "a_long_name_" * 6, zipped(tmp_path / "b.zip", **{"bks_model.py": b"class UserModel: pass\n"}))
    add_empty("mnist-empty")
    with serving(prefix, tmp_path) as address:
        for width in (1280, 390):
            options: dict[str, Any] = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
            with opened(browser, address, **options) as page:
                base = page.url
                for path in ("models", "loaders", "datasets"):
                    page.goto(base + path)
                    if path == "datasets":
                        choose(page, "b", large(tmp_path, MIB))
                        page.route("**/uploads/*", lambda _route: None)
                        page.get_by_role("button", name="Add", exact=True).click()
                        page.get_by_role("button", name="Pause").wait_for()
                    found = Axe().run(page).response["violations"]
                    serious = [each["id"] for each in found if each["impact"] in ("serious", "critical")]
                    assert serious == [], (path, json.dumps(found)[:3000])
                    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                    assert wide <= 0, (path, width, wide)


def test_nothing_can_be_clicked_before_scripts_have_run(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    held: list[Route] = []
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.route("**/upload.js", lambda route: held.append(route))
        page.goto(page.url + "models", wait_until="commit")
        choose(page, "bks", tutorial(tmp_path))
        add = page.get_by_role("button", name="Add", exact=True)
        with pytest.raises(PlaywrightTimeout, match="Timeout 3000ms exceeded"):
            add.click(timeout=3000)
        for route in held:
            route.continue_()
        add.click()
        page.get_by_text("UserModel: loss, metrics").wait_for()


def test_uploads_work_behind_prefix(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "proxy").mkdir()
    with serving(prefix, tmp_path) as address:
        upstream = address.split(":")[2].split("/")[0]
        script = str(ROOT / "tests" / "support" / "prefix_proxy.py")
        with started([*prefix, "python3", script, "8098", "/user/me", upstream], tmp_path / "proxy") as proxy:
            assert proxy.stdout is not None
            proxy.stdout.readline()
            with opened(browser, "http://127.0.0.1:8098/user/me/" + address.split("/")[3]) as page:
                page.on("dialog", lambda dialog: dialog.accept())
                page.get_by_role("link", name="Models").click()
                choose(page, "bks", tutorial(tmp_path))
                page.get_by_role("button", name="Add", exact=True).click()
                page.get_by_text("UserModel: loss, metrics").wait_for()
                page.get_by_role("button", name="Delete bks version 1").click()
                page.get_by_text("It is deleted").wait_for()
                assert page.url.startswith("http://127.0.0.1:8098/user/me/models")
