# Sourced by the scripts in this folder: sets the project's directory, its Python, and variables for all ranks.
#
# `bst launch` passes on LD_LIBRARY_PATH and every variable whose name begins with NCCL_, RCCL_, GLOO_, TORCH, PYTORCH_,
# TRITON_, DS_, DEEPSPEED_, CUDA_, CUBLAS_, HIP_, HSA_, MIOPEN_, OMP_, MKL_, UCX_, FI_, PYTHON, AWS_, WANDB_ or MLFLOW_,
# except CUDA_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES. Other variables, such as TMPDIR, go into a file .deepspeed_env in
# this directory or the home directory. RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are
# set for each rank. To choose the devices of a host, use the hostfile: `node-01 slots=2 devices=0,1`.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="${BST_BIN:-$PWD/.venv/bin}:$PATH"

# Put settings for your network here. These two are common:
#   export NCCL_IB_HCA=mlx5          the InfiniBand adapters to use
#   export NCCL_SOCKET_IFNAME=ib0    the network interface over which NCCL ranks connect to each other
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
