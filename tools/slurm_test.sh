#!/usr/bin/env bash
# Evaluate a checkpoint under Slurm, one task per GPU.
#
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
#
# In the environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS, as with slurm_train.sh.
set -euo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: [GPUS=N GPUS_PER_NODE=N CPUS_PER_TASK=N SRUN_ARGS=...] $0" \
    "PARTITION JOB_NAME CONFIG CHECKPOINT [options]" >&2
  exit 2
fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
((gpus < per_node)) && per_node=$gpus

python=${PYTHON:-python}
# By one process first: several at once would read yapf's cache while it is being written.
"$python" -c 'import yapf.yapflib.yapf_api'
# SRUN_ARGS is meant to fall into words.
# shellcheck disable=SC2086
exec srun --partition "$partition" --job-name "$job" \
  --ntasks "$gpus" --ntasks-per-node "$per_node" --gres "gpu:$per_node" \
  --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
  "$python" -u "$(dirname "${BASH_SOURCE[0]}")/test.py" "$config" "$checkpoint" \
  --launcher slurm "$@"
