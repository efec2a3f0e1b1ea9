#!/usr/bin/env bash
# As nodes.sh, but it starts again after a failure, from the last checkpoint, with the machines that are left.
# Usage: HEAD=node1 [NODES=1:2] [NPROC=4] launch/restart.sh -c mnist --run-name first -o stall_timeout_s=60 ...
# A machine that is silent is noticed after stall_timeout_s. HEAD has to be there: the others meet at it.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NODES=${NODES:-1:2}
until "$here/nodes.sh" "$@"; do
  code=$?
  # 2: the settings are wrong; 130 and 143: told to stop.
  if ((code == 2 || code > 128)); then exit "$code"; fi
  sleep 2
done
