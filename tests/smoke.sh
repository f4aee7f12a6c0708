#!/usr/bin/env bash
# Run the tests that need neither mmcv nor what builds on it with another torch than the pinned one.
#
#     tests/smoke.sh 2.5.0 [PYTHON]
#
# In a throw-away environment, of the pinned versions but for torch and the torchvision that belongs
# to it. Takes 10 GB of disk while it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${1:-}
[[ -n $torch ]] || { echo "say which torch to test with: make smoke TORCH=2.5.0" >&2; exit 1; }

mkdir -p build
venv=$(mktemp -d "$PWD/build/smoke-XXXXXX")
trap 'rm -rf "$venv"' EXIT
export TMPDIR=$venv/tmp
mkdir "$TMPDIR"

"${2:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --no-compile)
# torch asks for the sympy that it needs.
grep -v '^sympy==' requirements/constraints.txt >"$TMPDIR/constraints.txt"
for file in "$TMPDIR/constraints.txt" requirements/{build,onedl,dev}.txt; do
  install+=(-c "$file")
done
# ===: exactly this, not a local build such as 2.13.0+cpu, beside which torchvision does not import
"${install[@]}" "torch===$torch" torchvision numpy timm safetensors onedl-mmengine \
  hypothesis pytest pytest-timeout
# mmengine brings the build of OpenCV that needs libGL, which smaller machines lack.
"${install[@]}" --no-deps --force-reinstall opencv-python-headless

"$venv/bin/python" -c 'import platform, torch, torchvision as vision, timm, mmengine, numpy
print("Python", platform.python_version(), "torch", torch.__version__, "torchvision",
      vision.__version__, "timm", timm.__version__, "mmengine", mmengine.__version__,
      "numpy", numpy.__version__)'
export PYTHONPATH=$PWD
"$venv/bin/python" -m pytest -q -m 'not slow' -p no:cacheprovider \
  tests/test_{ops,cpp,layers,goldens,biformer,debiformer,graphs,properties,numerics}.py \
  tests/test_{checkpoint,safe_load}.py
