#!/usr/bin/env bash
# Several machines without a scheduler: this on each of them. They meet at HEAD, one of them, and share the run directory.
# Usage: HEAD=node1 [NODES=2] [NPROC=4] launch/nodes.sh -c mnist --run-name first ...
set -euo pipefail
exec python -m dist_train launch --nproc "${NPROC:-1}" --nnodes "${NODES:-2}" --rdzv-endpoint "$HEAD" "$@"
