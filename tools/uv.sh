#!/usr/bin/env bash
# Run uv: the machine's own if it is new enough, else the one that pip puts into .venv-uv.
#
#     tools/uv.sh lock --upgrade-package timm
#
# PYTHON=...   the Python to make .venv-uv with (default: the first that can)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
oldest=0.13 pinned=0.13.8 # oldest: the required-version of pyproject.toml

version() { "$1" --version 2>/dev/null | cut -d ' ' -f 2; }
for uv in "$(command -v uv)" "$root/.venv-uv/bin/uv"; do
    if printf '%s\n' "$oldest" "$(version "$uv")" | sort -VC; then exec "$uv" "$@"; fi
done

for python in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    if "$python" -m venv --clear "$root/.venv-uv" &>/dev/null; then
        "$root/.venv-uv/bin/python" -m pip install --quiet "uv==$pinned" >&2
        exec "$root/.venv-uv/bin/uv" "$@"
    fi
done
cat >&2 <<END
set-up stopped: it needs uv, and no Python here can install it (tried: ${PYTHON:-python3, python3.12, python3.11, python3.10}).
Install Python 3.10, 3.11 or 3.12 with its module venv (such as: apt install python3 python3-venv),
or say where it is: make env PYTHON=/path/to/python3.11
END
exit 1
