"""The page on disks that cannot be written and with slow child processes; user code is never in its process."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from dist_train.cli import main
from dist_train.errors import LaunchError
from dist_train.launch.subprocesses import limited_output_of
from dist_train.web import child_processes
from support.mounts import needs_mounts
from support.page import client_of, write_run
from support.patience import PATIENCE_S, wait_until
from support.processes import DIST_TRAIN, ROOT, started
from support.ranks import run_forked
from support.trainings import SETTINGS

PAGES = ["/", "/rows", "/compare?run=done&run=stopped", "/machines", "/bin", "/jobs/done", "/jobs/done/live",
         "/jobs/done/settings", "/jobs/done/logs", "/jobs/done/files", "/jobs/done/points", "/jobs/done/outputs.zip",
         "/jobs/done/files/config.yaml", "/new", "/new?from=done",
         "/jobs/nothing"]  # fmt: skip
ACTIONS = ["/jobs/running/stop", "/jobs/running/save", "/jobs/stopped/resume", "/jobs/done/delete", "/bin/restore",
           "/bin/empty", "/new/create"]  # fmt: skip

# Argument: the folder of runs. The state of the sessions is on the same disk.
ASKING = f"""
import json, sys
from pathlib import Path
from dist_train.runs import deleted_runs
from support.page import SAME_ORIGIN, client_of
folder = Path(sys.argv[1])
client, _ = client_of(folder, folder)
asked = [(page, client.get(page)) for page in {PAGES}]
entry = [run.path.name for run in deleted_runs.find_deleted(folder)][0]
job = {{"config": "smoke", "name": "new"}}
asked += [
    (page, client.post(page, headers=SAME_ORIGIN, data=job if page.startswith("/new") else {{"entry": entry}}))
    for page in {ACTIONS}
]
print(json.dumps({{page: [answer.status_code, answer.text] for page, answer in asked}}))
"""


def asked_on(tmp_path: Path, mount: str) -> dict[str, tuple[int, str]]:
    """Return the answers for runs on a disk that `mount`, a shell command, prepares; $1 is the folder of runs."""
    runs = tmp_path / "runs"
    for name, state in (("done", "FINISHED"), ("stopped", "INTERRUPT"), ("running", "TRAINING"), ("old", "FINISHED")):
        write_run(runs, name, state, 10)
    (runs / ".bin").mkdir()
    (runs / "old").rename(runs / ".bin" / f"{time.time_ns()}-old")
    command = ["unshare", "-m", "sh", "-euc", f'{mount}; exec "$0" -c "$2" "$1"', sys.executable, str(runs), ASKING]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    answers: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return answers


@needs_mounts
def test_read_only_disk_shows_pages_and_explains_refused_actions(tmp_path: Path) -> None:
    answers = asked_on(tmp_path, 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"')
    assert {page: answers[page][0] for page in PAGES} == dict.fromkeys(PAGES, 200) | {"/jobs/nothing": 404}
    for action in ACTIONS:
        status, text = answers[action]
        assert (status, "Read-only file system" in text) == (409, True), (action, text)
    assert len(list((tmp_path / "runs/.bin").iterdir())) == 1


@needs_mounts
def test_full_disk_shows_pages_and_loses_nothing(tmp_path: Path) -> None:
    """What needs no room is done, the rest says why not."""
    full = tmp_path / "full"
    full.mkdir()
    answers = asked_on(
        tmp_path,
        f'mount -t tmpfs -o size=4m,nr_inodes=400 tmpfs {full}; cp -a "$1/." {full}; mount --bind {full} "$1"; '
        'cat /dev/zero > "$1/filler" 2> /dev/null || i=0; '
        'while touch "$1/.filler$i" 2> /dev/null; do i=$((i+1)); done',
    )  # fmt: skip
    assert {page: answers[page][0] for page in PAGES} == dict.fromkeys(PAGES, 200) | {"/jobs/nothing": 404}
    for action in ACTIONS:
        status, text = answers[action]
        assert status == 303 or (status == 409 and "No space left on device" in text), (action, status, text)
    assert answers["/bin/empty"][0] == 303


# All pages and children of a run with user code, in one process; prints what it has imported.
EVERYTHING = f"""
import os, sys
from pathlib import Path
from support.page import SAME_ORIGIN, HOST
from starlette.testclient import TestClient
from dist_train.web.access import Access
from dist_train.web.app import make_app
folder, image = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
access = Access(folder.parent / "web.json")
client = TestClient(make_app(folder, access), base_url=HOST, follow_redirects=False)
client.cookies.set(access.cookie, access.open_session())
pages = [page.replace("done", "r") for page in {PAGES}] + ["/jobs/r/checkpoints/3.pth", "/compare.csv?run=r"]
answers = {{page: client.get(page) for page in pages}}
answers["predict"] = client.put("/jobs/r/predict", content=image, headers=SAME_ORIGIN)
os.chdir(folder.parent)  # where the net is
texts = {{"config": "mnist_bks", "lines": "model.name=own_net:Net", "name": "new"}}
for action in ("check", "try", "create"):
    answers[action] = client.post(f"/new/{{action}}", data=texts, headers=SAME_ORIGIN)
assert "It works" in answers["try"].text, answers["try"].text
assert answers.pop("create").status_code == 303
for page, answer in answers.items():
    assert answer.status_code == (404 if "nothing" in page else 200), (page, answer.text)
assert len(answers["predict"].json()["classes"]) > 1
for action in ("stop", "resume", "delete"):
    client.post(f"/jobs/r/{{action}}", headers=SAME_ORIGIN)
heavy = ("torch", "numpy", "accelerate", "matplotlib", "PIL", "wandb", "own_net", "dist_train.training")
print(sorted(name for name in sys.modules if name in heavy))
"""


def test_server_imports_neither_torch_nor_user_code(tmp_path: Path) -> None:
    """Not even after weights were converted, an image tried and a comparison exported of a run with a user's net."""
    (tmp_path / "own_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(784, 10)\n\n"
        "    def forward(self, images):\n        return self.fc(images.flatten(1))\n"
    )
    settings = [*SETTINGS, "-omodel.name=own_net:Net", "-otrain_for=3 steps", "--run-name=r"]
    train = run_forked([*DIST_TRAIN, "train", *settings], tmp_path, 1)
    assert train.returncode == 0, train.stderr
    picture = tmp_path / "image.png"
    Image.new("L", (28, 28), 200).save(picture)
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, str(tmp_path / "runs"), str(picture)],
        cwd=ROOT / "tests", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_child_that_hangs_is_ended_with_its_own_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {tmp_path}/pid\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(LaunchError, match="took longer than 5 s and was stopped"):
        limited_output_of("predict", timeout_s=5.0, memory_bytes=10**9)
    pid = (tmp_path / "pid").read_text().strip()
    wait_until(lambda: not _is_running(pid), "end of the child's child")


def test_child_has_memory_limit(tmp_path: Path) -> None:
    """As has a process that it starts."""
    program = tmp_path / "python"
    allocate = "bytearray(2 * 10**9); print('allocated')"
    program.write_text(f'#!/bin/sh\n{sys.executable} -c "{allocate}" || exit 3\n')
    program.chmod(0o755)
    enough = limited_output_of(timeout_s=PATIENCE_S, memory_bytes=4 * 10**9, python=str(program))
    assert enough == "allocated\n"
    with pytest.raises(LaunchError, match="MemoryError"):
        limited_output_of(timeout_s=PATIENCE_S, memory_bytes=10**9, python=str(program))


def test_image_is_tried_with_interpreter_of_run(tmp_path: Path) -> None:
    """And with ours if that is gone, which says what is wrong with a run that has no checkpoint."""
    run_dir = write_run(tmp_path / "runs", "run")
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"classes": {"mine": 1.0}}\'\n')
    program.chmod(0o755)
    run_dir.write_provenance({"python": str(program)})
    assert child_processes.predict(run_dir, b"an image") == {"classes": {"mine": 1.0}}
    program.unlink()
    with pytest.raises(LaunchError, match="checkpoint"):
        child_processes.predict(run_dir, b"an image")


def test_address_is_printed_only_of_server_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for where in (["--port", port], ["--socket", str(path)]):
        refused = CliRunner().invoke(main, ["web", "--url", *where])
        assert refused.exit_code == 1
        assert "No dist-train web answers at" in str(refused.output)
        (tmp_path / "server").mkdir(exist_ok=True)
        with started([*DIST_TRAIN, "web", "--in", str(tmp_path), *where], tmp_path / "server") as server:
            assert server.stdout is not None
            lines = [server.stdout.readline() for _ in range(2)]
            assert CliRunner().invoke(main, ["web", "--url", *where]).output == "".join(lines)


def test_error_of_child_is_told_without_what_was_printed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nprintf 'a warning\\nerror: the first line\\nthe second\\n' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(LaunchError, match=r"^the first line\nthe second$"):
        limited_output_of("predict", timeout_s=60.0, memory_bytes=10**9)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_pages_are_answered_while_child_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs", "run")
    client, _ = client_of(tmp_path / "runs", tmp_path)
    begun, over = threading.Event(), threading.Event()

    def hang(*_arguments: str, **_options: Any) -> str:
        begun.set()
        over.wait()
        raise LaunchError("stopped")

    monkeypatch.setattr(child_processes, "limited_output_of", hang)
    thread = threading.Thread(target=client.get, args=("/jobs/run/checkpoints/10.pth",))
    thread.start()
    try:
        begun.wait()
        for page in ("/", "/jobs/run", "/rows", "/machines"):
            assert client.get(page).status_code == 200
        for _ in range(50):  # more than there are threads: none of them waits
            assert client.get("/jobs/run/checkpoints/10.pth").status_code == 409
    finally:
        over.set()
        thread.join()


def test_upload_that_ends_early_leaves_no_traceback(tmp_path: Path) -> None:
    client, access = client_of(tmp_path / "runs", tmp_path)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"authorization", f"token {access.token}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/bin/empty", "raw_path": b"/bin/empty", "query_string": b"",
             "headers": headers, "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80)}  # fmt: skip
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 400
