"""Layers on channels-last maps, (B, H, W, C) in and out."""

from .bra import BiLevelRoutingAttention
from .conv import DepthwiseConv2d
from .full_attention import FullAttention
from .linear import Linear
from .mlp import MLP

__all__ = ['MLP', 'BiLevelRoutingAttention', 'DepthwiseConv2d', 'FullAttention', 'Linear']
