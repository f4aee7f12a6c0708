"""Backbones, one a file; needs torch, mmengine and timm only."""

from ..checkpoint import register_safe_loader
from .biformer import BiFormer
from .debiformer import DeBiFormer

__all__ = ['BiFormer', 'DeBiFormer']

# Whoever builds a model of ours, by whatever tool, loads files through our loader.
register_safe_loader()
