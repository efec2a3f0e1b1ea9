#!/usr/bin/env bash
# torchrun on this machine: one process per GPU, without GPUs one per core, or NPROC. Usage: [NPROC=2] launch/torchrun.sh -c mnist ...
set -euo pipefail
if [[ ${PET_NNODES:-1} != 1 ]]; then echo "error: PET_NNODES=$PET_NNODES: this is for one machine. See launch/nodes.sh, or unset it." >&2; exit 2; fi
# USR1 would kill torchrun and leave its workers behind, were it not told to pass it on.
exec torchrun --standalone --nproc-per-node "${NPROC:-auto}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 60 \
  -m dist_train train "$@"
