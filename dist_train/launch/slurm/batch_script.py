"""The text of an sbatch script: how a job starts its ranks, saves in time, and asks to be queued again. Pure."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, fields
from typing import Literal

from dist_train.config.schema import Config
from dist_train.distributed.process import OF_ONE_WANDB_RUN
from dist_train.distributed.signals import HANDLED_SIGNALS, SHUTDOWN_TIMEOUT_S
from dist_train.errors import ConfigError

Launcher = Literal["torchrun", "srun", "accelerate"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and what is no text
_OF_SEVERAL_LINES = ("setup", "usage")  # of a shell, and a comment of ours
_OPTIONS = {"options": "--sbatch", "arguments": "An argument", "job_name": "The name", "python": "The Python"}


@dataclass(frozen=True, kw_only=True)
class BatchScript:
    """What a job asks Slurm for and what it runs.

    `arguments` None: those given to the script, one of general use in which the caller's PYTHON and NPROC win.
    """

    launcher: Launcher = "torchrun"
    arguments: tuple[str, ...] | None = None  # of `dist-train train`
    usage: str = ""  # the first comment
    job_name: str = "dist-train"
    nodes: int = 2
    nproc: int = 2  # per node
    cpus_per_proc: int = 1
    gpus_per_node: int = 0
    time: str = "60"  # as sbatch takes it: minutes, HH:MM:SS, D-HH
    partition: str | None = None
    array: str | None = None
    log: str = "%x-%j.out"
    lead_s: int = 120  # the job hears this long before its time limit
    max_requeues: int = 100
    join_timeout_s: float = Config.model_fields["setup_timeout_s"].default  # launchers wait so long for each other
    options: tuple[str, ...] = ()  # further #SBATCH lines
    setup: tuple[str, ...] = ()  # shell lines before the start: modules, an environment
    python: str = "python"

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a text that would become more than its place in the script, such as a further #SBATCH line.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if field.name not in _OF_SEVERAL_LINES and isinstance(text, str) and _CONTROL.search(text):
                    option = _OPTIONS.get(field.name, f"--{field.name}")
                    raise ConfigError(f"{option}={text!r} has a control character in it. Leave it out.")

    def render(self) -> str:
        """The whole text."""
        parts = [
            ["#!/usr/bin/env bash", *(f"# {line}" for line in self.usage.splitlines())],
            [f"#SBATCH {option}" for option in self._options()],
            ["set -euo pipefail"],
            _HEAR.splitlines(),
            [
                "# Of the shell that submitted this: each job is a run of its own.",
                f"unset {' '.join(OF_ONE_WANDB_RUN)}",
            ],
            [*self.setup],
            [f"export PYTHON={shlex.quote(self.python) if self.arguments is not None else '${PYTHON:-python}'}"],
            _MEET.splitlines(),
            ["code=1", "if [[ -z ${told:-} ]]; then  # else the time was over before anything began"],
            [f"  {line}" for line in [*self._start(), *_WAIT.splitlines()]],
            ["fi"],
            self._end().splitlines(),
        ]
        return "\n".join("\n".join(part) for part in parts if part) + "\n"

    def _options(self) -> list[str]:
        tasks = self.nproc if self.launcher == "srun" else 1
        cpus = self.cpus_per_proc * self.nproc // tasks
        wanted = {
            "job-name": self.job_name, "partition": self.partition, "array": self.array,
            "nodes": self.nodes, "ntasks-per-node": tasks, "cpus-per-task": cpus,
            "gpus-per-node": self.gpus_per_node or None, "time": self.time, "output": self.log,
            "open-mode": "append", "signal": f"B:USR1@{self.lead_s}",
        }  # fmt: skip
        return [
            *(shlex.quote(f"--{name}={value}") for name, value in wanted.items() if value is not None),
            "--requeue",
            *self.options,
        ]

    def _train(self) -> str:
        """The arguments of `train`, as the shell is to read them."""
        return '"$@"' if self.arguments is None else shlex.join(self.arguments)

    def _start(self) -> list[str]:
        train = f"-m dist_train train {self._train()} &"
        nproc = f"{self.nproc}" if self.arguments is not None else f"${{NPROC:-${{SLURM_GPUS_ON_NODE:-{self.nproc}}}}}"
        ranks = f"export NPROC={nproc}  # on each node"
        srun = "srun --label --kill-on-bad-exit=1 --wait=60"
        if self.launcher == "srun":
            return [
                "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}",
                "# One task for each rank.",
                f'{srun} "$PYTHON" {train}',
            ]
        # torchrun and accelerate would set one thread.
        threads = "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SRUN_CPUS_PER_TASK + NPROC - 1) / NPROC))}"
        shutdown_s, join_s = max(SHUTDOWN_TIMEOUT_S, self.lead_s), math.ceil(self.join_timeout_s)
        if self.launcher == "torchrun":
            return [
                ranks,
                threads,
                "# torchrun on each node. It must be told to pass USR1 on, or dies of it and leaves its ranks.",
                f'{srun} "$PYTHON" -m torch.distributed.run \\',
                '  --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d \\',
                '  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \\',
                f"  --rdzv-conf=join_timeout={join_s} \\",
                f"  --signals-to-handle={HANDLED_SIGNALS} --shutdown-timeout={shutdown_s} \\",
                f"  {train}",
            ]
        return [
            ranks,
            threads,
            f"export TORCHELASTIC_SHUTDOWN_TIMEOUT={shutdown_s}",
            "# accelerate launch on each node. Each has to give its own number: hence the shell.",
            "# shellcheck disable=SC2016",
            f"""{srun} bash -c 'exec "$PYTHON" -m accelerate.commands.launch --multi_gpu --mixed_precision no \\""",
            '  --dynamo_backend no --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * NPROC)) \\',
            '  --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \\',
            f"  --rdzv_conf timeout={join_s} \\",
            f"""  -m dist_train train "$@"' train {self._train()} &""",
        ]

    def _end(self) -> str:
        options = f"${{told:+--told}} --max-requeues={self.max_requeues}"
        return _END.format(check=f'"$PYTHON" -m dist_train slurm requeue-check {options} {self._train()}')


_MEET = """\
# srun does not inherit it from the job (since Slurm 22.05).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Where the ranks meet: the first node, at a port of this job and this start of it.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
  echo "error: $(hostname) cannot resolve the first node's name \\"$MASTER_ADDR\\": tell your administrators." >&2
  exit 1
fi
export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 12000))
"""

_HEAR = """\
# A member of an array has a number in it; the bare id may mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# The time limit is near, and Slurm tells this shell alone. TERM for the ranks: they save, and end as PREEMPTED. A step
# that is only just beginning does not get it; rank 0 looks for the file too.
export DIST_TRAIN_STOP_FILE=$PWD/.stop-$job
trap 'told=yes; touch "$DIST_TRAIN_STOP_FILE" || :; scancel --signal=TERM "$job" || :' USR1
rm -f "$DIST_TRAIN_STOP_FILE" || :
# In a preemption Slurm sends it to the ranks first; when it comes here, the end of the step is still to be awaited.
trap : TERM
"""

_WAIT = """\
step=$!
until wait "$step"; code=$?; ! kill -0 "$step" 2>/dev/null; do :; done  # a trap ends one wait
"""

_END = """\
trap : USR1
rm -f "$DIST_TRAIN_STOP_FILE" || :
# torchrun ends with 1 after a signal, also when all is saved: what the run says of itself counts.
case $({check}) in
  requeue)
    for _ in {{1..30}}; do  # the controller may be away for a while
      # Then wait until Slurm takes this shell away: leaving would end the job.
      if scontrol requeue "$job"; then sleep 600 & wait; break; fi
      sleep 10
    done
    ;;
  ended) exit 0 ;;
esac
exit "$code"
"""

# Those in slurm/, for use as they are.
BUNDLED = {
    "train": BatchScript(
        usage="A run on one or more nodes, torchrun on each. Usage: sbatch --nodes=2 slurm/train.sbatch -c mnist",
    ),
    "train_srun": BatchScript(
        launcher="srun",
        usage="A run with one task per rank, no torchrun. Usage: sbatch --nodes=2 --ntasks-per-node=2 "
        "slurm/train_srun.sbatch -c mnist",
    ),
    "train_accelerate": BatchScript(
        launcher="accelerate",
        usage="A run by accelerate launch on each node. Usage: sbatch --nodes=2 slurm/train_accelerate.sbatch -c mnist",
    ),
    "sweep_array": BatchScript(
        nodes=1,
        array="1-2",
        log="%x-%A_%a.out",
        usage="One run for each line of settings in a file. Usage:\n"
        "sbatch --array=1-6%2 slurm/sweep_array.sbatch settings.txt -c mnist    a line: optimizer.lr=3e-4 seed=1",
        setup=(
            'settings=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")',
            'if [[ -z "$settings" ]]; then echo "error: $1 has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; fi',
            'read -ra settings <<< "$settings"',
            'set -- "${@:2}" "${settings[@]}"',
        ),
    ),
}
