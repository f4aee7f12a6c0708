#!/usr/bin/env bash
# safetensors: its NumPy functions write arrays in Fortran order permuted.
#
# Version:  safetensors 0.8.0, numpy 2.2.6.
# Expected: what is saved is what is loaded; or an error, which the same library's functions for
#           PyTorch raise for a transposed tensor.
# Seen:     save and save_file write the memory as it lies, and the shape as if it were in C order.
#           A transposed weight loads with its numbers mixed up: same shape, no error, no warning.
#           The documentation asks for contiguous tensors; to NumPy, Fortran order is contiguous
#           too, and nothing checks.
#
# Output:
#   saved (a transposed matrix)   loaded
#   [[0. 1. 2.]                   [[0. 3. 1.]
#    [3. 4. 5.]]                   [4. 2. 5.]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'safetensors==0.8.0' 'numpy==2.2.6'

"$python" - "$folder" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load, load_file, save, save_file

folder = sys.argv[1]
saved = np.array([[0, 3], [1, 4], [2, 5]], np.float32).T
loaded = load(save({'weight': saved}))['weight']

print('saved (a transposed matrix)   loaded')
for left, right in zip(str(saved).splitlines(), str(loaded).splitlines()):
    print(f'{left:29} {right}')

in_memory_order = saved.ravel(order='K').reshape(saved.shape)
save_file({'weight': saved}, f'{folder}/f.safetensors')
save_file({'weight': np.ascontiguousarray(saved)}, f'{folder}/c.safetensors')
as_described = (
    np.array_equal(loaded, in_memory_order)
    and not np.array_equal(loaded, saved)
    and np.array_equal(load_file(f'{folder}/f.safetensors')['weight'], in_memory_order)
    and np.array_equal(load_file(f'{folder}/c.safetensors')['weight'], saved)
)
sys.exit(0 if as_described else 'This has changed.')
PYTHON
