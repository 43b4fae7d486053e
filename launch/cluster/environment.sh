# Sourced by the scripts beside it: the project's directory, its Python, and variables for all ranks.
#
# `bst launch` hands on every variable whose name begins with NCCL_, GLOO_, TORCH, DS_, CUDA_, AWS_, OMP_, UCX_ or FI_
# and LD_LIBRARY_PATH, and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT itself. Nothing else has to be
# arranged on the hosts. A host's devices are chosen in the hostfile: `node-01 slots=2 devices=0,1`.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="${BST_BIN:-$PWD/.venv/bin}:$PATH"

# What your network needs goes here. These two are common:
#   export NCCL_IB_HCA=mlx5          the InfiniBand adapters to use
#   export NCCL_SOCKET_IFNAME=ib0    the interface over which NCCL's ranks find each other
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
