#!/usr/bin/env bash
# Train on several machines without a scheduler: run this on each. HEAD is one of them; all share the run directory.
# Usage: HEAD=node1 [NODES=2] [NPROC=4] launch/nodes.sh -c mnist --run-name first ...
set -euo pipefail
exec python -m dist_train launch --nproc "${NPROC:-1}" --nnodes "${NODES:-2}" --rdzv-endpoint "$HEAD" "$@"
