#!/usr/bin/env bash
# As nodes.sh, but it starts again after a failure, from the last checkpoint, with the machines that are there; one that
# comes (back) has the others save, stop and start with it. The same line on each machine.
# Usage: HEAD=node1 [NODES=1:2] [NPROC=4] launch/restart.sh -c mnist --run-name first -o stall_timeout_s=60 ...
# A machine that falls silent is noticed after stall_timeout_s. HEAD has to be there: the others meet at it.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HEAD=${HEAD:?is the name of one of the machines} NODES=${NODES:-1:2}
again=requeue
while [[ $again == requeue ]]; do
  "$here/nodes.sh" "$@" &
  nodes=$!
  trap 'kill -TERM "$nodes"' TERM INT
  until wait "$nodes"; code=$?; ! kill -0 "$nodes" 2>/dev/null; do :; done  # a trap ends one wait
  if ((code == 2 || code > 128)); then exit "$code"; fi  # wrong settings; told to stop
  again=$(python -m dist_train slurm requeue-check "$@")
  export DIST_TRAIN_REQUEUED=yes  # a STOP that was made meanwhile holds
  sleep 2
done
[[ $again == ended ]]
