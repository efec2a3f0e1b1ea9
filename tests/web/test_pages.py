"""The pages show what the files of the runs hold; damaged files and hostile text never break them."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors import safe_open

from dist_train.atomic_files import write_json
from dist_train.checkpoints.manifest import folder_of
from dist_train.launch.resume import describe_new_start
from dist_train.runs.error_report import record_error
from dist_train.web import child_processes
from support.page import OF_TABLE, client_of, write_run
from support.tiny_runs import write_at

TABLE, COLUMNS = OF_TABLE
HOSTILE = "<script>alert(1)</script>"


def rows_of(text: str) -> list[str]:
    """Return the runs in the order of the table."""
    return [part.split('"')[0] for part in text.split('name="run" value="')[1:]]


def test_runs_at_work_come_first_then_newest(tmp_path: Path) -> None:
    for age, (name, state) in enumerate([("a", "FINISHED"), ("b", "TRAINING"), ("c", "ERROR"), ("d", "INTERRUPT")]):
        config = write_run(tmp_path, name, state).config
        os.utime(config, (1e9 + age, 1e9 + age))
    client, _ = client_of(tmp_path, tmp_path)
    assert rows_of(client.get("/").text) == ["b", "d", "c", "a"]
    assert rows_of(client.get("/?sort=name").text) == ["b", "a", "c", "d"]
    assert rows_of(client.get("/?q=err").text) == []
    assert rows_of(client.get("/?q=error").text) == ["c"]
    assert rows_of(client.get("/?state=FINISHED").text) == ["a"]
    assert rows_of(client.get("/?sort=nonsense&page=99999999").text) == ["b", "d", "c", "a"]
    assert "1 running, 4 in all" in client.get("/").text


def test_row_shows_numbers_of_run(tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/").text
    for shown in ("FINISHED", "20/20", "2.00", "0.1000", "95.00 %", "93.71 %", "1,234"):
        assert shown in text, shown
    [row] = client.get("/rows", headers={"accept": "application/json"}).json()
    assert row == {
        "run": "run", "state": "FINISHED", "step": 20, "total_steps": 20, "epoch": 2.0, "left_s": None,
        "train_loss": 0.1, "val_accuracy": 0.95, "test_accuracy": 0.9371, "samples_per_s": 1234.5, "world_size": 2,
        "job": None, "place": None,
    }  # fmt: skip


def test_rows_are_sent_only_if_they_changed(tmp_path: Path) -> None:
    write_run(tmp_path, "run")
    client, _ = client_of(tmp_path, tmp_path)
    since = client.get("/").text.split("rows?since=")[1].split("&")[0]
    assert client.get(f"/rows?since={since}").status_code == 204
    assert client.get("/rows?since=other.1").status_code == 200


def test_results_are_sent_only_if_they_changed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "TRAINING", 10)
    client, _ = client_of(tmp_path, tmp_path)
    since = client.get("/jobs/run").text.split("/live?since=")[1].split('"')[0]
    assert client.get(f"/jobs/run/live?since={since}").status_code == 204
    run_dir.append_metrics({"step": 12, "train/loss": 0.1})
    assert client.get(f"/jobs/run/live?since={since}").status_code == 200


def test_addresses_of_results_are_those_of_their_page(tmp_path: Path) -> None:
    """They replace a part of it, and relative addresses count from the page: another depth leads out of a prefix."""
    write_run(tmp_path, "run", "INTERRUPT", 10)
    client, _ = client_of(tmp_path, tmp_path)
    part, page = (set(re.findall(r'(?:href|src|action)="([^"]+)"', client.get(path).text))
                  for path in ("/jobs/run/live?since=0", "/jobs/run"))  # fmt: skip
    assert len(part) > 3
    assert part < page


def test_list_has_pages(tmp_path: Path) -> None:
    for number in range(103):
        (tmp_path / f"run{number:03}").mkdir()
        write_json(tmp_path / f"run{number:03}" / "status.json", {"state": "FINISHED"})
    client, _ = client_of(tmp_path, tmp_path)
    assert len(rows_of(client.get("/?sort=name").text)) == 100
    assert rows_of(client.get("/?sort=name&page=2").text) == ["run100", "run101", "run102"]
    assert "101-103 of 103" in client.get("/?sort=name&page=2").text


def test_empty_folder_shows_first_steps(tmp_path: Path) -> None:
    client, _ = client_of(tmp_path / "runs", tmp_path)
    assert "dist-train train -c mnist" in client.get("/").text


def test_evaluations_with_best_and_snapshots(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    write_at(run_dir, 10, 0.9)
    write_at(run_dir, 15)  # between two evaluations
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/jobs/run").text
    table = text.split('id="epochs"')[1].split("</section>")[0]
    steps = [int(part.split('"')[0]) for part in table.split('id="step-')[1:]]
    assert steps == [20, 15, 10]
    assert "90.00 % best" in " ".join(table.split())
    assert "95.00 %" in table
    assert table.count(".safetensors</a>") == 2
    assert "f1" in table
    assert "87.50 %" in text  # of class b


@pytest.mark.parametrize("state", ["TRAINING", "FINISHED", "INTERRUPT"])
def test_each_run_shows_command_that_trains_it_anew(state: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", state)
    client, _ = client_of(tmp_path, tmp_path)
    shown = client.get("/jobs/run").text.split('id="new-start"')[1].split("</code>")[0].split("<code>")[1]
    assert html.unescape(shown) == describe_new_start(run_dir)


def test_csv_of_evaluations_holds_numbers_of_table(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    write_at(run_dir, 15)  # a snapshot between two evaluations is no row
    run_dir.append_metrics({"step": 30, "epoch": 3.0, "epoch_s": None, "val/loss": 0.123456789, "val/a,b": 7.0})
    run_dir.append_metrics({"step": 40, "val/loss": None, "val/accuracy": 0.5, "val/accuracy_is_own": 1})
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/jobs/run").text
    assert 'href="../jobs/run/evaluations.csv"' in text
    answer = client.get("/jobs/run/evaluations.csv")
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''run-evaluations.csv"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["step"], row["epoch"], row["epoch_s"]) for row in rows] == [
        ("10", "1.0", "1.5"), ("20", "2.0", "1.5"), ("30", "3.0", ""), ("40", "", "")
    ]  # fmt: skip
    assert [row["val/loss"] for row in rows] == ["0.1", "0.05", "0.123456789", ""]
    assert [row["val/a,b"] for row in rows] == ["", "", "7.0", ""]
    for row in rows:  # as in the table, there rounded
        cells = text.split(f'id="step-{row["step"]}"')[1].split("</tr>")[0]
        train_loss, val_loss = (f"{float(row[key]):.4f}" if row[key] else "-" for key in ("train/loss", "val/loss"))
        assert f"<td>{train_loss}</td><td>{val_loss}</td>" in cells
        if row["val/accuracy"] and row["step"] != "40":
            assert f"{100 * float(row['val/accuracy']):.2f} %" in cells


def test_settings_that_differ_come_first(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    run_dir.config.write_text("seed: 3\noptimizer: {lr: 0.123}\n")
    run_dir.write_provenance({"argv": ["dist-train", "train", "-c", "mine.yaml"]})
    client, _ = client_of(tmp_path, tmp_path)
    differing, every = (
        client.get("/jobs/run/settings").text.split("Differences from the defaults")[1].split("All settings")
    )
    assert differing.count("<tr><td") == 1
    assert '<td class="text">optimizer.lr</td><td class="text">0.123</td>' in differing
    assert "global_batch_size" in every


def test_seconds_by_use_and_layers(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    write_json(run_dir.status.path, run_dir.status.read() | {"seconds": {"train": 30.0, "save": 10.0, "down": 0.0}})
    write_json(run_dir.layers, {"layers": [{"name": "fc", "type": "Linear", "output": "[B, 10]", "parameters": 50}]})
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/jobs/run").text
    seconds = text.split('id="seconds"')[1].split("</section>")[0]
    assert "75.0 % of it new steps" in seconds
    assert [part.split("<")[0] for part in seconds.split("<dt>")[1:]] == ["train", "save"]
    assert "30.0 s" in seconds
    layer = text.split('id="layers"')[1].split("<tbody>")[1]
    assert [cell in layer for cell in ("fc", "Linear", "[B, 10]", ">50<")] == [True] * 4


def test_snapshot_is_file_of_checkpoint(tmp_path: Path) -> None:
    folder = write_at(write_run(tmp_path, "run"), 10)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.get("/jobs/run/checkpoints/10.safetensors")
    assert answer.content == (folder / "model.safetensors").read_bytes()
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''run-10.safetensors"
    assert client.get("/jobs/run/checkpoints/11.safetensors").status_code == 404
    part = client.get("/jobs/run/checkpoints/10.safetensors", headers={"range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, answer.content[8:16])


def test_everything_as_one_archive(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    write_at(run_dir, 10)
    (run_dir.path / "out").symlink_to("/etc/passwd")
    (run_dir.path / ".hidden").write_text("x")
    client, _ = client_of(tmp_path, tmp_path)
    for query, has_weights in (("?checkpoints=1", True), ("", False)):
        archive = zipfile.ZipFile(io.BytesIO(client.get(f"/jobs/run/outputs.zip{query}").content))
        assert archive.testzip() is None
        names = archive.namelist()
        assert ("run/checkpoints/step_00000010/model.safetensors" in names) is has_weights
        assert {"run/config.yaml", "run/metrics.jsonl", "run/result.json"} <= set(names)
        assert not any("out" in name or "hidden" in name for name in names)
        assert archive.read("run/metrics.jsonl") == run_dir.metrics.path.read_bytes()


def test_no_link_leads_out_of_run(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    (tmp_path / "secret").write_text("SECRET")
    (run_dir.path / "link").symlink_to(tmp_path / "secret")
    (run_dir.path / "folder").symlink_to(tmp_path)
    (run_dir.logs / "linked.log").symlink_to(tmp_path / "secret")
    run_dir.pictures.mkdir()
    (run_dir.pictures / "curves.png").symlink_to(tmp_path / "secret")
    client, _ = client_of(tmp_path, tmp_path)
    for path in (
        "files/link",
        "files/folder/secret",
        "pictures/curves.png",
        "files/../../secret",
        "log?name=linked.log",
    ):
        assert client.get(f"/jobs/run/{path}").status_code == 404, path
    assert "SECRET" not in client.get("/jobs/run/logs").text + client.get("/jobs/run/files").text


def test_log_is_followed(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    log = run_dir.rank_log(0)
    log.write_text("one\n")
    client, _ = client_of(tmp_path, tmp_path)
    first = client.get("/jobs/run/log?name=rank_00000.log").json()
    assert first == {"text": "one\n", "offset": 4}
    log.write_text("one\ntwo\n")
    assert client.get("/jobs/run/log?name=rank_00000.log&offset=4").json() == {"text": "two\n", "offset": 8}
    log.write_text("x" * 200_000)
    assert len(client.get("/jobs/run/log?name=rank_00000.log").json()["text"]) == 65536
    log.write_text("new\n")  # a shorter one: from its beginning
    assert client.get("/jobs/run/log?name=rank_00000.log&offset=200000").json()["text"] == "new\n"


def test_points_come_once_and_anew_after_cut(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "TRAINING", 10)
    client, _ = client_of(tmp_path, tmp_path)
    first = client.get("/jobs/run/points").json()
    assert [point["step"] for point in first["points"]] == [2, 4, 6, 8, 10, 10]
    assert "val/seen" in first["points"][-1]
    follow = f"/jobs/run/points?from={first['to']}&cut={first['cut']}"
    assert client.get(follow).json()["points"] == []
    run_dir.append_metrics({"step": 12, "train/loss": 0.1})
    with run_dir.metrics.path.open("a") as file:
        file.write('{"step": 14, "train/lo')  # being written
    assert [point["step"] for point in client.get(follow).json()["points"]] == [12]
    run_dir.cut_metrics(6, evaluation_pending=False)
    again = client.get(follow).json()
    assert (again["from"], [point["step"] for point in again["points"]]) == (0, [2, 4, 6])


def test_many_points_are_thinned_but_no_evaluation_is(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    lines = [{"step": step, "train/loss": 1.0} for step in range(21, 9000)]
    evaluations = [{"step": step, "val/loss": 1.0} for step in range(9000, 9050)]
    with run_dir.metrics.path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines + evaluations)
    client, _ = client_of(tmp_path, tmp_path)
    points = client.get("/jobs/run/points").json()["points"]
    assert 2000 <= sum("train/loss" in point for point in points) < 4000
    assert sum("val/loss" in point for point in points) == 52


def test_failure_says_why_and_how_to_go_on(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", "ERROR", 10)
    write_at(run_dir, 10)
    run_dir.rank_log(1).write_text("\n".join(f"line {number}" for number in range(100)))
    record_error(run_dir.error, ValueError(HOSTILE), 1, 1, f"Traceback\n  {HOSTILE}")
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/jobs/run").text
    assert "ValueError: &lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "[rank 1 on " in text
    assert "line 99" in text
    assert "line 79" not in text
    assert "The last checkpoint is of step 10" in text
    assert 'formaction="../jobs/run/resume"' in text
    assert HOSTILE not in text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b=c;d", "lr=0.1,x", 'it\'s "quoted"', "ä ö"])
def test_names_are_text(name: str, tmp_path: Path) -> None:
    run = "run " + name.replace("/", "_")
    write_run(tmp_path, run)
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/").text
    assert HOSTILE not in text
    [link] = [part.split('"')[0] for part in text.split('href="jobs/')[1:]]
    assert client.get(f"/jobs/{link}").status_code == 200


def test_hostile_text_in_files_is_text(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run")
    write_json(run_dir.result, {"state": "FINISHED", "test/accuracy_by_class": {HOSTILE: 0.5}})
    write_json(
        run_dir.layers, {"layers": [{"name": HOSTILE, "type": HOSTILE, "output": HOSTILE, "parameters": HOSTILE}]}
    )
    run_dir.append_metrics({"step": 20, "val/loss": 1.0, f"val/{HOSTILE}": 2.0})
    (run_dir.path / HOSTILE.replace("/", "")).write_text("x")
    run_dir.config.write_text(f"seed: 3\ndata: {{args: {{x: '{HOSTILE}'}}}}\n")
    (run_dir.logs / "rank_00000.log").write_text(HOSTILE)
    client, _ = client_of(tmp_path, tmp_path)
    for page in (
        "/",
        "/jobs/run",
        "/jobs/run/settings",
        "/jobs/run/files",
        "/jobs/run/logs",
        f"/?q={HOSTILE}",
        "/compare?run=run",
    ):
        assert HOSTILE not in client.get(page).text, page


def test_damaged_and_half_deleted_runs_never_fail_page(
    tmp_path: Path, count: Callable[..., int], row: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes most of the time of a history
    histories = count(200, 12)
    for seed in range(histories):
        damage_and_look(tmp_path / str(seed), Random(seed))
    row("six random damages to the files of a run, each followed by all pages", histories, "no 500, other runs shown")


def damage_and_look(folder: Path, rng: Random) -> None:
    run_dir = write_run(folder, "run", rng.choice(["FINISHED", "ERROR", "TRAINING"]))
    write_at(run_dir, 10, 0.9)
    record_error(run_dir.error, ValueError("x"), 0, 1, "trace")
    write_json(run_dir.layers, {"layers": []})
    write_run(folder, "whole")
    client, _ = client_of(folder, folder)
    for _ in range(6):
        files = sorted(path for path in run_dir.path.rglob("*") if path.is_file())
        for path in rng.sample(files, min(2, len(files))):
            content = path.read_bytes()
            path.write_bytes(
                rng.choice([b"", b"{", b"[1, 2]", b"null", b"\x00" * 50, b'{"step": "x"}', content[: len(content) // 2],
                            b'{"layers": 5}', b'{"state": 7, "metrics": [], "seconds": 3}'])
            )  # fmt: skip
        if rng.random() < 0.3 and files:
            rng.choice(files).unlink()
        pages = ("", "/live", "/settings", "/logs", "/log?name=rank_00000.log", "/files", "/points", "/outputs.zip",
                 "/checkpoints/10.safetensors", "/pictures/curves.png")  # fmt: skip
        for page in (
            *(f"/jobs/run{each}" for each in pages),
            "/",
            "/rows",
            "/compare?run=run&run=whole",
            "/machines",
            "/new?from=run",
        ):
            assert client.get(page).status_code < 500, page
        assert "whole" in client.get("/").text
    shutil.rmtree(run_dir.path)
    assert client.get("/jobs/run").status_code in (200, 404)  # as of the last scan, a second ago


def test_comparison_puts_results_first_and_best_run_on_top(tmp_path: Path) -> None:
    for name, accuracy in (("low", 0.5), ("high", 0.9), ("mid", 0.7)):
        run_dir = write_run(tmp_path, name)
        write_json(run_dir.result, {"state": "FINISHED", "test/accuracy": accuracy})
        run_dir.config.write_text(f"seed: 3\noptimizer: {{lr: {accuracy}}}\n")
    client, _ = client_of(tmp_path, tmp_path)
    query = "run=low&run=high&run=mid&run=nothing"
    text = client.get(f"/compare?{query}").text
    assert [part.split('"')[0] for part in text.split('<td class="text"><a href="jobs/')[1:]] == ["high", "mid", "low"]
    columns = [part.split("<")[0] for part in text.split('<th scope="col"')[1:]]
    assert [column.partition(">")[2] for column in columns] == [
        "run", "state", "test accuracy", "best val accuracy", "best val f1", "val loss", "train loss", "steps",
        "training, s", "samples/s", "optimizer.lr",
    ]  # fmt: skip
    assert client.get("/compare").status_code == 200
    assert client.get("/compare.exe?run=low").status_code == 404


def test_exports_are_those_of_command(tmp_path: Path) -> None:
    write_run(tmp_path, "one")
    write_run(tmp_path, "two", "INTERRUPT", 10)
    client, _ = client_of(tmp_path, tmp_path)
    text = client.get("/compare.csv?run=one&run=two").text
    assert text.splitlines()[0].startswith("run,state,test accuracy,")
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == ["one", "two"]


def test_weights_as_pth_and_one_child_at_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    run_dir = write_run(tmp_path, "run")
    write_at(run_dir, 10)
    client, _ = client_of(tmp_path, tmp_path)
    answer = client.get("/jobs/run/checkpoints/10.pth")
    assert answer.status_code == 200, answer.text
    loaded = torch.load(io.BytesIO(answer.content), weights_only=True)
    with safe_open(str(folder_of(run_dir, 10) / "model.safetensors"), "pt") as file:
        assert set(loaded) == set(file.keys())
        assert all(torch.equal(loaded[name], file.get_tensor(name)) for name in loaded)

    def nested(*arguments: str, **options: Any) -> str:
        assert client.get("/jobs/run/checkpoints/10.pth").status_code == 409  # the first is at work
        return '{"classes": {"a": 1.0}}'

    monkeypatch.setattr(child_processes, "limited_output_of", nested)
    assert child_processes.predict(run_dir, b"x") == {"classes": {"a": 1.0}}
