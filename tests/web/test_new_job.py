"""The page of a new job: what it shows, what it creates, and what it leaves alone."""

from __future__ import annotations

import html
import re
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dist_train.atomic_files import read_json
from dist_train.config.loading import bundled_configs, load_config
from dist_train.errors import LaunchError
from dist_train.launch import trial
from dist_train.launch.slurm import commands
from dist_train.launch.slurm.commands import Partition
from dist_train.runs.summary import summarise
from dist_train.web import job_pages
from support.page import SAME_ORIGIN, client_of, write_run
from support.run_files import contents

JSON = {**SAME_ORIGIN, "accept": "application/json"}
TEXTS = {"config": "mnist_bks", "name": "job", "model": "mlp", "train_for": "3 steps", "nproc": "2"}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(job_pages, "ensure_keeper", lambda folder: (folder / "keeper").touch())
    return client_of(tmp_path / "runs", tmp_path)[0]


def texts_in(page: str) -> dict[str, str]:
    """Return what the fields of the form hold."""
    form = page.split('<form id="new"')[1]
    inputs = re.findall(r'<input [^>]*name="([^"]+)"[^>]*value="([^"]*)"(?! *>? This)', form)
    selects = re.findall(r'<select [^>]*name="([^"]+)".*?<option value="([^"]*)" selected>', form, re.DOTALL)
    lines = re.findall(r'<textarea [^>]*name="([^"]+)"[^>]*>([^<]*)</textarea>', form)
    return {name: html.unescape(text) for name, text in (*inputs, *selects, *lines) if name != "where"}


def test_form_begins_with_config(client: TestClient) -> None:
    for name in bundled_configs():
        page = client.get(f"/new?config={name}")
        texts, config = texts_in(page.text), load_config(name)
        assert (texts["config"], texts["name"], texts["model"]) == (name, f"{name}-1", config.model.name)
        assert (texts["global_batch_size"], texts["optimizer.name"]) == (
            str(config.global_batch_size), config.optimizer.name
        )  # fmt: skip
        assert (texts["lines"], texts["nproc"]) == ("", "1")
        assert "fine: global batch" in page.text
    first = client.get("/new").text
    assert texts_in(first)["train_for"] == "10"
    assert '<option value="cifar10">cifar10, not on this machine</option>' in first
    assert '<option value="mnist" selected>mnist</option>' in first
    assert client.get("/new?config=nothing").status_code == client.get("/new?from=nothing").status_code == 404


def test_run_is_copied(client: TestClient, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "runs", "bks-3", "ERROR")
    run_dir.write_config(load_config("mnist_bks", ["optimizer.lr=0.5", "seed=9", "tracking.tags=[a b]"]))
    assert 'formaction="../new" name="from" value="bks-3"' in client.get("/jobs/bks-3").text
    texts = texts_in(client.get("/new?from=bks-3").text)
    assert (texts["config"], texts["name"], texts["nproc"]) == ("mnist_bks", "bks-2", "2")
    assert (texts["optimizer.lr"], texts["lines"]) == ("0.5", "seed=9\ntracking.tags=[a b]")


def test_run_of_slurm_is_copied_with_its_nodes(client: TestClient, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "runs", "run", "ERROR", slurm_job_id="7")
    run_dir.write_provenance({"num_nodes": 2})
    page = client.get("/new?from=run").text
    assert (texts_in(page)["nodes"], texts_in(page)["per_node"]) == ("2", "1")
    assert 'value="slurm" checked' in page


def test_damaged_run_is_not_copied(client: TestClient, tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "run").config.write_text("seed: [")
    assert client.get("/new?from=run").status_code == 409


def test_check_tells_mistakes_and_command(client: TestClient) -> None:
    wrong = client.post("/new/check", data=TEXTS | {"optimizer.lr": "<x>", "nproc": "3"}, headers=SAME_ORIGIN)
    assert wrong.status_code == 200
    at = r'id="error-optimizer-lr" hx-swap-oob="true">optimizer.lr=&lt;x&gt;: input should be a valid number'
    assert re.search(at, wrong.text)
    assert 'id="error-nproc" hx-swap-oob="true"></span>' in wrong.text
    assert '<a href="#field-optimizer-lr">Learning rate</a>' in wrong.text
    right = client.post("/new/check", data=TEXTS, headers=SAME_ORIGIN).text
    assert "fine: global batch 64 = 32 per device x 1 micro-step x 2 processes" in right
    assert "dist-train train -c mnist_bks --nproc 2 &#39;train_for=3 steps&#39; model.name=mlp" in right


def test_job_is_created_once(client: TestClient, tmp_path: Path) -> None:
    answer = client.post("/new/create", data=TEXTS, headers=SAME_ORIGIN)
    assert (answer.status_code, answer.headers["location"]) == (303, "../jobs/job?done=create")
    summary = summarise(tmp_path / "runs/job")
    assert summary.state == "CREATED"
    wanted = load_config("mnist_bks", ["model.name=mlp", "train_for=3 steps", f"runs_dir={tmp_path}/runs"])
    assert load_config(str(tmp_path / "runs/job/config.yaml")) == wanted
    assert read_json(tmp_path / "runs/job/job.json")["nproc"] == 2
    before = contents(tmp_path / "runs")
    for action in ("create", "run"):
        again = client.post(f"/new/{action}", data=TEXTS | {"model": "bks"}, headers=SAME_ORIGIN)
        assert (again.status_code, again.headers["location"]) == (303, "../jobs/job?done=there")
    assert contents(tmp_path / "runs") == before
    assert "Nothing was created" in client.get("/jobs/job?done=there").text


def test_clicks_at_once_create_one_job(client: TestClient, tmp_path: Path) -> None:
    answers: list[str] = []

    def click() -> None:
        answers.append(client.post("/new/run", data=TEXTS, headers=SAME_ORIGIN).headers["location"])

    threads = [threading.Thread(target=click) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["../jobs/job?done=run", *["../jobs/job?done=there"] * 7]
    summary = summarise(tmp_path / "runs/job")
    assert (summary.state, summary.queue_number) == ("QUEUED", 1)
    assert (tmp_path / "runs/keeper").exists()


def test_wrong_form_creates_nothing_and_keeps_what_was_entered(client: TestClient, tmp_path: Path) -> None:
    texts = TEXTS | {"optimizer.lr": "<b>", "lines": "</textarea><script>\nseed=1", "name": 'a"b'}
    answer = client.post("/new/run", data=texts, headers=SAME_ORIGIN)
    assert answer.status_code == 422
    assert "<b>" not in answer.text
    assert "<script>\n" not in answer.text
    shown = texts_in(answer.text)
    assert {name: shown[name] for name in texts} == texts
    errors = client.post("/new/run", data=texts, headers=JSON)
    assert errors.status_code == 422
    assert set(errors.json()["errors"]) == {"optimizer.lr", "lines", "name"}
    unknown = client.post("/new/create", data=TEXTS | {"batch_size": "64"}, headers=JSON)
    assert "There is no field batch_size. Did you mean global_batch_size?" in unknown.json()["errors"]["lines"]
    for broken in ({}, {"config": "no"}, {"config": "mnist", "name": "x", "where": "moon", "nodes": "-"}):
        assert client.post("/new/create", data=broken, headers=SAME_ORIGIN).status_code == 422
        assert client.post("/new/check", data=broken, headers=SAME_ORIGIN).status_code == 200
    assert not (tmp_path / "runs").exists()


def test_other_sites_create_nothing(client: TestClient, tmp_path: Path) -> None:
    for action in ("create", "run", "try", "check"):
        assert client.post(f"/new/{action}", data=TEXTS, headers={"sec-fetch-site": "cross-site"}).status_code == 403
        assert client.get(f"/new/{action}").status_code == 405
    assert not (tmp_path / "runs").exists()


# --- Slurm -----------------------------------------------------------------------------------------------------------

SLURM = TEXTS | {"where": "slurm", "nodes": "2", "per_node": "2", "time": "10", "partition": "low"}


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that were given to Slurm, whose partition `low` has two nodes."""
    scripts: list[str] = []
    monkeypatch.setattr(commands, "partitions", lambda *_: {"low": Partition(2, 4, "infinite", is_default=True)})
    monkeypatch.setattr(commands, "submit", lambda script: scripts.append(script) or str(len(scripts)))  # type: ignore[func-returns-value]
    monkeypatch.setattr(commands, "jobs", lambda ids: {})
    return scripts


def test_job_is_submitted_once(client: TestClient, tmp_path: Path, submitted: list[str]) -> None:
    for done in ("run", "there"):
        answer = client.post("/new/run", data=SLURM, headers=SAME_ORIGIN)
        assert (answer.status_code, answer.headers["location"]) == (303, f"../jobs/job?done={done}")
    [script] = submitted
    assert "#SBATCH --nodes=2\n" in script
    assert "--run-name=job" in script
    assert read_json(tmp_path / "runs/job/slurm.json")["job"] == "1"
    assert (tmp_path / "runs/job/job.sbatch").read_text() == script
    assert not (tmp_path / "runs/job/job.json").exists()
    assert not (tmp_path / "runs/keeper").exists()


def test_job_that_slurm_cannot_run_is_refused(
    client: TestClient, tmp_path: Path, submitted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.post("/new/run", data=SLURM | {"nodes": "4"}, headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert 'id="error-nodes">--nodes=4, but partition low has 2.' in answer.text
    assert texts_in(answer.text)["train_for"] == "3 steps"  # what was entered is still there
    answer = client.post("/new/create", data=SLURM, headers=SAME_ORIGIN)
    assert answer.status_code == 409
    assert "choose Create and run" in answer.text

    def refuse(script: str) -> str:
        raise LaunchError("sbatch: no")

    monkeypatch.setattr(commands, "submit", refuse)
    assert 'id="error-where">sbatch: no' in client.post("/new/run", data=SLURM, headers=SAME_ORIGIN).text
    assert submitted == []
    assert list((tmp_path / "runs").iterdir()) == []  # the name is free again


# --- try one batch ---------------------------------------------------------------------------------------------------


def test_net_that_does_not_fit_is_found_by_trying(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/bks_model.py").write_text(
        "from torch import nn\n\n\nclass UserModel(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(783, 10)\n\n    def forward(self, x):\n        return self.fc(x.flatten(1))\n\n"
        "    def loss(self, output, target):\n        return nn.functional.cross_entropy(output, target)\n"
    )
    texts = TEXTS | {"model": f"{tmp_path}/net"}
    assert "fine: " in client.post("/new/check", data=texts, headers=SAME_ORIGIN).text  # the source does not show it
    tried = client.post("/new/try", data=texts, headers=SAME_ORIGIN)
    assert tried.status_code == 200
    assert 'id="failed"' in tried.text
    assert (
        "bks_model.py:10: RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x784 and 783x10).</p>"
        in tried.text
    )
    assert not (tmp_path / "runs").exists()


def test_trial_is_that_of_command_line(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def answer(*arguments: str, timeout_s: float, memory_bytes: int) -> str:
        asked.append(arguments)
        folder = next(each for each in arguments if each.startswith(f"runs_dir={tempfile.gettempdir()}/dist_train-"))
        return f"run directory {folder.partition('=')[2]}/trial\nval accuracy 9 % <>\n"

    monkeypatch.setattr(trial, "limited_output_of", answer)
    tried = client.post("/new/try", data=TEXTS, headers=SAME_ORIGIN).text
    assert 'id="works"' in tried
    assert '<pre tabindex="0">val accuracy 9 % &lt;&gt;</pre>' in tried
    [arguments] = asked
    assert arguments[:3] == ("train", "-c", "mnist_bks")
    assert {"--fast-dev-run", "model.name=mlp", "train_for=3 steps"} <= set(arguments)
    wrong: Any = client.post("/new/try", data=TEXTS | {"nproc": "x"}, headers=SAME_ORIGIN)
    assert "Mend the form first" in wrong.text
    assert len(asked) == 1
