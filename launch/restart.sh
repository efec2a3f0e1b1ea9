#!/usr/bin/env bash
# Like nodes.sh, but restarts after a failure, from the last checkpoint, with the machines that are available. A machine
# that joins or returns makes the others save, stop and restart with it. Run the same command on each machine.
# Usage: HEAD=node1 [NODES=1:2] [NPROC=4] launch/restart.sh -c mnist --run-name first -o stall_timeout_s=60 ...
# A machine that stops responding is noticed after stall_timeout_s. HEAD hosts the rendezvous and must be up.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HEAD=${HEAD:?is the name of one of the machines} NODES=${NODES:-1:2}
again=requeue
while [[ $again == requeue ]]; do
  "$here/nodes.sh" "$@" &
  nodes=$!
  trap 'kill -TERM "$nodes"' TERM INT
  until wait "$nodes"; code=$?; ! kill -0 "$nodes" 2>/dev/null; do :; done  # a trap interrupts wait
  if ((code == 2 || code > 128)); then exit "$code"; fi  # invalid settings; stopped
  again=$(python -m dist_train slurm requeue-check "$@")
  export DIST_TRAIN_REQUEUED=yes  # a STOP made in the meantime still counts
  sleep 2
done
[[ $again == ended ]]
