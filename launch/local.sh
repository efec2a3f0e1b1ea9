#!/usr/bin/env bash
# Train with N processes on this machine (default 2). Usage: launch/local.sh [N] -c mnist ...
set -euo pipefail
nproc=2
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  nproc=$1
  shift
fi
exec python -m dist_train launch --nproc "$nproc" "$@"
