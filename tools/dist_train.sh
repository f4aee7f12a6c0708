#!/usr/bin/env bash
# Train on several GPUs, one process each; without GPUs, in several processes on CPU.
#
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
#
# Several nodes: run it on each of them, with GPUS per node and in the environment
#   NNODES       number of nodes (default 1)
#   NODE_RANK    number of this node, from 0 (default 0)
#   MASTER_ADDR  address of node 0 (default 127.0.0.1)
#   PORT         a free port there (default 29500)
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [NNODES=N NODE_RANK=I MASTER_ADDR=HOST PORT=N] $0 CONFIG GPUS [options]" >&2
  exit 2
fi
config=$1 gpus=$2
shift 2

python=${PYTHON:-python}
# By one process first: several at once would read yapf's cache while it is being written.
"$python" -c 'import yapf.yapflib.yapf_api'
exec "$python" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
  "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" --launcher pytorch "$@"
