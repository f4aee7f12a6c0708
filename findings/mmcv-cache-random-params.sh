#!/usr/bin/env bash
# MMCV: a subclass that draws its numbers otherwise makes its base class unusable with shared ones.
#
# Version:  mmcv-lite 2.1.0 (and onedl-mmcv 2.3.6), mmengine 0.10.7, mmpretrain 1.2.0.
# Expected: a subclass that overrides a method under @cache_randomness changes nothing for its base
#           class.
# Seen:     both classes keep the names of such methods in one list, to which the subclass appends
#           the name once more. The base class then wraps the method twice, counts each call as two
#           and stops: "should be invoked at most once". MMPretrain's RandomResizedCrop, which
#           EfficientNetRandomCrop overrides, fails so inside ApplyToMultiple and
#           cache_random_params.
#
# Output:
#   alone: share_random_params works
#   beside a subclass: RuntimeError: ... has been invoked 2 times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
python=$folder/env/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
if command -v uv >/dev/null; then install() { uv pip install --quiet --python "$python" "$@"; }; fi
install 'torch==2.11.0' 'numpy==2.2.6' 'mmengine==0.10.7' 'mmcv-lite==2.1.0' 'setuptools<81' \
  'opencv-python-headless==4.12.0.88'

"$python" - <<'PYTHON'
import sys

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_random_params, cache_randomness


class Crop(BaseTransform):
    @cache_randomness
    def draw(self):
        return np.random.rand()

    def transform(self, results):
        return {**results, 'drawn': self.draw()}


def shared():
    crop = Crop()
    with cache_random_params(crop):
        assert crop({})['drawn'] == crop({})['drawn']


shared()
print('alone: share_random_params works')


class OtherCrop(Crop):
    @cache_randomness
    def draw(self):
        return np.random.rand() / 2


try:
    shared()
except RuntimeError as error:
    print('beside a subclass: RuntimeError: ...', str(error)[-25:])
    sys.exit(0)
sys.exit('This has changed.')
PYTHON
