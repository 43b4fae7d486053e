#!/usr/bin/env bash
# Train without ssh: run the same command on every host, by any means.
#
#   MASTER_ADDR=node-01 NODES=3 NODE=0 RANKS=8 launch/cluster/torchrun.sh RECIPE RUN_DIR [section.field=value ...]
#
# NODE is the index of the host, from 0; host 0 is MASTER_ADDR. torchrun turns every failure into status 1. If the exact
# status matters, as in Kubernetes, `bst train --nodes N --node I --master ADDRESS:PORT` does the same and keeps it.
set -euo pipefail
recipe=$(realpath "$1") run_dir=$(realpath -m "$2")
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "$RANKS" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --module bst_dist.train "$recipe" "$@" --run-dir "$run_dir" --resume
