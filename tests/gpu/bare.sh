#!/bin/bash
# All that needs a GPU, on a machine without network that has Python, torch, numpy and pip, and this directory:
#
#     tests/gpu/bare.sh WHEELS RESULTS [options of `bst bench gpu`]
#
# WHEELS is what `make wheels-gpu` wrote on another machine; PYTHON names another Python than python3. Nothing of the
# machine is changed: the packages go to a folder that is removed at the end. RESULTS gets the tests' log and, in bench/,
# all figures; what is done is there when it is stopped. The status is 0 when all tests passed and no part failed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 's/^# \?//; 2,8p' "$0" >&2; exit 2; }
wheels=$(realpath "$1") results=$(realpath -m "$2") python=${PYTHON:-python3} packages=$(mktemp -d)
shift 2
trap 'rm -rf "$packages"' EXIT
cd "$(dirname "$0")/../.."
mkdir -p "$results"

names=$(cd "$wheels" && printf '%s\n' *.whl | sed 's/-.*//' | sort -u)
$python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --find-links "$wheels" --target "$packages" $names
# pip has compiled nothing: what one process imports it keeps compiled, for those that start later.
export PYTHONPATH=$packages:$PWD PYTHONDONTWRITEBYTECODE='' PYTHONUNBUFFERED=1
$python -m bst_dist --version > "$results/versions.txt"
nvidia-smi > "$results/nvidia-smi.txt" || true

failed=0
CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1 \
    $python -m pytest -p no:cacheprovider -n logical --maxprocesses 8 --durations 20 -rs -m gpu tests/gpu \
    > "$results/tests.log" 2>&1 || failed=1
tail -n 1 "$results/tests.log"
$python -m bst_dist bench gpu --output "$results/bench" "$@" 2>&1 | tee "$results/bench.log" || failed=1
exit $failed
