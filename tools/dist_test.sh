#!/usr/bin/env bash
# Evaluate a checkpoint on several GPUs, one process each; without GPUs, in processes on CPU.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
#
# Several nodes: as with dist_train.sh, by NNODES, NODE_RANK, MASTER_ADDR and PORT.
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [NNODES=N NODE_RANK=I MASTER_ADDR=HOST PORT=N] $0 CONFIG CHECKPOINT GPUS [options]" >&2
  exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3

python=${PYTHON:-python}
# By one process first: several at once would read yapf's cache while it is being written.
"$python" -c 'import yapf.yapflib.yapf_api'
exec "$python" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
  "$(dirname "${BASH_SOURCE[0]}")/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
