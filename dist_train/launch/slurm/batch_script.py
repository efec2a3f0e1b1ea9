"""Render sbatch scripts: how a job starts its ranks, saves in time and requeues itself. No side effects."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, fields
from typing import Literal

from dist_train.config.schema import Config
from dist_train.distributed.process_info import OF_ONE_WANDB_RUN
from dist_train.distributed.signals import HANDLED_SIGNALS, SHUTDOWN_TIMEOUT_S
from dist_train.errors import ConfigError

Launcher = Literal["torchrun", "srun", "accelerate"]

# Fields that are options of `slurm submit`.
OPTIONS = (
    "launcher", "nodes", "nproc", "cpus_per_proc", "gpus_per_node", "time", "partition", "log", "lead_s",
    "max_requeues", "options", "setup",
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and surrogates
_MULTILINE_FIELDS = ("setup", "usage")  # shell lines, and our own comment
_OPTIONS = {"options": "--sbatch", "arguments": "An argument", "job_name": "The name", "python": "The Python"}


@dataclass(frozen=True, kw_only=True)
class BatchScript:
    """What a job requests from Slurm and what it runs.

    `arguments` None: the script passes on its own arguments, and the caller's PYTHON and NPROC take precedence.
    """

    launcher: Launcher = "torchrun"
    arguments: tuple[str, ...] | None = None  # for `dist-train train`
    usage: str = ""  # the header comment
    job_name: str = "dist-train"
    nodes: int = 2
    nproc: int = 2  # per node
    cpus_per_proc: int = 1
    gpus_per_node: int = 0
    time: str = "60"  # in sbatch's format: minutes, HH:MM:SS, D-HH
    partition: str | None = None
    array: str | None = None
    log: str = "%x-%j.out"
    lead_s: int = 120  # the job is signalled this long before its time limit
    max_requeues: int = 100
    join_timeout_s: float = Config.model_fields["setup_timeout_s"].default  # how long launchers wait for each other
    options: tuple[str, ...] = ()  # additional #SBATCH options
    setup: tuple[str, ...] = ()  # shell lines before the start: modules, an environment
    python: str = "python"

    def __post_init__(self) -> None:
        """Reject text that could add lines to the script.

        Raises:
            ConfigError: a control character, with which a value could become another #SBATCH line.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if field.name not in _MULTILINE_FIELDS and isinstance(text, str) and _CONTROL.search(text):
                    option = _OPTIONS.get(field.name, f"--{field.name}")
                    raise ConfigError(f"{option}={text!r} contains a control character. Remove it.")

    def submit_options(self) -> list[str]:
        """Return the options of `slurm submit` that request the same."""
        defaults, options = BatchScript(), []
        for name in OPTIONS:
            value = getattr(self, name)
            if name in ("nodes", "nproc") or value != getattr(defaults, name):
                option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
                options += [f"{option}={each}" for each in (value if isinstance(value, tuple) else (value,))]
        return options

    def render(self) -> str:
        """Return the complete script."""
        parts = [
            ["#!/usr/bin/env bash", *(f"# {line}" for line in self.usage.splitlines())],
            [f"#SBATCH {option}" for option in self._options()],
            ["set -euo pipefail"],
            _TRAPS.splitlines(),
            [
                "# Set by the submitting shell; each job is its own W&B run.",
                f"unset {' '.join(OF_ONE_WANDB_RUN)}",
            ],
            [*self.setup],
            [f"export PYTHON={shlex.quote(self.python) if self.arguments is not None else '${PYTHON:-python}'}"],
            _RENDEZVOUS.splitlines(),
            ["code=1", "if [[ -z ${told:-} ]]; then  # else: asked to stop before the start"],
            [f"  {line}" for line in [*self._start(), *_WAIT.splitlines()]],
            ["fi"],
            self._end().splitlines(),
        ]
        return "\n".join("\n".join(part) for part in parts if part) + "\n"

    def _options(self) -> list[str]:
        tasks = self.nproc if self.launcher == "srun" else 1
        cpus = self.cpus_per_proc * self.nproc // tasks
        requested = {
            "job-name": self.job_name, "partition": self.partition, "array": self.array,
            "nodes": self.nodes, "ntasks-per-node": tasks, "cpus-per-task": cpus,
            "gpus-per-node": self.gpus_per_node or None, "time": self.time, "output": self.log,
            "open-mode": "append", "signal": f"B:USR1@{self.lead_s}",
        }  # fmt: skip
        return [
            *(shlex.quote(f"--{name}={value}") for name, value in requested.items() if value is not None),
            "--requeue",
            *self.options,
        ]

    def _train(self) -> str:
        """Return the arguments of `train`, quoted for the shell."""
        return '"$@"' if self.arguments is None else shlex.join(self.arguments)

    def _start(self) -> list[str]:
        train = f"-m dist_train train {self._train()} &"
        nproc = f"{self.nproc}" if self.arguments is not None else f"${{NPROC:-${{SLURM_GPUS_ON_NODE:-{self.nproc}}}}}"
        ranks = f"export NPROC={nproc}  # on each node"
        srun = "srun --label --kill-on-bad-exit=1 --wait=60"
        if self.launcher == "srun":
            return [
                "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}",
                "# One task per rank.",
                f'{srun} "$PYTHON" {train}',
            ]
        # torchrun and accelerate default to one thread.
        threads = "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((SRUN_CPUS_PER_TASK + NPROC - 1) / NPROC))}"
        # Not the option of the same name, which torch 2.11 does not have.
        shutdown = f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={max(SHUTDOWN_TIMEOUT_S, self.lead_s)}"
        join_s = math.ceil(self.join_timeout_s)
        if self.launcher == "torchrun":
            return [
                ranks,
                threads,
                shutdown,
                "# torchrun on each node. It has to forward USR1, which otherwise kills it and orphans its ranks.",
                f'{srun} "$PYTHON" -m torch.distributed.run \\',
                '  --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC" --rdzv-backend=c10d \\',
                '  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \\',
                f"  --rdzv-conf=join_timeout={join_s} \\",
                f"  --signals-to-handle={HANDLED_SIGNALS} \\",
                f"  {train}",
            ]
        return [
            ranks,
            threads,
            shutdown,
            "# accelerate launch on each node, in a shell that expands the number of its node.",
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


_RENDEZVOUS = """\
# srun does not inherit --cpus-per-task from the job (since Slurm 22.05).
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# The ranks' rendezvous: the first node, with a port specific to this job and restart.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$MASTER_ADDR" >/dev/null; then
  echo "error: $(hostname) cannot resolve the first node's name \\"$MASTER_ADDR\\": tell your administrators." >&2
  exit 1
fi
export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 12000))
"""

_TRAPS = """\
# The id of an array task is ARRAY_TASK; the bare id may mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# Near the time limit Slurm signals this shell only. It sends TERM to the ranks: they save and end as PREEMPTED. A step
# that is just starting does not receive it, so rank 0 also checks for the file.
export DIST_TRAIN_STOP_FILE=$PWD/.stop-$job
trap 'told=yes; touch "$DIST_TRAIN_STOP_FILE" || :; scancel --signal=TERM "$job" || :' USR1
rm -f "$DIST_TRAIN_STOP_FILE" || :
# In a preemption Slurm sends TERM to the ranks first; this shell still has to wait for the step to end.
trap : TERM
"""

_WAIT = """\
step=$!
until wait "$step"; code=$?; ! kill -0 "$step" 2>/dev/null; do :; done  # a trap interrupts wait
"""

_END = """\
trap : USR1
rm -f "$DIST_TRAIN_STOP_FILE" || :
# torchrun exits with 1 after a signal even if everything is saved: the run's own state decides.
case $({check}) in
  requeue)
    for _ in {{1..30}}; do  # the controller may be unavailable for a while
      # Then wait until Slurm kills this shell: exiting would end the job.
      if scontrol requeue "$job"; then sleep 600 & wait; break; fi
      sleep 10
    done
    ;;
  ended) exit 0 ;;
esac
exit "$code"
"""

# The scripts in slurm/.
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
        usage="A run, accelerate launch on each node. Usage: sbatch --nodes=2 slurm/train_accelerate.sbatch -c mnist",
    ),
    "sweep_array": BatchScript(
        nodes=1,
        array="1-2",
        log="%x-%A_%a.out",
        usage="One run per line of settings in a file. Usage:\n"
        "sbatch --array=1-6%2 slurm/sweep_array.sbatch settings.txt -c mnist    a line: optimizer.lr=3e-4 seed=1",
        setup=(
            'settings=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")',
            'if [[ -z "$settings" ]]; then echo "error: $1 has no line $SLURM_ARRAY_TASK_ID" >&2; exit 2; fi',
            'read -ra settings <<< "$settings"',
            'set -- "${@:2}" "${settings[@]}"',
        ),
    ),
}
