"""Detection of launcher and rank, for a table of environments; the real environment is not read."""

from __future__ import annotations

import pytest

from dist_train.distributed.process_info import (
    ProcessInfo,
    available_cores,
    detect_process,
    export_rendezvous,
    first_host,
    persistent_run_name,
    threads_per_process,
)
from dist_train.errors import LaunchError

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
BY_HAND = {name: value for name, value in TORCHRUN.items() if name not in ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
NO_LOCAL = {name: value for name, value in BY_HAND.items() if name != "LOCAL_RANK"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
# A batch shell and `salloc` have SLURM_PROCID and so on without any started task; only a step has tasks.
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1",
}  # fmt: skip

ONE_NODE = {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}

PLACES = {
    "python": ({}, ProcessInfo()),
    "torchrun on two nodes": (TORCHRUN, ProcessInfo(3, 1, 4, 2, "torchrun")),
    "torchrun inside an srun step": (SRUN | TORCHRUN, ProcessInfo(3, 1, 4, 2, "torchrun")),
    "accelerate, several": (TORCHRUN | ACCELERATE, ProcessInfo(3, 1, 4, 2, "accelerate")),
    "accelerate, one": (ACCELERATE, ProcessInfo(started_by="accelerate")),
    "by hand": (BY_HAND, ProcessInfo(3, 1, 4, 4, "the environment")),
    "by hand on one machine": (NO_LOCAL | {"MASTER_ADDR": "localhost"}, ProcessInfo(3, 3, 4, 4, "the environment")),
    "by hand, all on one": (NO_LOCAL | {"LOCAL_WORLD_SIZE": "4"}, ProcessInfo(3, 3, 4, 4, "the environment")),
    "by hand, one on each": (NO_LOCAL | {"LOCAL_WORLD_SIZE": "1"}, ProcessInfo(3, 0, 4, 1, "the environment")),
    "by hand, alone": (NO_LOCAL | {"RANK": "0", "WORLD_SIZE": "1"}, ProcessInfo(0, 0, 1, 1, "the environment")),
    "by hand inside an srun step": (SRUN | NO_LOCAL, ProcessInfo(3, 1, 4, 2, "the environment")),
    "by hand under mpirun": (NO_LOCAL | MPIRUN, ProcessInfo(3, 1, 4, 2, "the environment")),
    "batch shell": (BATCH, ProcessInfo()),
    "batch shell with an empty step id": (BATCH | {"SLURM_STEP_ID": ""}, ProcessInfo()),
    "srun of one task": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ProcessInfo(),
    ),
    "srun on one node": (SRUN | ONE_NODE | {"SLURM_LOCALID": "3"}, ProcessInfo(3, 3, 4, 4, "srun")),
    "srun on two nodes": (SRUN, ProcessInfo(3, 1, 4, 2, "srun")),
    "srun, uneven": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, ProcessInfo(3, 1, 4, 1, "srun")),
    "srun, step 0": (SRUN | {"SLURM_STEP_ID": "0"}, ProcessInfo(3, 1, 4, 2, "srun")),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_process_info(name: str) -> None:
    env, expected = PLACES[name]
    assert detect_process(env) == expected


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


REJECTED = {
    "accelerate asked for two and started one": (
        ACCELERATE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        r"MASTER_ADDR is set, RANK is not\. Use .*launch/accelerate\.sh .*dist-train launch --nproc N",
    ),
    "only a rank": ({"RANK": "0"}, "RANK=0 but no LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    "only a world size": ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 but no RANK, "),
    "only a local rank": ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 but no RANK, "),
    "an empty rank": (TORCHRUN | {"RANK": ""}, "but no RANK"),
    "an empty rank alone": ({"RANK": ""}, "no RANK"),
    "rank too high": (TORCHRUN | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    "rank below zero": (TORCHRUN | {"RANK": "-1"}, "RANK=-1 is not below"),
    "one of an unknown number on a machine": (NO_LOCAL, r"but no LOCAL_RANK. Set LOCAL_RANK, to 0 if each"),
    "a step of others": (SRUN | NO_LOCAL | {"RANK": "2"}, "but no LOCAL_RANK"),
    "words": (TORCHRUN | {"WORLD_SIZE": "four"}, 'WORLD_SIZE="four" is not a number'),
    "words of Slurm": (SRUN | {"SLURM_PROCID": "x"}, 'SLURM_PROCID="x" is not a number'),
    "a step without a place": (without(SRUN, "SLURM_PROCID"), 'SLURM_PROCID="" is not a number'),
}
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    error = f"Partial launcher environment: .* but no {_name}"
    REJECTED[f"torchrun without {_name}"] = without(TORCHRUN, _name), error


@pytest.mark.parametrize("name", REJECTED)
def test_partial_environment_is_rejected(name: str) -> None:
    env, message = REJECTED[name]
    with pytest.raises(LaunchError, match=message):
        detect_process(env)


def test_rendezvous_under_srun() -> None:
    """torch.distributed gets the variables that torchrun would set: one address and port for all tasks."""
    exported = []
    for rank in range(4):
        env = SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}
        export_rendezvous(detect_process(env), env)
        exported.append({name: env[name] for name in without(TORCHRUN, "TORCHELASTIC_RUN_ID")})
        again = detect_process(without(env, *SRUN))
        assert (again.rank, again.local_rank, again.world_size, again.local_world_size) == (rank, rank % 2, 4, 2)
    assert {(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in exported} == {("gpu07", exported[0]["MASTER_PORT"])}
    assert [env["RANK"] for env in exported] == ["0", "1", "2", "3"]


def test_accelerate_gets_local_rank() -> None:
    env = NO_LOCAL | {"MASTER_ADDR": "localhost"}
    export_rendezvous(detect_process(env), env)
    assert env == NO_LOCAL | {"MASTER_ADDR": "localhost", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


def port(**changes: str) -> int:
    env = SRUN | changes
    export_rendezvous(detect_process(SRUN), env)
    return int(env["MASTER_PORT"])


def test_ports_of_jobs_and_steps_on_one_node_differ() -> None:
    ports = [port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in (17, 18, 19) for step in range(3)]
    assert len(set(ports)) == 9
    assert all(1024 < number < 65536 for number in [*ports, port(SLURM_JOB_ID="4294967295")])


def test_explicit_address_wins_and_one_node_needs_no_nodelist() -> None:
    env = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
    export_rendezvous(detect_process(env), env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("head", "1")
    env = without(SRUN, "SLURM_STEP_NODELIST") | ONE_NODE
    export_rendezvous(detect_process(env), env)
    assert env["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("env", [{}, TORCHRUN, ACCELERATE, BATCH], ids=["python", "torchrun", "accelerate", "batch"])
def test_other_environments_are_unchanged(env: dict[str, str]) -> None:
    after = dict(env)
    export_rendezvous(detect_process(env), after)
    assert after == env


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[7,9]", "gpu7"),
        ("gpu[012]", "gpu012"),
        ("n[1-3]-ib", "n1-ib"),
        ("n[1-3]-ib,m4", "n1-ib"),
        ("login1,gpu[1-2]", "login1"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("rack[1,2]-n[05-07]-x,y", "rack1-n05-x"),
        ("a-b.c.org", "a-b.c.org"),
        ("ip-10-0-[1-2]", "ip-10-0-1"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", ",a", "[1-2]"])
def test_nodelist_without_host_is_refused(nodelist: str) -> None:
    with pytest.raises(LaunchError, match=r"No host in SLURM_STEP_NODELIST.* Set MASTER_ADDR"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}, "mnist-17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "mnist-17_2"),
        ({"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "abc", "SLURM_JOB_ID": "17"}, "mnist-abc"),
        ({"WANDB_RUN_ID": "abc"}, None),
    ],
)
def test_persistent_run_name(env: dict[str, str], expected: str | None) -> None:
    """A requeued job keeps the name; another task of its array has another one."""
    assert persistent_run_name("mnist", env) == expected


def test_available_cores() -> None:
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("explicit", "threads"), [("3", 3), ("03", 3), ("4,2", 4), ("0", None), ("", None), ("many", None)]
)
def test_threads_per_process(explicit: str, threads: int | None) -> None:
    """An invalid number of threads is ignored; a list has one number for each nesting level."""
    default = max(1, available_cores() // 2)
    assert threads_per_process(2, {"OMP_NUM_THREADS": explicit}) == (threads or default)
