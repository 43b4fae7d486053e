#!/usr/bin/env bash
# Train on the hosts of a hostfile, started over ssh by pdsh.
#
#   launch/cluster/pdsh.sh RECIPE HOSTFILE RUN_DIR [section.field=value ...]
#
# Needs pdsh on this machine, and ssh without a password to every host. After a stop, run the same command again:
# it continues from the newest checkpoint.
set -euo pipefail
recipe=$(realpath "$1") hosts=$(realpath "$2") run_dir=$(realpath -m "$3")
shift 3
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec bst launch "$recipe" "$@" --launcher pdsh --hostfile "$hosts" --run-dir "$run_dir" --resume --max-restarts 3
