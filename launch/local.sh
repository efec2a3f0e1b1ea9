#!/usr/bin/env bash
# Processes of this machine that train together. Usage: launch/local.sh [N] -c mnist ...
set -euo pipefail
nproc=2
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
  nproc=$1
  shift
fi
exec python -m dist_train launch --nproc "$nproc" "$@"
