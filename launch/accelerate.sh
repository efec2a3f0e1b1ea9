#!/usr/bin/env bash
# accelerate launch with this project's config file: a default_config.yaml in the user's home would change the run.
# Usage: [CONFIG=cpu|one_gpu|gpus|machines] launch/accelerate.sh -c mnist ...
set -euo pipefail
if [[ ! ${PET_NNODES:-1} =~ ^1(:1)?$ && ${CONFIG:-cpu} != machines ]]; then echo "error: PET_NNODES=$PET_NNODES: this is for one machine. Set CONFIG=machines, or unset it." >&2; exit 2; fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# accelerate-launch is `accelerate launch` without importing timm and torchvision, as the other subcommands do.
exec accelerate-launch --config_file "$here/accelerate/${CONFIG:-cpu}.yaml" -m dist_train train "$@"
