"""The page of machines: processors, GPUs as nvidia-smi reports them, other hosts, a real Slurm; and who uses them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import dist_train.web.run_index as run_index
from dist_train.atomic_files import write_json
from dist_train.launch.slurm.commands import names_in
from dist_train.web.background import Background
from support.cluster import REASON, Cluster, can_be_made
from support.page import client_of, write_run
from support.patience import PATIENCE_S, wait_until


@pytest.fixture(autouse=True)
def _asks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_index, "SCAN_S", 0.0)


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@contextmanager
def sleeping(**env: str) -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"], env=os.environ | env)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def gpus_of(client: TestClient) -> list[str]:
    """Return the lines of the GPUs as text, after the driver was asked."""
    found = re.findall(r"<dt>(GPU [^<]*)</dt><dd>([^<]*)</dd>", client.get("/machines").text)
    return [": ".join(pair) for pair in found]


def test_gpus_with_runs_that_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a stand-in for nvidia-smi. A rank other than zero is known by its environment, a stranger by its id."""
    a, b = write_run(tmp_path / "runs", "a", "TRAINING", 10), write_run(tmp_path / "runs", "b", "SETUP")
    with sleeping() as rank_zero, sleeping(DIST_TRAIN_RUN_DIR=str(b.path)) as other_rank, sleeping() as stranger:
        write_json(a.status.path, a.status.read() | {"pid": rank_zero})
        program(tmp_path, "nvidia-smi", f"""case $1 in
--query-gpu=*) echo "GPU-1, NVIDIA H100, 97, 4000, 81559"; echo "GPU-2, NVIDIA H100, [N/A], 0, 81559";;
*) echo "GPU-1, {rank_zero}"; echo "GPU-1, {other_rank}"; echo "GPU-2, {stranger}"; echo broken;;
esac""")  # fmt: skip
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        client, _ = client_of(tmp_path / "runs", tmp_path)
        wait_until(lambda: gpus_of(client), "answer of the driver")
        assert gpus_of(client) == [
            "GPU 0, NVIDIA H100: 97 %, 4,000 of 81,559 MiB, used by a, b",
            f"GPU 1, NVIDIA H100: - %, 0 of 81,559 MiB, used by process {stranger}",
        ]
    for name in ("a", "b"):
        assert f'href="jobs/{name}"' in client.get("/machines").text


def test_page_does_not_wait_for_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", f"touch {tmp_path}/asked; exec sleep 1000")  # ended after some seconds
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    client, _ = client_of(tmp_path / "runs", tmp_path)
    assert gpus_of(client) == []
    wait_until((tmp_path / "asked").exists, "question")
    assert gpus_of(client) == []


def test_slow_question_is_asked_once_and_its_answer_kept() -> None:
    asked, go_on = [], threading.Event()

    def ask(before: int, step: int) -> int:
        asked.append(before)
        assert go_on.wait(PATIENCE_S)
        return before + step

    background = Background(ask, 5, every_s=0.0)
    assert [background.latest(2) for _ in range(50)] == [5] * 50
    assert asked == [5]
    go_on.set()
    wait_until(lambda: background.answer == 7, "answer")
    wait_until(lambda: background.version == 1, "version")


def test_answer_is_not_asked_for_again_too_soon() -> None:
    asked: list[None] = []
    background = Background(asked.append, None, every_s=PATIENCE_S)
    for _ in range(5):
        background.latest()
    wait_until(lambda: asked, "question")
    assert asked == [None]


def test_hosts_of_runs_are_machines(tmp_path: Path) -> None:
    """A heartbeat tells of the machine it comes from; no agent runs there."""
    runs = tmp_path / "runs"
    write_run(runs, "ended")
    client, _ = client_of(runs, tmp_path)
    assert "Machines: 1, 0 busy" in client.get("/").text
    far = write_run(runs, "far", "TRAINING", 10)
    write_json(far.status.path, far.status.read() | {"host": "elsewhere"})
    far.write_provenance({"hosts": ["elsewhere", "elsewhere", "<b>"]})
    text = client.get("/machines").text
    assert "Machines: 3, 2 busy" in text
    assert [part.split("<")[0] for part in text.split("<h2>")[1:]] == [socket.gethostname(), "elsewhere", "&lt;b&gt;"]
    assert text.count('href="jobs/far"') == 2
    write_run(runs, "near", "TRAINING", 10)
    assert "Machines: 3, 3 busy" in client.get("/").text


def test_slurm_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "sinfo", "echo 'sinfo: error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    client, _ = client_of(tmp_path / "runs", tmp_path)
    wait_until(lambda: "slurm-error" in client.get("/machines").text, "answer")
    assert "no answer from Slurm" in client.get("/machines").text
    assert "Machines: 1, 0 busy" in client.get("/machines").text


# Prints what the page shows of the nodes once that satisfies a condition. Arguments: the folder of runs, the condition.
LOOKING = """
import json, re, sys
from pathlib import Path
from support.page import client_of
from support.patience import PATIENCE_S, wait_until
client, _ = client_of(Path(sys.argv[1]), Path(sys.argv[1]).parent)
shown = {}
def look():
    text = client.get("/machines").text
    shown["link"] = re.search(r'id="machines-link">([^<]*)<', text)[1]
    rows = text.partition('id="nodes"')[2].partition("</table>")[0].split('<tr id="node-')[1:]
    shown["nodes"] = [[re.sub("<[^>]*>", "", cell).strip() for cell in row.split("<td")[1:]] for row in rows]
    shown["nodes"] = [[cell.partition(">")[2] for cell in cells] for cells in shown["nodes"]]
    shown["runs"] = re.findall(r'href="jobs/([^"]*)"', text.partition('id="nodes"')[2])
    return eval(sys.argv[2], {}, shown)
wait_until(look, "nodes")
print(json.dumps(shown))
"""


@pytest.mark.cluster(minutes=0.5)
@pytest.mark.skipif(not can_be_made(), reason=REASON)
def test_nodes_of_slurm_with_their_jobs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Partitions, nodes, a job of a run and a job of somebody else, as a real Slurm reports them."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=2) as cluster:  # its sockets need a short path
        runs = tmp_path / "runs"
        runs.mkdir()

        def looked(condition: str) -> dict[str, Any]:
            page = cluster.run("head", sys.executable, "-c", LOOKING, runs, condition, env=cluster.env)
            assert page.returncode == 0, page.stderr
            shown: dict[str, Any] = json.loads(page.stdout)
            return shown

        idle = looked("len(nodes) == 2")
        assert [cells[:2] for cells in idle["nodes"]] == [["node1", "idle"], ["node2", "idle"]]
        assert sorted(idle["nodes"][0][5].split(", ")) == ["high", "low", "low0"]
        assert idle["link"] == "Machines: 3, 0 busy"
        jobs = [
            cluster.ask(
                "sbatch", "--parsable", "--chdir=/tmp", "--output=/dev/null", *options, "--wrap=sleep 1000"
            ).strip()
            for options in (["--nodes=2", "--ntasks-per-node=1"], ["--nodelist=node1"])
        ]
        wait_until(lambda: all(cluster.state(job) == "RUNNING" for job in jobs), "jobs")
        run_dir = write_run(runs, "mine", "TRAINING", 10)
        write_json(run_dir.status.path, run_dir.status.read() | {"slurm_job_id": jobs[0], "host": "node1"})
        run_dir.write_provenance({"hosts": ["node1", "node2"]})
        busy = looked("'mine' in runs")
        assert [cells[1:3] for cells in busy["nodes"]] == [["mixed", "2 of 4"], ["mixed", "1 of 4"]]
        mine = f"{jobs[0]} mine TRAINING, 2 ranks"
        assert busy["nodes"][1][6] == mine
        assert sorted(busy["nodes"][0][6].split("; ")) == sorted([mine, f"{jobs[1]} of root"])
        assert busy["link"] == "Machines: 3, 2 busy"
        names = "node1,a[08-10,12]b[1-2],c-[3],n"
        assert names_in(names) == cluster.ask("scontrol", "show", "hostnames", names).split()
