"""Backbones, one family a file; needs torch, mmengine, timm and safetensors only."""

from ..registry import MODELS
from .biformer import BiFormer
from .debiformer import DeBiFormer

__all__ = ['BiFormer', 'DeBiFormer']

# Our reader of checkpoints, which stands on the models: whoever has them has it too.
MODELS.import_from_location()
