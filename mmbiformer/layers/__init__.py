"""Layers on channels-last maps, (B, H, W, C) in and out."""

from .bra import BiLevelRoutingAttention
from .conv import DepthwiseConv2d
from .full_attention import FullAttention

__all__ = ['BiLevelRoutingAttention', 'DepthwiseConv2d', 'FullAttention']
