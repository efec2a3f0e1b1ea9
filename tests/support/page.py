"""Runs for the page, written by the product's own code without a training, and a client of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from dist_train.config.loading import parse_config
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.web.access import Access
from dist_train.web.app import make_app

# Title and columns of the table in docs/web.md. A module adds rows to it with `TABLE, COLUMNS = OF_TABLE`.
OF_TABLE = ("the page", ("what", "cases", "outcome"))

HOST = "http://127.0.0.1:8080"


def write_run(folder: Path, name: str, state: Any = "FINISHED", step: int = 20, **status: Any) -> RunDir:
    """Write a run of 20 steps with an evaluation every ten; a finished one has a result."""
    run_dir = RunDir(folder / name)
    run_dir.create()
    begin_attempt(run_dir, parse_config({"seed": 3}), f"id-{len(name)}")
    for at in range(2, step + 1, 2):
        line = {"step": at, "epoch": at / 10, "samples": at * 8, "attempt": 1, "time": 1000.0 + at}
        run_dir.append_metrics({**line, "train/loss": 2 / at, "train/accuracy": 1 - 1 / at, "train/lr": 0.1})
        if at % 10 == 0:
            run_dir.append_metrics(
                {**line, "val/loss": 1 / at, "val/accuracy": 1 - 1 / at, "val/seen": 50, "val/f1": 0.5, "epoch_s": 1.5}
            )
    best = {"val/accuracy": 1 - 1 / step}
    metrics = {"train/loss": 2 / step, "perf/samples_per_s": 1234.5}
    run_dir.status.update(
        state=state, step=step, total_steps=20, epoch=step / 10, world_size=2, best=best, metrics=metrics, **status
    )
    run_dir.write_provenance({"world_size": 2, "num_nodes": 1, "argv": ["dist-train", "train", "-c", "mnist"]})
    if state == "FINISHED":
        run_dir.write_result(
            {"state": state, "test/accuracy": 0.9371, "test/accuracy_by_class": {"a": 1.0, "b": 0.875}}
        )
    return run_dir


def client_of(folder: Path, state: Path, *, logged_in: bool = True, **options: Any) -> tuple[TestClient, Access]:
    """Return a client of the page for the runs in `folder`, with a session unless `logged_in` is False."""
    access = Access(state / "web.json")
    client = TestClient(make_app(folder, access, **options), base_url=HOST, follow_redirects=False)
    if logged_in:
        client.cookies.set(access.cookie, access.open_session())
    return client, access


SAME_ORIGIN = {"sec-fetch-site": "same-origin"}  # as a browser sends for the page's own forms
