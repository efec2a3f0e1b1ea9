"""BK.Synapse's tutorial on two nodes of Slurm, from the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.atomic_files import read_json
from support.browser import chromium, needs_browser, opened, serving, wait_for_state
from support.cluster import Cluster
from support.run_files import status_of
from support.tutorial import accuracy_of, fill_form, shown_accuracy, upload_all

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600), needs_browser]


def test_tutorial_on_two_nodes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    submit_host = [part for part in cluster.command("head") if not part.startswith("--wdns")]
    network = [part for part in submit_host if part not in ("--uts", "--mount", "--pid")]
    run_dir = tmp_path / "runs/tutorial"
    (tmp_path / "server").mkdir()
    here = submit_host.index("--")
    prefix = [*submit_host[:here], f"--wdns={tmp_path}/server", *submit_host[here:]]
    with chromium(network, tmp_path) as browser, serving(prefix, tmp_path) as address, opened(browser, address) as page:
        upload_all(page, page.url, tmp_path)
        fill_form(page, "100 steps")
        page.get_by_label("Slurm").check()
        page.get_by_label("Nodes", exact=True).fill("2")
        page.get_by_label("Processes per node").fill("1")
        page.get_by_label("Time limit").fill("30")
        page.get_by_label("Partition").fill("lwo")
        page.get_by_text("fine: global batch 64 = 32 per device x 1 micro-step x 2 processes").wait_for()
        page.get_by_role("button", name="Create and run").click()
        page.get_by_text("--partition=lwo does not exist. Use one of high, low, low0.").wait_for()
        assert not run_dir.exists()
        page.get_by_label("Partition").fill("low")
        page.get_by_role("button", name="Create and run").click()
        page.get_by_text("It waits in the queue").wait_for()
        wait_for_state(page, "FINISHED")
        result = read_json(run_dir / "result.json")
        assert shown_accuracy(page) == f"{100 * result['val/accuracy']:.2f} %"
        with page.expect_download() as download:
            page.locator("#epochs a", has_text=".pth").first.click()
        assert accuracy_of(download.value.path(), tmp_path / "mnist") > 0.6
    assert (result["world_size"], read_json(run_dir / "run.json")["num_nodes"]) == (2, 2)
    assert status_of(run_dir)["slurm_job_id"] == read_json(run_dir / "slurm.json")["job"]
