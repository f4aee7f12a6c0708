#!/usr/bin/env bash
# PyTorch's ONNX exporters: rounding up by -(-n // m) becomes rounding down in the file.
#
# Version:  torch 2.11.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.23.2.
# Expected: -(-n // 8), the usual Python for "n / 8 rounded up", is the same in an exported model
#           with an open size.
# Seen:     both exporters, the one on torch.export and the older one on tracing, write it as
#           Neg, Div, Neg. ONNX divides integers towards zero, Python towards minus infinity. So
#           the file rounds down, without a warning, at every n that 8 does not divide.
#
# Output:
#   exporter        height  PyTorch  ONNX file
#   torch.export        16        2          2
#   torch.export        20        3          2
#   torch.export        23        3          2
#   tracing             16        2          2
#   tracing             20        3          2
#   tracing             23        3          2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'onnx==1.23.2' 'onnxscript==0.7.2' 'onnxruntime==1.23.2'

"$python" - "$folder" <<'PYTHON'
import contextlib
import io
import logging
import sys
import warnings

import numpy as np
import onnxruntime
import torch

logging.disable(logging.WARNING)
warnings.simplefilter('ignore')


class Windows(torch.nn.Module):
    """A one for each window of 8 rows of an image."""

    def forward(self, image):
        return image.new_ones(-(-image.shape[2] // 8)) * image.mean()


exporters = {
    'torch.export': dict(dynamo=True, dynamic_shapes={'image': {2: torch.export.Dim('h', min=2)}}),
    'tracing': dict(dynamo=False, dynamic_axes={'image': {2: 'h'}, 'windows': {0: 'n'}}),
}
model, example = Windows().eval(), (torch.zeros(1, 3, 32, 32),)
path = f'{sys.argv[1]}/windows.onnx'

print('exporter        height  PyTorch  ONNX file')
changed = False
for name, options in exporters.items():
    names = dict(input_names=['image'], output_names=['windows'])
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(model, example, path, **names, **options)
    session = onnxruntime.InferenceSession(path)
    for height in 16, 20, 23:
        image = np.zeros((1, 3, height, 32), np.float32)
        right = len(model(torch.from_numpy(image)))
        found = len(session.run(None, {'image': image})[0])
        print(f'{name:14} {height:7} {right:8} {found:10}')
        changed |= (right, found) != (-(-height // 8), height // 8)
sys.exit('This has changed.' if changed else 0)
PYTHON
