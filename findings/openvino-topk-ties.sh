#!/usr/bin/env bash
# OpenVINO: TopK of an ONNX file breaks ties against ONNX's rule.
#
# Version:  openvino 2026.4.1 (CPU plugin), onnx 1.23.2, onnxruntime 1.23.2.
# Expected: ONNX's operator TopK says that of equal values the one with the lower index comes
#           first. Every runtime that reads ONNX gives these indices, as ONNX Runtime does.
# Seen:     OpenVINO gives them in another order, and where the last of k is among equals, also
#           others (10 for 0 below). A model that selects by TopK (routes, experts, proposals)
#           computes something else there whenever scores are equal: rounded, or zero.
#
# Output (from which k on it differs may depend on the processor):
#   8 zeros, k = 8
#     ONNX Runtime [0, 1, 2, 3, 4, 5, 6, 7]
#     OpenVINO     [1, 2, 3, 4, 5, 6, 7, 0]
#   0 1 0 1 ... of 49 numbers, k = 8
#     ONNX Runtime [1, 3, 5, 7, 9, 11, 13, 15]
#     OpenVINO     [9, 13, 3, 1, 5, 11, 7, 15]
#   0 1 0 1 ... of 16 numbers, k = 12
#     ONNX Runtime [1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6]
#     OpenVINO     [11, 9, 1, 15, 5, 13, 7, 3, 6, 2, 10, 4]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'openvino==2026.4.1' 'onnx==1.23.2' 'onnxruntime==1.23.2' 'numpy==2.2.6'

"$python" - <<'PYTHON'
import sys

import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper


def top_k(count, k):
    """An ONNX file that gives the k largest of so many numbers, and their indices."""
    graph = helper.make_graph(
        [helper.make_node('TopK', ['x', 'k'], ['values', 'indices'], axis=0)],
        'top_k',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, [count])],
        [
            helper.make_tensor_value_info('values', TensorProto.FLOAT, [k]),
            helper.make_tensor_value_info('indices', TensorProto.INT64, [k]),
        ],
        [helper.make_tensor('k', TensorProto.INT64, [1], [k])],
    )
    opset = [helper.make_opsetid('', 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


core = openvino.Core()
differ = False
for name, x, k in [
    ('8 zeros', np.zeros(8), 8),
    ('0 1 0 1 ... of 49 numbers', np.arange(49) % 2, 8),
    ('0 1 0 1 ... of 16 numbers', np.arange(16) % 2, 12),
]:
    x, file = x.astype(np.float32), top_k(len(x), k)
    right = np.argsort(-x, kind='stable')[:k].tolist()
    runtime = onnxruntime.InferenceSession(file).run(['indices'], {'x': x})[0].tolist()
    found = core.compile_model(core.read_model(file), 'CPU')({'x': x})['indices'].tolist()
    print(f'{name}, k = {k}\n  ONNX Runtime {runtime}\n  OpenVINO     {found}')
    if runtime != right or not np.array_equal(np.sort(-x)[:k], -x[found]):
        sys.exit('This has changed: these are not the largest, or ONNX Runtime differs too.')
    differ |= found != right
sys.exit(0 if differ else 'This has changed.')
PYTHON
