#!/usr/bin/env bash
# Bring the virtual environment of the make targets to the state that uv.lock describes.
#
#     tools/setup_env.sh onedl        # .venv: the OneDL forks
#     tools/setup_env.sh openmmlab    # .venv-openmmlab: the OpenMMLab originals
#
# mmcv's C++ operators are compiled once per machine; uv keeps the wheel in its cache.
#
# PYTHON=...            the Python to use (default: that of the environment, else the first in range)
# FORCE_CUDA=1          compile mmcv's CUDA operators too, which needs nvcc; 0: the CPU ones only
#                       (default: those that the environment has, else the CPU ones)
# TORCH_CUDA_ARCH_LIST  what to compile the CUDA operators for (default: the GPUs of this machine)
# CXX, MAX_JOBS         the C++ compiler; how many of them at a time (default: by cores and memory)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0 # a shell may inherit it

stop() {
    printf '%s\n' "set-up stopped: $1" "${@:2}" >&2
    exit 1
}

# Copy uv's output to the log (1), and the progress every 20 seconds to the terminal (3).
follow() {
    local line progress='' shown=$SECONDS
    while IFS= read -r line; do
        printf '%s\n' "$line"
        if [[ $line =~ ^DEBUG\ \[([0-9]+)/([0-9]+)\] ]]; then
            progress="compiled ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files"
        elif [[ $line =~ ^\ *((Downloading|Building)\ .*) ]]; then
            progress=${BASH_REMATCH[1]}
        fi
        if ((SECONDS - shown >= 20)); then
            shown=$SECONDS
            printf '  %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$progress" >&3
        fi
    done
}

case ${1:-onedl} in
    onedl) venv=.venv mmcv=onedl-mmcv ;;
    openmmlab) venv=.venv-openmmlab mmcv=mmcv ;;
    *) stop "$1 is not known; use onedl or openmmlab" ;;
esac
unset VIRTUAL_ENV # another environment, which uv would only warn about
export UV_PROJECT_ENVIRONMENT=$venv
sync=(tools/uv.sh sync --locked --extra "${1:-onedl}" --extra export ${PYTHON:+--python "$PYTHON"})

cuda_for=$(cat "$venv/cuda" 2>/dev/null || true) # what an earlier set-up compiled for
if [[ ${FORCE_CUDA:-${cuda_for:+1}} == 1 ]]; then
    cuda_for=${TORCH_CUDA_ARCH_LIST:-$cuda_for}
    [[ $cuda_for ]] || cuda_for=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        sort -u | paste -sd ';') || stop 'FORCE_CUDA=1 is set, but nvidia-smi finds no GPU.' \
        'Say what to compile for, such as: TORCH_CUDA_ARCH_LIST=9.0'
    command -v nvcc >/dev/null || stop 'FORCE_CUDA=1 is set, but nvcc is not on PATH.' \
        "Install the CUDA toolkit of torch's CUDA version, or set FORCE_CUDA=0."
    export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$cuda_for
    # mmcv ignores this setting. uv's cache is keyed by it, so the CPU wheel is another one.
    sync+=(--config-settings-package "$mmcv:cuda=$cuda_for")
else
    cuda_for=
    # mmcv compiles for CUDA whenever it sees a GPU, whatever FORCE_CUDA says.
    export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=
fi

tools/uv.sh --version >/dev/null || exit 1
if ! plan=$("${sync[@]}" --dry-run -v 2>&1); then
    words=$(sed -n '/^error/,$p' <<<"$plan") hint=
    [[ $words != *nterpreter* ]] ||
        hint='Install Python 3.10, 3.11 or 3.12, or say where it is: make env PYTHON=/path/to/python3.11'
    stop "${words:-$plan}" ${hint:+"$hint"}
fi
[[ $plan != *'Would make no changes'* ]] || exit 0

echo "setting up $venv (everything that uv says: $venv.log)"
if grep -q "uncached distribution: $mmcv==" <<<"$plan"; then
    echo "  compiling mmcv's operators, once per machine: 5 to 12 minutes on two cores"
    if [[ ! $cuda_for ]] && command -v nvidia-smi >/dev/null; then
        echo '  (CPU operators; to train detectors on the GPU: FORCE_CUDA=1 make env)'
    fi
    python=$(sed -n 's/^Using .* interpreter at: //p' <<<"$plan")
    include=$("${python:-$venv/bin/python}" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    echo '#include <Python.h>' | ${CXX:-c++} -std=c++17 -fsyntax-only -I"$include" -x c++ - ||
        stop "${CXX:-c++} cannot compile a file that includes Python.h of $include." \
            'Install a C++17 compiler and the headers, such as: apt install g++ python3-dev' \
            'or say which compiler to use: make env CXX=/path/to/compiler'
    # One compiler takes up to 1.5 GB, of the machine's memory or of what a container may use.
    memory=$({
        awk '/^MemTotal/ { printf "%d\n", $2 / 1024 }' /proc/meminfo
        awk '/^[0-9]/ { printf "%d\n", $1 / 2 ^ 20 }' /sys/fs/cgroup/memory.max 2>/dev/null || true
    } | sort -n | head -n 1)
    jobs=$(nproc)
    while ((jobs > 1 && jobs * 1500 > memory)); do ((jobs--)); done
    export MAX_JOBS=${MAX_JOBS:-$jobs}
fi
"${sync[@]}" -v 2>&1 | follow 3>&1 >"$venv.log" ||
    stop "uv sync failed; its last words, of $venv.log:" "$(grep -v '^DEBUG' "$venv.log" | tail -n 12)"
echo "$cuda_for" >"$venv/cuda"
echo "$venv is ready (${SECONDS} s)"
