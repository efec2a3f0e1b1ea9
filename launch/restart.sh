#!/usr/bin/env bash
# As nodes.sh, but it starts again after a failure, from the last checkpoint, with the machines that are there; one that
# comes (back) has the others save, stop and start with it. The same line on each machine.
# Usage: HEAD=node1 [NODES=1:2] [NPROC=4] launch/restart.sh -c mnist --run-name first -o stall_timeout_s=60 ...
# A machine that falls silent is noticed after stall_timeout_s. HEAD has to be there: the others meet at it.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NODES=${NODES:-1:2}
again=requeue
while [[ $again == requeue ]]; do
  "$here/nodes.sh" "$@"
  code=$?
  if ((code == 2 || code > 128)); then exit "$code"; fi  # wrong settings; told to stop
  again=$(python -m dist_train slurm requeue-check "$@")
done
exit "$code"
