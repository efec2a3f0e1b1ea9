"""The page in a real browser, in a network namespace without a network."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from dist_train.atomic_files import read_json, write_json
from dist_train.runs.error_report import record_error
from support.browser import needs_namespace, opened, serving, wait_for_state
from support.page import write_run
from support.patience import PATIENCE_S, wait_until
from support.processes import ROOT, started
from support.run_files import metrics_without_times, status, status_of, step_of
from support.tiny_runs import write_at
from support.trainings import HELD, STEPS, release, train, trained_once
from support.user_nets import READY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = [needs_namespace, pytest.mark.xdist_group("browser")]

OLD = "These values are old"
SHOW_STEP = "step => [...document.querySelectorAll('.progress')].every(cell => cell.innerText.trim() === `${step}/20`)"
PATIENCE_MS = 1000 * PATIENCE_S


def test_run_of_shell_is_stopped_and_resumed_from_page_bit_identically(
    prefix: list[str], browser: Browser, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    undisturbed = trained_once(tmp_path_factory, "page", HELD)
    run_dir = tmp_path / "runs" / "r"
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.get_by_text("dist-train train -c mnist").wait_for()  # no run yet
        with started(train("model.name=support.user_nets:GatedInSetUp", nproc=1), tmp_path) as training:
            page.locator("#body tr[data-state=SETUP]").get_by_role("link", name="r").click()  # it appears by itself
            wait_for_state(page, "SETUP")
            (tmp_path / READY).touch()
            wait_for_state(page, "TRAINING")
            wait_until(lambda: step_of(run_dir) > 0, "step")
            page.get_by_role("button", name="Save now").click()
            wait_until(lambda: any(run_dir.glob("checkpoints/step_*/manifest.json")), "save")
            page.locator("#epochs a", has_text=".safetensors").first.wait_for()
            page.get_by_role("button", name="Stop").click()
            wait_for_state(page, "INTERRUPT")
            assert training.wait() == 0
        assert 0 < step_of(run_dir) < STEPS
        page.get_by_role("button", name="Go on").click()
        wait_for_state(page, "TRAINING")
        release(tmp_path)
        wait_for_state(page, "FINISHED")
        result = read_json(run_dir / "result.json")
        shown = page.locator("#test-accuracy")
        assert float(shown.get_attribute("data-value") or "nan") == result["test/accuracy"]
        assert shown.inner_text() == f"{100 * result['test/accuracy']:.2f} %"
        assert (status(run_dir), status_of(run_dir)["attempt"]) == ("FINISHED", 2)
        assert metrics_without_times(run_dir) == metrics_without_times(undisturbed)
        link = page.locator("#epochs a", has_text=".pth").first
        with page.expect_download() as download:
            link.click()
        step = int(re.search(r"(\d+)\.pth$", link.get_attribute("href") or "")[1])  # type: ignore[index]
        loaded = torch.load(download.value.path(), weights_only=True)
        saved = load_file(str(run_dir / f"checkpoints/step_{step:08d}/model.safetensors"))
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_other_answers_leave_rows_as_they_are(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "kept", "INTERRUPT", 10)
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        rows, bar = page.locator("#body tr"), page.locator("#bar")
        assert rows.count() == 1
        page_of_a_proxy = "<html><body><form>Log in to the proxy</form></body></html>"
        ours = {"x-dist-train": "1"}
        answers: list[tuple[dict[str, Any], str]] = [
            *(({"status": code, "body": page_of_a_proxy}, "something other than") for code in (403, 404, 500, 502)),
            *(
                ({"status": code, "body": "<b>no</b>", "headers": ours}, f"answered with {code}")
                for code in (404, 500, 503)
            ),
            ({"status": 403, "body": "<b>no</b>", "headers": ours}, "log in again"),
            ({"status": 200, "body": page_of_a_proxy, "content_type": "text/html"}, "something other than"),
        ]
        for answer, reason in answers:
            page.route("**/rows?**", answering(answer))
            bar.get_by_text(reason).wait_for()
            assert OLD in bar.inner_text()
            assert rows.count() == 1
            page.unroute("**/rows?**")
            write_json(tmp_path / "runs/kept/status.json", {"state": "INTERRUPT", "step": len(reason)})
            bar.wait_for(state="hidden")
        page.route("**/rows?**", hang)
        bar.get_by_text("does not answer").wait_for()
        assert rows.count() == 1
        page.unroute("**/rows?**")
        bar.wait_for(state="hidden")


def answering(answer: dict[str, Any]) -> Callable[[Route], None]:
    return lambda route: route.fulfill(**answer)


def hang(_route: Route) -> None:
    pass


def test_page_recovers_when_server_is_restarted(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "one", "INTERRUPT", 10)
    with serving(prefix, tmp_path) as address:
        port = int(address.split(":")[2].split("/")[0])
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_url(lambda url: "token" not in url)
    page.locator("#bar").get_by_text("cannot be reached").wait_for(timeout=PATIENCE_MS)
    assert page.locator("#body tr").count() == 1
    write_run(tmp_path / "runs", "two", "INTERRUPT", 10)
    with serving(prefix, tmp_path, port) as again:
        assert again == address  # the token too
        page.locator("#bar").wait_for(state="hidden", timeout=PATIENCE_MS)
        page.get_by_role("link", name="two").wait_for(timeout=PATIENCE_MS)
        context.close()


def test_login_by_link_on_another_site(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    """A link in a web mail: the cookie is strict, and the page opens all the same."""
    write_run(tmp_path / "runs", "mine")
    mail = tmp_path / "mail"
    mail.mkdir()
    with serving(prefix, tmp_path) as address:
        (mail / "index.html").write_text(f'<a href="{address}">open</a>')
        server = [*prefix, "python3", "-u", "-m", "http.server", "8099", "--bind", "127.0.0.1"]
        with started(server, mail) as foreign:
            assert foreign.stdout is not None
            foreign.stdout.readline()
            context = browser.new_context()
            page = context.new_page()
            page.goto("http://localhost:8099/")
            page.get_by_text("open").click()
            page.get_by_role("link", name="mine").wait_for(timeout=PATIENCE_MS)
            assert "token" not in page.url
            [cookie] = context.cookies(address)
            assert (cookie["sameSite"], cookie["httpOnly"], cookie["path"]) == ("Strict", True, "/")
            context.close()


def test_order_focus_and_selection_stay_during_updates(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    for name in "abcde":
        write_run(tmp_path / "runs", name, "TRAINING", 4)
    with serving(prefix, tmp_path) as address, opened(browser, f"{address}&sort=name") as page:
        page.goto(f"{page.url}?sort=name")
        page.get_by_label("Select c").check()
        page.get_by_role("button", name="Stop d").focus()
        order = page.locator("#body a").all_inner_texts()
        for step in range(5, 9):
            for name in "abcde":
                old = read_json(tmp_path / "runs" / name / "status.json")
                write_json(tmp_path / "runs" / name / "status.json", old | {"step": step})
            page.wait_for_function(SHOW_STEP, arg=step)
            assert page.locator("#body a").all_inner_texts() == order
            assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Stop d"
            assert page.get_by_label("Select c").is_checked()


def test_keyboard_alone_is_enough(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    for name in ("alpha", "beta", "gamma"):
        write_run(tmp_path / "runs", name, "TRAINING", 4)
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        keys = page.keyboard
        keys.press("/")
        keys.type("eta")
        page.wait_for_function("() => document.querySelectorAll('#body tr').length === 1")
        keys.press("Escape")  # the browser clears the filter
        page.wait_for_function("() => document.querySelectorAll('#body tr').length === 3")
        while page.evaluate("document.activeElement.textContent") != "beta":
            keys.press("j")
        keys.press("x")
        assert page.get_by_label("Select beta").is_checked()
        keys.press("s")
        page.get_by_text("stops after its current step").wait_for()
        assert (tmp_path / "runs/beta/STOP").exists()
        page.keyboard.press("j")
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/**")
        for _ in range(40):  # everything is reached with Tab
            keys.press("Tab")
            if page.evaluate("document.activeElement.textContent") == "Settings":
                break
        keys.press("Enter")
        page.wait_for_url("**/settings")


def test_double_click_is_one_request(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "run")
    sent: list[str] = []
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{page.url}jobs/run")
        page.evaluate("const button = document.querySelector('#delete'); button.click(); button.click()")
        page.get_by_text("It is in the bin").wait_for()
        page.go_back()
        page.goto(f"{page.url.split('jobs')[0]}bin")
        page.get_by_role("button", name="Restore").click()  # the next page sends again
        page.get_by_text("It is back").wait_for()
    assert len(sent) == 2


# Keeps the charts that the page makes in `charts`, by title.
KEEP_CHARTS = """
let own;
window.charts = {};
const keep = {construct: (target, [options, ...rest]) => charts[options.title] = new target(options, ...rest)};
Object.defineProperty(window, "uPlot", {get: () => own, set: (made) => { own = new Proxy(made, keep); }});
"""
SHOWS = "([step, loss]) => charts.Loss.data[0].at(-1) === step && charts.Loss.data[1].at(-1) === loss"
RANGE = "() => [charts.Loss.scales.x.min, charts.Loss.scales.x.max]"


def test_zoom_survives_updates(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    """Also an update in the middle of a drag, and one that changes the curves of the chart."""
    run_dir = write_run(tmp_path / "runs", "run", "TRAINING", 10)

    def appended(step: int, loss: float) -> None:
        line = {"step": step, "samples": 8 * step, "time": 1000.0 + step, "attempt": 1, "train/loss": loss}
        run_dir.append_metrics(line)
        page.wait_for_function(SHOWS, arg=[step, loss])

    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.add_init_script(KEEP_CHARTS)
        page.goto(f"{page.url}jobs/run")
        page.wait_for_function("() => window.charts.Loss?.data[0].at(-1) === 10")
        appended(12, 0.2)
        assert page.evaluate(RANGE) == [2, 12]  # not zoomed: it grows
        plotted = page.locator("#curves .u-over").first
        plotted.scroll_into_view_if_needed()
        box = plotted.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
        appended(12, 0.3)  # the last point again: nothing moves
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 50)
        page.mouse.up()
        zoomed = page.evaluate(RANGE)
        assert zoomed == pytest.approx([5, 8], abs=0.1)
        appended(14, 0.1)
        assert page.evaluate(RANGE) == zoomed
        appended(16, 0.0001)  # from here on with a logarithmic axis: another chart
        page.wait_for_function("() => charts.Loss.scales.y.distr === 3")
        assert page.evaluate(RANGE) == zoomed
        plotted.dblclick()
        appended(18, 0.1)
        assert page.evaluate(RANGE) == [2, 18]
        page.locator("#axis").select_option("samples")
        page.wait_for_function("() => charts.Loss.data[0].at(-1) === 144")
        assert page.evaluate(RANGE) == [16, 144]


def test_comparison_says_when_server_is_gone(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / "runs", name)
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        page.goto(f"{page.url}compare?run=a&run=b")
        page.locator("#curves canvas").first.wait_for()
        page.route("**/points**", lambda route: route.abort())
        page.locator("#bar").get_by_text("cannot be reached").wait_for()
        page.unroute("**/points**")
        page.locator("#bar").wait_for(state="hidden")


PAGES = ["", "new", "new?from=failed", "jobs/done", "jobs/failed", "jobs/done/settings", "jobs/done/logs",
         "jobs/done/files", "compare?run=done&run=failed", "machines", "bin", "login", "jobs/nothing"]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_phone(scheme: Any, prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    runs = tmp_path / "runs"
    done, failed = write_run(runs, "done"), write_run(runs, "failed", "ERROR", 10)
    write_run(runs, "running", "TRAINING", 4)
    write_at(done, 10, 0.9)
    done.rank_log(0).write_text("a line\n" * 50)
    write_json(done.layers, {"layers": [{"name": "fc", "type": "Linear", "output": "10", "parameters": 50}]})
    record_error(failed.error, ValueError("x"), 0, 1, "Traceback")
    with serving(prefix, tmp_path) as address:
        for width in (1280, 390):
            options: dict[str, Any] = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
            with opened(browser, address, **options) as page:
                base = page.url
                for path in PAGES:
                    page.goto(base + path)
                    found = Axe().run(page).response["violations"]
                    serious = [each["id"] for each in found if each["impact"] in ("serious", "critical")]
                    assert serious == [], (path, json.dumps(found)[:3000])
                    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                    assert wide <= 0, (path, width, wide)


def test_hostile_text_is_not_executed(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    attack = "<img src=x onerror=window.hit=1>"
    runs = tmp_path / "runs"
    for name in (f"run {attack}", "100%2e", "a'b\"c"):
        run_dir = write_run(runs, name, "ERROR", 10)
        record_error(run_dir.error, ValueError(attack), 0, 1, attack)
        run_dir.rank_log(0).write_text(attack)
        write_json(run_dir.result, {"test/accuracy_by_class": {attack: 0.5}})
        run_dir.append_metrics({"step": 10, "val/loss": 1.0, f"val/{attack}": 0.5})
    with serving(prefix, tmp_path) as address, opened(browser, address) as page:
        base = page.url
        links = [link.get_attribute("href") for link in page.locator("#body a").all()]
        assert len(links) == 3
        for link in links:
            for tab in ("", "/settings", "/logs", "/files"):
                answer = page.goto(f"{base}{link}{tab}")
                assert answer is not None
                assert answer.status == 200
                page.wait_for_timeout(300)
                assert page.evaluate("window.hit") is None
        page.goto(f"{base}compare?" + "&".join(f"run={str(link).removeprefix('jobs/')}" for link in links))
        page.locator("#curves canvas").first.wait_for()
        assert page.evaluate("window.hit") is None


def test_page_works_behind_prefix(prefix: list[str], browser: Browser, tmp_path: Path) -> None:
    """All addresses are relative: a proxy may put the page below any path, and the cookie stays below it."""
    write_run(tmp_path / "runs", "run")
    (tmp_path / "proxy").mkdir()
    with serving(prefix, tmp_path) as address:
        upstream = address.split(":")[2].split("/")[0]
        script = str(ROOT / "tests" / "support" / "prefix_proxy.py")
        with started([*prefix, sys.executable, script, "8098", "/user/me", upstream], tmp_path / "proxy") as proxy:
            assert proxy.stdout is not None
            proxy.stdout.readline()
            below = "http://127.0.0.1:8098/user/me/"
            with opened(browser, below + address.split("/")[3]) as page:
                page.get_by_role("link", name="run", exact=True).click()
                for name in ("Settings", "Logs", "Files", "Results"):
                    page.get_by_role("link", name=name).click()
                    page.get_by_role("heading", name="run", exact=True).wait_for()
                page.locator("#curves canvas").first.wait_for()
                page.get_by_role("button", name="Copy", exact=True).click()
                page.locator("#new[data-htmx-powered]").wait_for()  # what is typed earlier is not checked
                page.get_by_label("Learning rate").fill("fast")
                page.get_by_text("optimizer.lr=fast").wait_for()
                page.get_by_label("Learning rate").fill("0.5")
                page.locator("#fine").wait_for()
                page.get_by_role("button", name="Create", exact=True).click()
                page.get_by_text("It is created").wait_for()
                page.get_by_role("link", name="Jobs").click()
                page.get_by_role("link", name="run", exact=True).click()
                page.on("dialog", lambda dialog: dialog.accept())
                page.get_by_role("button", name="Delete").click()
                page.get_by_text("It is in the bin").wait_for()
                assert page.url.startswith(below)
                [cookie] = page.context.cookies(below)
                assert cookie["path"] == "/user/me"
