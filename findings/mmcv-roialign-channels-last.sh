#!/usr/bin/env bash
# MMCV: RoIAlign reads a channels-last feature map as if its memory were NCHW.
#
# Version:  mmcv-lite 2.1.0, the wheel of mmcv with the sources of its operators; torch 2.11.0.
#           Only RoIAlign's two files are compiled here, for the CPU, which needs a C++ compiler and
#           a minute. onedl-mmcv 2.3.6 with all operators gives the same.
# Expected: two equal tensors give equal results, whatever their strides; torchvision's operator
#           of the same name does so.
# Seen:     neither the Python class nor the kernel asks for contiguous memory, so a map in
#           torch.channels_last gives numbers of other places and channels, silently. A
#           backbone in channels_last, PyTorch's advice for speed, gives such maps.
#
# Output:
#   equal maps: True
#   channel means over the whole image, NCHW memory:          [0.0, 1.0, 2.0, 3.0]
#   channel means over the whole image, channels-last memory: [1.5, 1.5, 1.5, 1.5]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'setuptools==80.9.0' 'ninja==1.13.0' 'packaging==25.0' \
  'Pillow==11.3.0' 'mmengine-lite==0.10.7' 'opencv-python-headless==4.12.0.88'
install --no-deps 'mmcv-lite==2.1.0'
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/built" PYTHONWARNINGS=ignore

"$python" - "$folder" <<'PYTHON'
import logging
import sys
import types

logging.disable(logging.WARNING)
import mmcv
import torch
from torch.utils.cpp_extension import load

ops = f'{mmcv.__path__[0]}/ops'
names = (
    'input rois output argmax_y argmax_x aligned_height aligned_width spatial_scale '
    'sampling_ratio pool_mode aligned'
)
named = ', '.join(f'py::arg("{name}")' for name in names.split())
source = f'{sys.argv[1]}/operator.cpp'
with open(source, 'w') as file:
    file.write(f"""
        #include "{ops}/csrc/pytorch/roi_align.cpp"
        #include "{ops}/csrc/pytorch/cpu/roi_align.cpp"
        #include <torch/csrc/utils/pybind.h>
        PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{
            m.def("roi_align_forward", &roi_align_forward, {named});
            m.def("roi_align_backward", &roi_align_backward);
        }}""")
operator = load('operator_ext', [source], ['-O0'], extra_include_paths=[f'{ops}/csrc/common'])
# mmcv.ops itself would ask for all operators.
sys.modules['mmcv._ext'] = operator
sys.modules['mmcv.ops'] = package = types.ModuleType('mmcv.ops')
package.__path__ = [ops]
from mmcv.ops.roi_align import RoIAlign

nchw = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 8, 8).contiguous()
channels_last = nchw.to(memory_format=torch.channels_last)
whole = torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]])  # image 0, x1, y1, x2, y2
means = [RoIAlign(1)(x, whole).flatten().tolist() for x in (nchw, channels_last)]
print('equal maps:', torch.equal(nchw, channels_last))
print('channel means over the whole image, NCHW memory:         ', means[0])
print('channel means over the whole image, channels-last memory:', means[1])
sys.exit(0 if means == [[0.0, 1.0, 2.0, 3.0], [1.5] * 4] else 'This has changed.')
PYTHON
