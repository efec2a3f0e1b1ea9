#!/usr/bin/env bash
# torchrun on this machine: NPROC processes, by default one per GPU, without GPUs one per core.
# Usage: [NPROC=2] launch/torchrun.sh -c mnist ...
set -euo pipefail
if [[ ! ${PET_NNODES:-1} =~ ^1(:1)?$ ]]; then echo "error: PET_NNODES=$PET_NNODES: this is for one machine. See launch/nodes.sh, or unset it." >&2; exit 2; fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}
# torchrun has to forward USR1, which otherwise kills it and orphans its workers.
exec torchrun --standalone --nproc-per-node "${NPROC:-auto}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
  -m dist_train train "$@"
