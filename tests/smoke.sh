#!/usr/bin/env bash
# Run the tests that need neither mmcv nor its dependents, with another torch than the locked one.
#
#     tests/smoke.sh 2.10.0 [PYTHON]
#
# In a throw-away environment of the locked versions, except for torch, its torchvision and their
# dependencies. Takes 10 GB of disk while it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${1:-}
[[ -n $torch ]] || { echo "say which torch to test with: make smoke TORCH=2.10.0" >&2; exit 1; }

mkdir -p build
venv=$(mktemp -d "$PWD/build/smoke-XXXXXX")
trap 'rm -rf "$venv"' EXIT
tools/uv.sh venv --quiet --no-config --allow-existing ${2:+--python "$2"} "$venv"
tools/uv.sh export --quiet --locked --extra onedl --no-hashes --no-emit-project |
    grep -Ev '^(torch|torchvision|triton|sympy|fsspec|networkx|setuptools|(nvidia|cuda)-.*)==' >"$venv/locked.txt"
# mmengine asks for the build of OpenCV that needs libGL, which smaller machines lack.
echo "opencv-python; sys_platform == 'never'" >"$venv/override.txt"
# ===: exactly this, not a local build such as 2.13.0+cpu, beside which torchvision does not import
tools/uv.sh pip install --quiet --no-config --python "$venv" \
    -c "$venv/locked.txt" --override "$venv/override.txt" \
    "torch===$torch" torchvision numpy timm safetensors onedl-mmengine opencv-python-headless \
    hypothesis pytest pytest-timeout

"$venv/bin/python" -c 'import platform, torch, torchvision as vision, timm, mmengine, numpy
print("Python", platform.python_version(), "torch", torch.__version__, "torchvision",
      vision.__version__, "timm", timm.__version__, "mmengine", mmengine.__version__,
      "numpy", numpy.__version__)'
# Triton changes with torch, and its interpreter does not run the kernels in every version.
"$venv/bin/python" -m pytest -q -m 'not slow' -p no:cacheprovider \
    tests/{ops,layers,models,weights} --ignore tests/ops/test_triton.py
