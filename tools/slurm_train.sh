#!/usr/bin/env bash
# Train under Slurm, one task per GPU.
#
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
#
# In the environment
#   GPUS           number of GPUs in all (default 8)
#   GPUS_PER_NODE  at most so many per node (default 8)
#   CPUS_PER_TASK  CPU cores per GPU, for loading data (default 5)
#   SRUN_ARGS      further options of srun, e.g. "--time 2-0 --exclusive"
set -euo pipefail

if [[ $# -lt 4 ]]; then
  echo "usage: [GPUS=N GPUS_PER_NODE=N CPUS_PER_TASK=N SRUN_ARGS=...] $0" \
    "PARTITION JOB_NAME CONFIG WORK_DIR [options]" >&2
  exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
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
  "$python" -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" \
  --work-dir "$work_dir" --launcher slurm "$@"
