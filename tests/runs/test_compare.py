"""Summaries and comparisons from the files of finished, live, killed and incomplete runs."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dist_train.atomic_files import write_json
from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from dist_train.runs.reports.compare import differing_settings, group_seeds, read_run, run_table, seed_table
from dist_train.runs.summary import find_runs, summarise
from support.browser import needs_browser, render_page
from support.run_files import metrics

STEPS = 40


def make_run(path: Path, settings: dict[str, Any] | None = None, *, upto: int = STEPS, gain: float = 0.0) -> RunDir:
    """Write a run as a training does. It is finished if `upto` is STEPS."""
    run_dir = RunDir(path)
    run_dir.create()
    config = parse_config({"train_for": f"{STEPS} steps", **(settings or {})})
    begin_attempt(run_dir, config, wandb_id="id")
    best = {}
    for step in range(10, upto + 1, 10):
        line = {
            "step": step,
            "epoch": step / 20,
            "samples": 64 * step,
            "attempt": run_dir.status.attempt,
            "time": 1000.0 + step,
        }
        run_dir.append_metrics(
            line | {"train/loss": 1 / step, "train/accuracy": 0.5, "perf/samples_per_s": 100.0 * step}
        )
        val = {"val/loss": 2 / step - gain, "val/accuracy": 0.8 + step / 1000 + gain, "val/seen": 100}
        run_dir.append_metrics(line | val | {"epoch_s": 1.0})
        best = val | {"step": step}
    run_dir.status.update(state="TRAINING", step=upto, total_steps=STEPS, epoch=upto / 20, best=best, world_size=2)
    if upto == STEPS:
        run_dir.write_result(
            {"state": "FINISHED", "test/accuracy": 0.8 + gain, "train_s": 2.0, "samples_per_s": 5000.0}
        )
        run_dir.status.update(state="FINISHED")
    return run_dir


def mark(run_dir: RunDir, age_s: float = 0.0, **fields: Any) -> None:
    """Change the status as if it had been written `age_s` ago."""
    written = time.time() - age_s
    run_dir.status.path.write_text(json.dumps(run_dir.status.read() | {"heartbeat": written} | fields))
    os.utime(run_dir.status.path, (written, written))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two settings with two seeds each, and one of each other kind of folder that may be beside runs."""
    for lr in (0.01, 0.1):
        for seed in (0, 1):
            make_run(tmp_path / f"lr{lr}-s{seed}", {"optimizer": {"lr": lr}, "seed": seed}, gain=lr + seed / 100)
    make_run(tmp_path / "live", upto=20)
    mark(make_run(tmp_path / "killed", upto=30), 60, pid=2**22 + 1)
    mark(make_run(tmp_path / "silent", upto=10), 600, host="elsewhere")
    half = make_run(tmp_path / "half", upto=20)
    half.config.write_text("optimizer: {lr: ")
    half.metrics.path.write_text(half.metrics.path.read_text()[:-30])
    half.status.path.write_text("{")
    (tmp_path / "queued").mkdir()
    (tmp_path / "queued/slurm.json").write_text('{"job": "7"}')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/status.json").write_text('{"state": "DONE", "step": "final"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_state_by_file_system_where_clocks_differ(off_s: float, tmp_path: Path) -> None:
    """The clock of the run's machine is an hour off: the run is TRAINING while it writes, and SILENT afterwards."""
    run_dir = make_run(tmp_path / "far", upto=20)
    mark(run_dir, 1, host="elsewhere", heartbeat=time.time() + off_s)
    assert summarise(run_dir.path).state == "TRAINING"
    mark(run_dir, 600, host="elsewhere", heartbeat=time.time() + off_s)
    assert summarise(run_dir.path).state == "SILENT"
    mark(run_dir, 600, host=socket.gethostname(), pid=2**22 + 1, heartbeat=time.time() + off_s)
    assert summarise(run_dir.path).state == "KILLED"


def test_state_of_run_ahead_of_clock(tmp_path: Path) -> None:
    """Our own clock was set back: what was written in the future says nothing."""
    run_dir = make_run(tmp_path / "far", upto=20)
    mark(run_dir, -3600, host="elsewhere")
    assert summarise(run_dir.path).state == "SILENT"


# --- list and show ---------------------------------------------------------------------------------------------------


def test_states_of_runs(folder: Path) -> None:
    states = {run.name: run.state for run in find_runs(folder)}
    finished = dict.fromkeys(("lr0.01-s0", "lr0.01-s1", "lr0.1-s0", "lr0.1-s1"), "FINISHED")
    assert states == finished | {"live": "TRAINING", "killed": "KILLED", "silent": "SILENT"} | dict.fromkeys(
        ("half", "queued", "foreign"), "NEW"
    )


def test_ls_filters_and_sorts(folder: Path) -> None:
    def names(*options: object) -> list[str]:
        result = call("runs", "ls", "--in", folder, *options)
        assert result.exit_code == 0, result.output
        return [line.split()[0] for line in result.output.splitlines()[1:]]

    assert names("lr*-s0") == ["lr0.01-s0", "lr0.1-s0"]
    assert names("--state", "killed", "--state", "SILENT") == ["killed", "silent"]
    assert names("--sort", "accuracy")[-1] == "lr0.1-s1"
    assert names("--sort", "progress", "live", "killed", "silent") == ["silent", "live", "killed"]
    assert names(folder / "live", "runs/killed") == ["killed", "live"]
    assert "No such run" in call("runs", "ls", "--in", folder, "nothing").stderr
    rows = [json.loads(line) for line in call("runs", "ls", "--in", folder, "--json").output.splitlines()]
    assert len(rows) == 10
    assert next(row for row in rows if row["run"].endswith("killed"))["step"] == 30


@pytest.mark.parametrize("options", [[], ["--json"], ["first"]], ids=["alone", "json", "named"])
def test_ls_before_first_run(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIST_TRAIN_RUNS_DIR", raising=False)
    expected = "There are no runs in {} yet. Train one: dist-train train -c mnist\n"
    (tmp_path / "other").mkdir()
    for chosen, named in ([], "runs"), (["--in", "other"], "other"):
        listed = call("runs", "ls", *chosen, *options)
        assert (listed.exit_code, listed.stdout, listed.stderr) == (0, "", expected.format(named))
    mistyped = call("runs", "ls", "--in", "nothing", *options)  # as of ls and git: chosen, and not there
    assert (mistyped.exit_code, mistyped.output) == (1, "error: --in=nothing: there is no such folder.\n")


def test_own_accuracy_is_shown_as_number(tmp_path: Path) -> None:
    """As of a net that calls another metric so: a number, also beside runs that count correct examples."""
    for name, own in (("counted", {}), ("own", {"val/accuracy_is_own": 1})):
        run_dir = make_run(tmp_path / name, {"model": {"name": name}}, upto=30, gain=2.0 if own else 0.0)
        lines = [line | (own if "val/accuracy" in line else {}) for line in metrics(run_dir.path)]
        run_dir.metrics.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        mark(run_dir, state="INTERRUPT", best=run_dir.status.read()["best"] | own)
    listed = {line.split()[0]: line for line in call("runs", "ls", "--in", tmp_path).output.splitlines()}
    assert "83.00%" in listed["counted"].split()
    assert "2.83" in listed["own"].split()
    assert "accuracy 2.81  epoch" in call("runs", "tail", tmp_path / "own").output
    for paths, shown in ((["counted"], "83.00%"), (["own"], "2.83"), (["counted", "own"], "0.83")):
        assert shown in call("runs", "compare", *(tmp_path / path for path in paths)).output.split()


def test_show_prints_resume_hint(folder: Path) -> None:
    output = call("runs", "show", folder / "killed").output
    assert "KILLED" in output
    assert "30/40 75%" in output
    assert "There is no checkpoint yet" in output
    assert "val/accuracy" in call("runs", "show", folder / "half").output


@pytest.mark.parametrize("key", ["step", "epoch", "samples", "attempt", "time", "epoch_s", "train/loss"])
def test_lines_with_missing_key_are_tolerated(key: str, folder: Path) -> None:
    """A single flipped bit can change a key."""
    path = RunDir(folder / "lr0.1-s0").metrics.path
    path.write_text(path.read_text().replace(f'"{key}"', '"another"', 3))
    for command in ("show", "tail", "compare"):
        result = call("runs", command, folder / "lr0.1-s0")
        assert (result.exit_code, result.exception) == (0, None), result.output
    run = read_run(folder / "lr0.1-s0")
    for axis in ("step", "samples", "seconds"):
        positions, values = run.curve("val/loss", axis)
        assert len(positions) == len(values) > 0
        assert positions == sorted(positions)


def test_stop_accepts_only_running_runs(folder: Path) -> None:
    assert call("runs", "stop", folder / "live").exit_code == 0
    assert (folder / "live/STOP").exists()
    for name in ("lr0.01-s0", "killed", "notes"):
        assert call("runs", "stop", folder / name).exit_code == 1
        assert not (folder / name / "STOP").exists()


@pytest.mark.parametrize(
    ("state", "of_job", "holds"),
    [
        (None, "PENDING", True),
        (None, "CONFIGURING", True),
        (None, "RUNNING", True),  # has not written its first status yet
        ("PREEMPTED", "PENDING", True),
        ("PREEMPTED", "RUNNING", True),  # requeued, or its batch script is about to requeue it
        ("INTERRUPT", "PENDING", True),  # submitted again
        (None, "CANCELLED", False),
        ("INTERRUPT", "RUNNING", False),  # its batch script ends
        ("ERROR", "FAILED", False),
        ("FINISHED", "PENDING", False),
    ],
)
def test_stop_accepts_queued_jobs(
    state: str | None, of_job: str, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    monkeypatch.setattr("dist_train.launch.slurm.commands.ask", lambda *_, **__: f"7|{of_job}|(Priority)|0:00\n")
    write_json(run_dir.slurm_json, {"job": "7", "submitted": time.time()})
    if state is not None:
        write_json(run_dir.status.path, {"state": state, "slurm_job_id": "7", "heartbeat": time.time()})
    result = call("runs", "stop", run_dir.path)
    assert (result.exit_code, run_dir.stop_request_file.exists()) == (0 if holds else 1, holds)
    if holds:
        assert result.output.startswith(f"Job 7 of {run_dir.path} has not begun: it stops after its first step")


def test_tail_follows_run_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across a resume, which removes lines and writes them again."""
    run_dir = RunDir(folder / "live")
    following, real_sleep = threading.Event(), time.sleep

    def sleep(seconds: float) -> None:
        following.set()
        real_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)

    def resume() -> None:
        following.wait()
        run_dir.metrics.cut(10)
        time.sleep(1.0)
        make_run(folder / "live")

    writer = threading.Thread(target=resume)
    writer.start()
    out = call("runs", "tail", folder / "live", "-n", 1).output.splitlines()
    writer.join()
    assert out[0].startswith("step 20/40")
    assert "val loss" in out[0]
    assert [line.split()[1] for line in out[-3:-1]] == ["40/40", "40/40"]
    assert out[-1].endswith("live: FINISHED")


# --- comparison ------------------------------------------------------------------------------------------------------


def test_only_differing_settings_are_shown(folder: Path) -> None:
    runs = [read_run(folder / name) for name in ("lr0.01-s0", "lr0.1-s1", "half")]
    assert differing_settings(runs) == {"seed": [0, 1, None], "optimizer.lr": [0.01, 0.1, None]}
    assert differing_settings(runs[:1]) == {}


def test_best_value_is_marked(folder: Path) -> None:
    runs = [read_run(folder / name) for name in ("lr0.01-s0", "lr0.1-s0", "killed", "half")]
    table = run_table(runs)
    best = {column: row[0] for row in table.rows for column, cell in zip(table.columns, row, strict=True)
            if table.is_best(column, cell)}  # fmt: skip
    assert best["best val accuracy"] == best["test accuracy"] == best["val loss"] == "lr0.1-s0"
    assert "steps" not in best
    assert "run" not in best


def test_seeds_are_grouped_as_one_experiment(folder: Path) -> None:
    names = ("lr0.01-s0", "lr0.1-s0", "lr0.01-s1", "lr0.1-s1", "half")
    runs = [read_run(folder / name) for name in names]
    assert [[run.name for run in group] for group in group_seeds(runs)] == [
        ["lr0.01-s0", "lr0.01-s1"], ["lr0.1-s0", "lr0.1-s1"], ["half"],
    ]  # fmt: skip
    table = seed_table(runs)
    assert table is not None
    cells = dict(zip(table.columns, table.texts(mark=str)[0], strict=True))
    assert cells["test accuracy"] == "81.50% ± 0.71%"
    assert cells["optimizer.lr"] == "0.01"
    assert cells["finished seeds"] == "2"
    assert seed_table(runs[:2]) is None
    assert seed_table([runs[0], runs[0], runs[1]]) is None  # the same seed again


def test_time_between_attempts_does_not_count(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", upto=20)
    begin_attempt(run_dir, parse_config({}), wandb_id="id")
    for step, at in ((30, 9000.0), (40, 9005.0)):
        run_dir.append_metrics({"step": step, "samples": step, "attempt": 2, "time": at, "train/loss": 1.0})
    assert read_run(tmp_path / "run").curve("train/loss", "seconds")[0] == [0.0, 10.0, 10.0, 15.0]


def test_every_output_format_has_same_numbers(folder: Path, tmp_path: Path) -> None:
    paths = [folder / name for name in ("lr0.01-s0", "lr0.1-s0", "live", "killed", "half")]
    files = [tmp_path / f"c.{suffix}" for suffix in ("md", "csv", "json", "png", "html")]
    result = call("runs", "compare", *paths, *(f"--out={file}" for file in files))
    assert result.exit_code == 0, result.output
    rows = json.loads(files[2].read_text())["runs"]
    assert [row["run"] for row in rows] == ["lr0.1-s0", "lr0.01-s0", "live", "killed", "half"]  # the best first
    assert list(rows[0])[:3] == ["run", "state", "test accuracy"]  # results before settings
    assert rows[1]["best val accuracy"] == pytest.approx(0.85)
    assert rows[3]["test accuracy"] is None
    with files[1].open() as file:
        assert [row["val loss"] for row in csv.DictReader(file)] == [str(row["val loss"]) for row in rows]
    assert "**94.00%**" in files[0].read_text()
    assert files[3].read_bytes().startswith(b"\x89PNG")
    mixed = call("runs", "compare", *paths, folder / "notes", folder / "queued")
    assert mixed.exit_code == 0, mixed.output
    assert "left out: " in mixed.stderr
    assert "queued" in mixed.stdout
    refused = call("runs", "compare", *paths, "--out=c.docx")
    assert refused.exit_code == 2
    assert ".html" in refused.output
    assert call("runs", "compare", folder / "notes").exit_code == 1


@needs_browser
def test_page_in_browser_without_network(folder: Path, tmp_path: Path) -> None:
    """Its numbers are those of metrics.jsonl, and it shows all charts."""
    names = ("lr0.01-s0", "lr0.01-s1", "lr0.1-s0", "killed")
    page = tmp_path / "page.html"
    result = call("runs", "compare", *(folder / name for name in names), f"--out={page}")
    assert result.exit_code == 0, result.output
    shown = render_page(page, tmp_path)
    runs, seeds = shown["tables"]
    assert sorted(row[0]["text"] for row in runs["rows"]) == sorted(names)
    for row in runs["rows"]:
        cells = dict(zip(runs["columns"], row, strict=True))
        name = cells["run"]["text"]
        lines = metrics(folder / name)
        assert float(cells["val loss"]["value"]) == [line["val/loss"] for line in lines if "val/loss" in line][-1]
        assert float(cells["train loss"]["value"]) == [line["train/loss"] for line in lines if "train/loss" in line][-1]
        accuracies = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
        assert float(cells["best val accuracy"]["value"]) == max(accuracies)
        assert cells["best val accuracy"]["text"] == f"{max(accuracies):.2%}"
        assert cells["best val accuracy"]["best"] == (name == "lr0.1-s0")
    assert len(seeds["rows"]) == 2
    assert [name for name, *_ in shown["pictures"]] == [
        f"Learning curves over {x}" for x in ("step", "samples", "seconds")
    ]
    assert all(width > 500 and height > 200 for _, width, height in shown["pictures"])


def test_names_are_escaped_in_page(tmp_path: Path) -> None:
    from dist_train.runs.reports.html import to_html

    make_run(tmp_path / "<b>&|x")
    runs = [read_run(tmp_path / "<b>&|x")]
    page = to_html(runs, [run_table(runs)])
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;|x" in page


def test_other_outputs_are_written_without_matplotlib(folder: Path, tmp_path: Path) -> None:
    """The page lacks its curves, and everything that cannot be written is reported."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    files = [tmp_path / name for name in ("a.png", "b.html", "c.csv")]
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", "runs", "compare", folder / "live", *(f"--out={file}" for file in files)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    no_curves, not_written = done.stderr.splitlines()
    assert no_curves.startswith("The page has no curves. ")
    assert not_written.startswith(f"error: {files[0]} was not written. ")
    assert all('pip install "dist-train[plot]"' in line for line in (no_curves, not_written))
    assert [file.exists() for file in files] == [False, True, True]
    assert "<table>" in files[1].read_text()
    assert "<img" not in files[1].read_text()


def test_live_run_is_summarised(folder: Path) -> None:
    run = summarise(folder / "live")
    assert (run.is_live, run.step, run.progress, run.world_size, run.attempt) == (True, 20, 0.5, 2, 1)
    assert run.age_s is not None
    assert run.age_s < 60
