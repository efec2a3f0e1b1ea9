"""The form of a new job in a real browser without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dist_train.config.loading import load_config
from dist_train.runs.summary import summarise
from support.browser import needs_namespace, opened, serving
from support.patience import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [needs_namespace, pytest.mark.xdist_group("browser")]


def test_mistakes_are_told_while_typing(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.goto(f"{page.url}new")
        rate, error = page.get_by_label("Learning rate"), page.locator("#error-optimizer-lr")
        rate.press("End")
        rate.press_sequentially("x")
        error.get_by_text("optimizer.lr=0.001x: input should be a valid number").wait_for()
        assert rate.evaluate("field => document.activeElement === field")
        assert (rate.get_attribute("aria-invalid"), rate.input_value()) == ("true", "0.001x")
        page.get_by_text("Not yet: see").wait_for()
        page.get_by_role("button", name="Try one batch").click()
        page.get_by_text("Mend the form first.").wait_for()
        page.get_by_label("One name=value a line").fill("optimizer.learning_rate=1")
        page.get_by_text("Did you mean optimizer.lr?").wait_for()
        page.get_by_label("One name=value a line").fill("seed=3")
        rate.fill("0.01")
        page.get_by_label("Processes", exact=True).fill("2")
        page.get_by_text("fine: global batch 64 = 32 per device x 1 micro-step x 2 processes").wait_for()
        command = page.locator("#command code").inner_text()
        begins, ends = "dist-train train -c mnist_bks --nproc 2 seed=3 optimizer.lr=0.01 ", " --run-name mnist_bks-1"
        assert command == f"{begins}runs_dir={tmp_path}/runs{ends}"  # the server was started in another folder
        assert error.inner_text() == ""
        assert rate.get_attribute("aria-invalid") == "false"
        assert page.get_by_label("Nodes").is_hidden()
        page.get_by_label("Slurm").check()
        page.get_by_label("Nodes").fill("2")
        page.get_by_text("dist-train slurm submit -c mnist_bks --nodes 2 --nproc 1 --time 60").wait_for()
        assert page.get_by_label("Processes", exact=True).is_hidden()


def test_keyboard_alone_makes_job(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.keyboard.press("n")
        page.wait_for_url("**/new")
        wanted = {"Name": "by-keys", "Learning rate": "0.5"}
        for _ in range(60):
            page.keyboard.press("Tab")
            label = page.evaluate(
                "document.activeElement.labels?.[0]?.textContent ?? document.activeElement.textContent"
            )
            if label in wanted:
                page.keyboard.press("Control+a")
                page.keyboard.type(wanted.pop(label))
            if label == "Create":
                break
        assert not wanted
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/by-keys?done=create")
    assert summarise(tmp_path / "runs/by-keys").state == "CREATED"
    assert load_config(str(tmp_path / "runs/by-keys/config.yaml")).optimizer.lr == 0.5


def test_form_works_without_script(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    with serving(prefix, tmp_path) as address, opened(browser, address, java_script_enabled=False) as page:
        page.goto(f"{page.url}new")
        page.get_by_label("Start from the config").select_option("smoke")
        page.get_by_role("button", name="Load").click()
        page.get_by_label("Learning rate").fill("x")
        page.get_by_role("button", name="Create", exact=True).click()
        page.get_by_text("optimizer.lr=x: input should be").wait_for()
        page.get_by_label("Learning rate").fill("0.1")
        page.get_by_role("button", name="Create", exact=True).click()
        page.get_by_role("heading", name="smoke-1").wait_for()
    wait_until(lambda: (tmp_path / "runs/smoke-1/config.yaml").exists(), "config")
