"""Layers on channels-last maps, (B, H, W, C) in and out."""

from .bidirectional import BidirectionalCrossAttention
from .bra import BiLevelRoutingAttention
from .conv import DepthwiseConv2d
from .deformable_agent import DeformableAgentAttention
from .full_attention import FullAttention
from .linear import Linear
from .mlp import MLP, ConvMLP
from .norm import LayerNorm
from .router import RegionRouter
from .tokenizer import Tokenizer

__all__ = [
    'MLP',
    'BiLevelRoutingAttention',
    'BidirectionalCrossAttention',
    'ConvMLP',
    'DeformableAgentAttention',
    'DepthwiseConv2d',
    'FullAttention',
    'LayerNorm',
    'Linear',
    'RegionRouter',
    'Tokenizer',
]
