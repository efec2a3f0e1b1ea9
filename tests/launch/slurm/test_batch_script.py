"""Rendered sbatch scripts, the requeue decision, and the checks before a job is queued."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main
from dist_train.config.loading import parse_config
from dist_train.data.sets.catalog import SETS
from dist_train.errors import ConfigError, DataError
from dist_train.launch.slurm import commands as slurm
from dist_train.launch.slurm import preemption
from dist_train.launch.slurm.batch_script import BUNDLED, BatchScript
from dist_train.launch.slurm.commands import Partition
from dist_train.launch.slurm.preemption import SlurmScheduler, decide_requeue
from dist_train.launch.slurm.preflight import check_partition, check_submission, seconds_of
from dist_train.runs.attempt import begin_attempt
from dist_train.runs.directory import RunDir
from support.processes import ROOT

SCRIPTS = ROOT / "slurm"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_scripts_match_their_rendering(name: str) -> None:
    assert (SCRIPTS / f"{name}.sbatch").read_text() == BUNDLED[name].render()


def test_slurm_folder_contains_no_other_script() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.sbatch")} == {*BUNDLED}


def fake_commands(folder: Path, commands: dict[str, str]) -> Path:
    """Create a folder for PATH that holds these commands, given as bash code by name."""
    folder.mkdir()
    for name, code in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "accelerate"])
def test_arguments_arrive_unchanged(launcher: str, tmp_path: Path) -> None:
    """Quotes, spaces and dollars survive. Slurm's commands are fakes."""
    arguments = ("-c", "my config.yaml", "-o", "model.args={'a': \"b $HOME `c`\"}", "data.root=/x y", "")
    say = 'printf "%s\\0" "$@" > seen\n'
    fake = fake_commands(tmp_path / "bin", {
        "srun": 'shift 3; exec "$@"\n', "scontrol": "echo localhost\n", "scancel": "", "getent": "",
        "python": f'case "$*" in *requeue-check*) {say.strip()}.check; echo ended;; *) {say.strip()};; esac\n',
    })  # fmt: skip
    script = BatchScript(launcher=launcher, arguments=arguments, python=str(fake / "python")).render()  # type: ignore[arg-type]
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    done = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, cwd=tmp_path, env=env | {"SLURM_NODEID": "0"}
    )
    assert done.returncode == 0, done.stderr
    for seen in ("seen", "seen.check"):
        assert (tmp_path / seen).read_text().split("\0")[:-1][-len(arguments) :] == [*arguments]


@pytest.mark.parametrize("when", ["in its setup", "in its step", "never"])
def test_stop_request_at_any_moment(when: str, tmp_path: Path) -> None:
    """After a request no step starts, and a running step sees the file. Slurm's commands are fakes."""
    request = "kill -USR1 $SHELL_PID; sleep 1; "
    step = f'ls -A "$PWD"/.stop-* > seen.before; {request if when == "in its step" else ""}ls -A "$PWD"/.stop-* > seen'
    fake = fake_commands(tmp_path / "bin", {
        "srun": f"{step}\nexit 0\n", "scontrol": "echo localhost\n", "scancel": "echo $* > cancelled\n", "getent": "",
        "python": 'echo "$*" > check; echo ended\n',
    })  # fmt: skip
    (tmp_path / ".stop-7").touch()  # from an earlier start
    setup = (f"export SHELL_PID=$$; {request if when == 'in its setup' else ''}",)
    script = BatchScript(arguments=("-c", "mnist"), python=str(fake / "python"), setup=setup).render()
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").exists() == (when != "in its setup")
    if when != "in its setup":
        assert (tmp_path / "seen.before").read_text() == ""
        assert (tmp_path / "seen").read_text() == (f"{tmp_path}/.stop-7\n" if when == "in its step" else "")
    assert ("--told" in (tmp_path / "check").read_text()) == (when != "never")
    assert (tmp_path / "cancelled").exists() == (when != "never")
    assert not (tmp_path / ".stop-7").exists()


def test_requested_resources() -> None:
    more = {"options": ("--qos=long",), "setup": ("module load x",)}
    script = BatchScript(nodes=3, nproc=4, gpus_per_node=4, cpus_per_proc=8, partition="gpu", **more)  # type: ignore[arg-type]
    lines = script.render().splitlines()
    for wanted in ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=32", "--gpus-per-node=4", "--partition=gpu"):
        assert f"#SBATCH {wanted}" in lines
    assert "#SBATCH --qos=long" in lines
    assert lines.index("module load x") < next(n for n, line in enumerate(lines) if line.lstrip().startswith("srun"))
    one_task_per_rank = BatchScript(launcher="srun", nproc=4).render()
    assert "#SBATCH --ntasks-per-node=4" in one_task_per_rank
    assert "torch.distributed.run" not in one_task_per_rank
    assert shlex.split(one_task_per_rank, comments=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time": "60\n#SBATCH --uid=0"}, "--time='60\\n#SBATCH --uid=0' contains a control character. Remove it."),
        ({"options": ("--qos=long", "-A x\n#SBATCH --uid=0")}, "--sbatch="),
        ({"job_name": "mnist\nid >seen"}, "The name="),
        ({"partition": "a\rb"}, "--partition="),
        ({"log": "a\x85b"}, "--log="),
        ({"arguments": ("-c", "a\n#SBATCH --uid=0")}, "An argument="),
        ({"arguments": ("-c", "\udcff.yaml")}, "An argument="),  # bytes that are not text
        ({"setup": ("module load a\nmodule load b",), "arguments": ("n\u00fcll \u2713",)}, ""),
    ],
)  # fmt: skip
def test_control_characters_are_refused(fields: dict[str, object], message: str) -> None:
    if message:
        with pytest.raises(ConfigError) as refused:
            BatchScript(**fields)  # type: ignore[arg-type]
        assert str(refused.value).startswith(message)
        assert len(str(refused.value).splitlines()) == 1
    else:
        assert "module load b" in BatchScript(**fields).render().splitlines()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [["--time", "60\n#SBATCH --uid=0"], ["--sbatch", "x\n#SBATCH --uid=0"], ["-c", "x\n#SBATCH --uid=0.yaml"]],
)
def test_command_line_refuses_control_characters(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x\n#SBATCH --uid=0.yaml").touch()
    result = CliRunner().invoke(main, ["slurm", "render", "-c", "smoke", *options])
    assert result.exit_code == 2
    assert "contains a control character" in result.output
    assert "\n#SBATCH" not in result.output


def test_job_does_not_inherit_wandb_run_of_shell(tmp_path: Path) -> None:
    fake = fake_commands(tmp_path / "bin", {
        "srun": 'echo "${WANDB_RUN_ID-unset} ${WANDB_NAME-unset} $WANDB_PROJECT" > seen\n', "scontrol": "echo n1\n",
        "scancel": "", "getent": "", "python": "echo ended\n",
    })  # fmt: skip
    env = {"PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1"}
    shell = {"WANDB_RUN_ID": "outer", "WANDB_NAME": "outer", "WANDB_PROJECT": "p"}
    script = BatchScript(arguments=("-c", "mnist"), python=str(fake / "python")).render()
    subprocess.run(["bash"], input=script, text=True, check=True, cwd=tmp_path, env=env | shell)
    assert (tmp_path / "seen").read_text() == "unset unset p\n"


def test_rendered_script_uses_setup_timeout() -> None:
    result = CliRunner().invoke(main, ["slurm", "render", "-c", "smoke", "-o", "setup_timeout_s=1234.5"])
    assert "--rdzv-conf=join_timeout=1235 " in result.output


# --- the requeue decision --------------------------------------------------------------------------------------------


JOB = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}


def run_that(path: Path, state: str | None, error: dict[str, str] | None = None) -> RunDir:
    run_dir = RunDir(path)
    run_dir.create()
    if state:
        run_dir.status.path.write_text(json.dumps({"state": state, "slurm_job_id": "7", "slurm_restart_count": "2"}))
    if error:
        run_dir.error.write_text(json.dumps({"rank": 1, "host": "n2"} | error))
    return run_dir


@pytest.mark.parametrize(
    ("state", "error", "decision"),
    [
        ("PREEMPTED", None, "requeue"),
        ("FINISHED", None, "ended"),
        ("INTERRUPT", None, "ended"),
        ("ERROR", {"kind": "PeerLost", "message": "gone"}, "requeue"),
        ("TRAINING", {"kind": "PeerLost", "message": "gone"}, "requeue"),  # rank zero itself was killed
        ("TRAINING", None, "requeue"),  # all of them were
        ("ERROR", None, "requeue"),  # another machine has started again
        ("PREEMPTED", {"kind": "DataError", "message": "of a later start"}, "failed"),
        ("ERROR", {"kind": "TrainingDiverged", "message": "not finite"}, "failed"),
        ("TRAINING", {"kind": "UserCodeError", "message": "of rank 1"}, "failed"),
        (None, {"kind": "ConfigError", "message": "before it began"}, "failed"),
        (None, None, "failed"),
    ],
)
def test_run_state_decides_requeue(
    state: str | None, error: dict[str, str] | None, decision: str, tmp_path: Path
) -> None:
    run_dir = run_that(tmp_path / "run", state, error)
    assert decide_requeue(run_dir, JOB, max_requeues=3)[0] == decision
    if decision == "requeue":
        word, why = decide_requeue(run_dir, JOB, max_requeues=2)
        assert word == "failed"
        assert "--max-requeues=2" in why
    if decision != "failed" and state != "FINISHED":  # an earlier start's state does not count
        for other in ({"SLURM_RESTART_COUNT": "3"}, {"SLURM_JOB_ID": "8"}):
            assert decide_requeue(run_dir, JOB | other, max_requeues=9)[0] == "failed"


def test_preemption_before_training_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm reports the preemption; --max-requeues applies here too."""
    run_dir = run_that(tmp_path / "run", None)
    monkeypatch.setattr(preemption, "is_preempted", lambda env: True)
    assert decide_requeue(run_dir, JOB, max_requeues=3)[0] == "requeue"
    assert decide_requeue(run_dir, JOB, max_requeues=2)[0] == "failed"


@pytest.mark.parametrize("state", [None, "PREEMPTED"])
def test_stop_before_training_has_limited_requeues(state: str | None, tmp_path: Path) -> None:
    """Only the batch shell received the request. A time limit that is always too short is not retried forever."""
    run_dir = run_that(tmp_path / "run", state)  # written by start 2, or by none
    begun = 2 if state else -1
    decisions = {
        start: decide_requeue(run_dir, JOB | {"SLURM_RESTART_COUNT": f"{start}"}, 9, stop_requested=True)[0]
        for start in range(begun + 1, begun + 5)
    }
    assert [*decisions.values()] == ["requeue", "requeue", "failed", "failed"]


def test_partition_with_different_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    output = "low*|2|16|1-00:00:00\nlow*|1|64|1-00:00:00\nbig|3|1024|infinite\n"
    monkeypatch.setattr(slurm, "ask", lambda *command, timeout_s: output)
    assert slurm.partitions() == {
        "low": Partition(3, 64, "1-00:00:00", True), "big": Partition(3, 1024, "infinite", False),
    }  # fmt: skip


def test_run_without_progress_is_not_requeued(tmp_path: Path) -> None:
    """When starts in a row reach no new checkpoint, another start is not worth trying."""
    decisions = []
    for step in (0, 0, 50, 50, 50, 50):
        run_dir = RunDir(tmp_path / "run")
        run_dir.create()
        begin_attempt(run_dir, parse_config({}), wandb_id="id")
        run_dir.status.record_resume(step, world_size=2)
        decisions.append(decide_requeue(run_dir, {}, max_requeues=100)[0])
    assert decisions == ["requeue"] * 4 + ["failed"] * 2


def test_sigterm_outside_slurm_is_interrupt() -> None:
    assert SlurmScheduler({}).classify_sigterm() == "INTERRUPT"
    assert SlurmScheduler({"SLURM_JOB_ID": "1"}).classify_sigterm() == "INTERRUPT"  # in a batch shell, without a step


# --- checks before a job is queued -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:02:03", 3723), ("2-3", 183_600), ("1-0:30", 88_200), ("1-1:1:1", 90_061)],
)
def test_time_limits_parse_like_sbatch(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_invalid_time_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="--time=soon is not a time limit"):
        seconds_of("soon")


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (BatchScript(nodes=3), {}, "global_batch_size=64 is not a multiple of world_size=6"),
        (BatchScript(nproc=4, gpus_per_node=2), {"device": "cuda"}, "4 processes and 2 GPUs"),
        (BatchScript(time="2"), {}, "--time=2 is 120 s"),
        (BatchScript(lead_s=10), {}, "took 20 s, longer than --lead-s=10"),
        (BatchScript(log="nowhere/%j.out"), {}, "mkdir -p nowhere"),
    ],
)
def test_submission_that_would_fail_later_is_refused(
    script: BatchScript, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_submission(script, parse_config(settings), save_s=20.0)


def test_missing_data_is_refused_before_submission(tmp_path: Path) -> None:
    config = parse_config({"data": {"name": "cifar10", "root": str(tmp_path)}})
    with pytest.raises(DataError, match="dist-train data fetch cifar10"):
        check_submission(BatchScript(), config)


def test_missing_validation_data_are_refused_before_submission(tmp_path: Path) -> None:
    known = SETS["kmnist"]
    for path in known.files(tmp_path / "here"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    data = {"name": "kmnist", "root": str(tmp_path / "here")}
    check_submission(BatchScript(), parse_config({"data": data}))
    with pytest.raises(DataError, match=f"data fetch kmnist --root {tmp_path}/there"):
        check_submission(BatchScript(), parse_config({"data": data | {"val_root": str(tmp_path / "there")}}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, ""),
        ({"partition": "big", "nodes": 50}, ""),
        ({"partition": "low,big", "nodes": 50}, ""),  # one of them can
        ({"nodes": 5}, "--nodes=5, but partition low has 4."),
        ({"nproc": 8, "cpus_per_proc": 2}, "--nproc=8 x --cpus-per-proc=2 = 16 CPUs on a node"),
        ({"time": "2-0"}, "--time=2-0, but partition low ends jobs after 1-00:00:00."),
        ({"partition": "gold"}, "--partition=gold does not exist. Use one of big, low."),
        ({"partition": "low,big", "nodes": 500}, "partition big has 100. The job would wait forever"),
    ],
)
def test_resources_beyond_partition_are_refused(fields: dict[str, object], message: str) -> None:
    partitions = {"low": Partition(4, 8, "1-00:00:00", True), "big": Partition(100, 64, "infinite", False)}
    script = BatchScript(**fields)  # type: ignore[arg-type]
    if not message:
        check_partition(script, partitions)
        return
    with pytest.raises(ConfigError) as refused:
        check_partition(script, partitions)
    assert message in str(refused.value)
