# Sourced by the scripts in this folder: sets the project's directory, its Python, and variables for all ranks.
#
# `bst launch` passes on LD_LIBRARY_PATH and every variable whose name begins with NCCL_, GLOO_, TORCH, DS_, CUDA_,
# AWS_, OMP_, UCX_ or FI_, and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT itself. The hosts need no
# other setup. To choose the devices of a host, use the hostfile: `node-01 slots=2 devices=0,1`.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="${BST_BIN:-$PWD/.venv/bin}:$PATH"

# Put settings for your network here. These two are common:
#   export NCCL_IB_HCA=mlx5          the InfiniBand adapters to use
#   export NCCL_SOCKET_IFNAME=ib0    the network interface over which NCCL ranks connect to each other
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
