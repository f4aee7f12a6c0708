"""BiFormer: a four-stage vision transformer with bi-level routing attention (CVPR 2023)."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers import MLP, BiLevelRoutingAttention, FullAttention
from ..layers.grid import to_grid
from ..registry import MODELS
from .base import rename
from .hierarchical import HEAD_DIM, Block, HierarchicalBackbone, Stage, check_arch

STL = dict(depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4, layout='swin')
ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(depths=(2, 2, 8, 2), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'small': dict(depths=(4, 4, 18, 4), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'base': dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768), mlp_ratio=3),
    'stl': STL,
    'stl_nchw': dict(STL, lepe_source='value', padding='projected'),
}
ARCH_DEFAULTS = dict(topks=(1, 4, 16, None), layout='conv', lepe_source='input', padding='input')

# The authors' ImageNet-1K weights, as their page lists them.
SHARES = dict(
    tiny='s!AkBbczdRlZvChHEOoGkgwgQzEDlM',
    small='s!AkBbczdRlZvChHDyM-x9KWRBZ832',
    base='s!AkBbczdRlZvChHI_XPhoadjaNxtO',
    stl='s!AkBbczdRlZvChSf-m7ujkvx9lIQ1',
    stl_nchw='s!AkBbczdRlZvChWYrKbWbMgqd2Ai0',
)
# The authors' names, and ours.
RELEASED_NAME = re.compile(r'stages\.\d+\.(?:blocks\.)?\d+\.mlp\.0\.weight')
RENAMES = (
    (r'^(stages\.\d+)\.blocks\.', r'\1.'),
    (r'\.attn\.(?:qkv\.qkv|qkv_linear)\.', '.attn.qkv.'),
    (r'\.attn\.(?:wo|output_linear)\.', '.attn.proj.'),
    (r'\.mlp\.0\.', '.mlp.fc1.'),
    (r'\.mlp\.[23]\.', '.mlp.fc2.'),
    (r'^extra_norms\.(\d)\.', r'norm\1.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


@MODELS.register_module()
class BiFormer(HierarchicalBackbone):
    """BiFormer backbone.

    `BiFormer: Vision Transformer with Bi-Level Routing Attention
    <https://arxiv.org/abs/2303.08810>`_; equal to the authors' code,
    https://github.com/rayleizhu/BiFormer, number for number.

    For dense tasks (the default) the map of each stage in ``out_indices`` passes a LayerNorm of its
    own. For classification set ``final_norm=True``: the backbone then has the final BatchNorm
    instead and gives the last map only. Stages after the last of ``out_indices`` are not built, so
    every parameter is used.

    Images may be as small as one pixel with the layout ``'conv'``. The layout ``'swin'`` does not
    pad its patches and needs 32 pixels a side for all four maps (16 for three, and so on). Under
    ``padding='projected'`` each map must be at least as large as the grid: 112 pixels a side for
    ``'stl_nchw'`` at 7x7. Training with BatchNorm needs more than one position in the last map or
    more than one image.

    Example:
        >>> import torch
        >>> from mmbiformer.models import BiFormer
        >>> maps = BiFormer('tiny')(torch.randn(2, 3, 224, 224))
        >>> [tuple(each.shape) for each in maps]
        [(2, 64, 56, 56), (2, 128, 28, 28), (2, 256, 14, 14), (2, 512, 7, 7)]

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'stl'``, ``'stl_nchw'``, or a dict of

            - depths (sequence of int): Blocks per stage.
            - embed_dims (sequence of int): Channels per stage, multiples of 32.
            - mlp_ratio (float): Hidden width of the MLPs.
            - topks (sequence of int | None): Routed regions per stage; None is full attention.
              Defaults to (1, 4, 16, None).
            - layout (str): ``'conv'``: overlapping convolutions between stages and a
              convolutional position embedding per block; ``'swin'``: patch embedding and merging
              as in Swin, no position embedding. Defaults to ``'conv'``.
            - lepe_source (str): What the LePE of full attention convolves, ``'input'`` or
              ``'value'``. Defaults to ``'input'``.
            - padding (str): Default of the argument ``padding``. Defaults to ``'input'``.

            Defaults to ``'small'``.
        region_grid: Regions per column and per row of a map, an int or a pair. The authors use 7
            for ImageNet, 8 for ADE20K, 16 for COCO. ``'auto'`` chooses for each map, so that the
            routed stages' time per pixel grows slowly: 7 at 224x224, rectangular grids for
            rectangular maps; see :func:`mmbiformer.ops.auto_grid`. No published figure was
            obtained with it. ``torch.compile`` then makes one graph for each size, and 8 at most
            (``torch._dynamo.config.recompile_limit``); ``torch.export`` refuses dynamic sizes.
            Defaults to 7.
        out_indices: Stages whose maps are returned, from 0. Defaults to None: all for dense tasks,
            the last with ``final_norm``.
        final_norm: Whether to end in the BatchNorm that the classification head expects.
            Defaults to False.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0 over all
            blocks. Defaults to 0.
        padding: What to do with maps whose sides are not multiples of the grid: ``'input'``,
            ``'projected'`` or ``'mask'``, see
            :class:`~mmbiformer.layers.BiLevelRoutingAttention`. Defaults to None: as the arch was
            released.
        frozen_stages: Freeze the stem (0), or the stem and the first n stages (n); -1 freezes
            nothing. Defaults to -1.
        norm_eval: Whether BatchNorm stays in eval mode while training. Defaults to False.
        with_cp: Whether to recompute blocks in the backward pass to save memory. Defaults to False.
        backend: Backend of :func:`mmbiformer.ops.routed_attention`. Defaults to ``'auto'``.
        in_channels: Channels of the images. Defaults to 3.
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' released files as they are. Defaults to None: truncated normal 0.02
            for linear layers, PyTorch's default for convolutions, as the authors.

    Raises:
        ValueError: If an argument does not fit. In ``forward``: if the images are too small.
    """

    archs = ARCHS
    released = {
        arch: f'https://api.onedrive.com/v1.0/shares/{share}/root/content'
        for arch, share in SHARES.items()
    }
    authors_page = 'https://github.com/rayleizhu/BiFormer'

    def __init__(
        self,
        arch: str | dict[str, Any] = 'small',
        region_grid: int | tuple[int, int] | str = 7,
        out_indices: Sequence[int] | int | None = None,
        final_norm: bool = False,
        drop_path_rate: float = 0.0,
        padding: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: str = 'auto',
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = check_arch(arch, ARCHS, {'depths', 'embed_dims', 'mlp_ratio'}, ARCH_DEFAULTS)
        if arch['layout'] not in ('conv', 'swin'):
            raise ValueError(f"layout={arch['layout']!r} must be 'conv' or 'swin'")
        padding = padding or arch['padding']
        super().__init__(
            arch=arch,
            stage_options=dict(region_grid=region_grid, padding=padding, backend=backend),
            out_indices=out_indices,
            final_norm=final_norm,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            in_channels=in_channels,
            init_cfg=init_cfg,
        )
        self.min_size = _min_size(arch, to_grid(region_grid), padding, len(self.stages))
        self.apply(_init_weights)

    def build_stage(self, index: int, drop_paths: list[float], **options: Any) -> Stage:
        return BiFormerStage(
            self.arch['embed_dims'][index],
            topk=self.arch['topks'][index],
            mlp_ratio=self.arch['mlp_ratio'],
            lepe_source=self.arch['lepe_source'],
            pos_embed=self.arch['layout'] == 'conv',
            drop_paths=drop_paths,
            **options,
        )

    def build_downsample(self, index: int) -> nn.Module:
        if self.arch['layout'] == 'conv':
            return super().build_downsample(index)
        dim, in_dim = self.arch['embed_dims'][index], self.in_dim(index)
        if index > 0:  # patch merging
            return nn.Sequential(nn.BatchNorm2d(in_dim), nn.Conv2d(in_dim, dim, 2, 2))
        return nn.Sequential(nn.Conv2d(in_dim, dim, 4, 4), nn.BatchNorm2d(dim))

    @staticmethod
    def is_released(names: Iterable[str]) -> bool:
        return any(map(RELEASED_NAME.fullmatch, names))

    @staticmethod
    def convert_released(weights: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
        renames = RENAMES
        if any('.attn.qkv_linear.' in name for name in weights):  # STL-nchw
            full = '|'.join(
                re.escape(name.removesuffix('qkv.weight'))
                for name in weights
                if name.endswith('.attn.qkv.weight')
            )
            renames = ((rf'^({full})lepe\.', r'\1value_lepe.'), *RENAMES)
        return rename(weights, renames)


class BiFormerStage(Stage):
    """Blocks of BiFormer on maps of one size.

    Args:
        dim: Channels, C.
        topk: Routed regions; None for full attention.
        mlp_ratio: Hidden width of the MLPs, in multiples of ``dim``.
        lepe_source: What the LePE of full attention convolves, ``'input'`` or ``'value'``.
        pos_embed: Whether blocks begin with a depthwise convolution.
        drop_paths: Stochastic depth rates, one a block.
        **routing: ``region_grid``, ``padding`` and ``backend`` of
            :class:`~mmbiformer.layers.BiLevelRoutingAttention`.
    """

    def __init__(
        self,
        dim: int,
        topk: int | None,
        mlp_ratio: float,
        lepe_source: str,
        pos_embed: bool,
        drop_paths: list[float],
        **routing: Any,
    ) -> None:
        blocks = []
        for drop_path in drop_paths:
            if topk is None:
                attn = FullAttention(dim, lepe_source=lepe_source)
            else:
                attn = BiLevelRoutingAttention(dim, num_heads=dim // HEAD_DIM, topk=topk, **routing)
            blocks.append(Block(dim, attn, MLP(dim, int(mlp_ratio * dim)), pos_embed, drop_path))
        super().__init__(blocks)


def _min_size(
    arch: dict[str, Any], grid: tuple[int, int] | str, padding: str, num_stages: int
) -> tuple[int, int]:
    """The smallest images, in pixels, whose maps are not empty and can be cut into regions."""
    conv = arch['layout'] == 'conv'
    needed = [(num_stages - 1, (1, 1))]  # stages, and the smallest maps that they can have
    if padding == 'projected' and grid != 'auto':
        needed += [(i, grid) for i in range(num_stages) if arch['topks'][i] is not None]
    sides = []
    for axis in (0, 1):
        least = [(2 ** (i + 2), size[axis]) for i, size in needed]
        # Convolutions round up, patches down.
        sides.append(max(stride * (n - 1) + 1 if conv else stride * n for stride, n in least))
    return tuple(sides)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
