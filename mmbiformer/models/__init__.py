"""Backbones, one family a file; needs torch, mmengine, timm and safetensors only."""

from ..registry import MODELS
from .biformer import BiFormer
from .bixt import BiXT
from .debiformer import DeBiFormer
from .pyramid import MapPyramid
from .seg_tta import SegTTAModel

__all__ = ['BiFormer', 'BiXT', 'DeBiFormer', 'MapPyramid', 'SegTTAModel']

# Our reader of checkpoints, which stands on the models: whoever has them has it too.
MODELS.import_from_location()
