"""BiFormer: a four-stage vision transformer with bi-level routing attention (CVPR 2023)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checkpoint import LEPE_VERSIONS
from ..layers import MLP, BiLevelRoutingAttention, FullAttention
from ..layers.bra import to_grid
from ..registry import MODELS
from .hierarchical import (
    HEAD_DIM,
    NORM_EPS,
    Block,
    HierarchicalBackbone,
    check_arch,
    conv_downsample,
)

STL = dict(depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4, layout='swin')
ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(depths=(2, 2, 8, 2), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'small': dict(depths=(4, 4, 18, 4), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'base': dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768), mlp_ratio=3),
    'stl': STL,
    'stl_nchw': dict(STL, lepe_source='value', padding='projected'),
}
ARCH_DEFAULTS = dict(topks=(1, 4, 16, None), layout='conv', lepe_source='input', padding='input')


@MODELS.register_module()
class BiFormer(HierarchicalBackbone):
    """BiFormer backbone.

    `BiFormer: Vision Transformer with Bi-Level Routing Attention
    <https://arxiv.org/abs/2303.08810>`_; equal to the authors' code,
    https://github.com/rayleizhu/BiFormer, number for number.

    For dense tasks (the default) the map of each stage in ``out_indices`` passes a LayerNorm of its
    own. For classification set ``final_norm=True``: the backbone then has the final BatchNorm
    instead and gives the last map only. Stages after the last of ``out_indices`` are not built, so
    no parameter goes unused.

    Images may be as small as one pixel with the layout ``'conv'``. Patches are not padded by the
    layout ``'swin'``, so 32 pixels a side are the least for all four maps (16 for three, and so
    on). Under ``padding='projected'`` each map must be at least as large as the grid: 112 pixels a
    side for ``'stl_nchw'`` at 7x7. Training with BatchNorm needs, as everywhere, more than one
    position in the last map or more than one image.

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
            obtained with it. Graphs are of one size then: ``torch.compile`` makes one for each,
            of 8 at most (``torch._dynamo.config.recompile_limit``), and ``torch.export`` refuses
            dynamic sizes. Defaults to 7.
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
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' released files as they are. Defaults to None: truncated normal 0.02
            for linear layers, PyTorch's default for convolutions, as the authors.

    Raises:
        ValueError: If an argument does not fit. In ``forward``: if the images are too small.
    """

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
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = check_arch(arch, ARCHS, {'depths', 'embed_dims', 'mlp_ratio'}, ARCH_DEFAULTS)
        if arch['layout'] not in ('conv', 'swin'):
            raise ValueError(f"layout={arch['layout']!r} must be 'conv' or 'swin'")
        conv = arch['layout'] == 'conv'

        def build_stage(i: int, drop_paths: list[float]) -> tuple[nn.Module, list[nn.Module]]:
            dim, topk = arch['embed_dims'][i], arch['topks'][i]
            in_dim = arch['embed_dims'][i - 1] if i else 3
            blocks = []
            for drop_path in drop_paths:
                if topk is None:
                    attn = FullAttention(dim, lepe_source=arch['lepe_source'])
                else:
                    attn = BiLevelRoutingAttention(
                        dim,
                        num_heads=dim // HEAD_DIM,
                        topk=topk,
                        region_grid=region_grid,
                        padding=padding or arch['padding'],
                        backend=backend,
                    )
                mlp = MLP(dim, int(arch['mlp_ratio'] * dim))
                blocks.append(Block(dim, attn, mlp, pos_embed=conv, drop_path=drop_path))
            return (conv_downsample if conv else _swin_downsample)(in_dim, dim, i), blocks

        super().__init__(
            arch['depths'],
            arch['embed_dims'],
            build_stage,
            NORM_EPS,
            out_indices,
            final_norm,
            drop_path_rate,
            frozen_stages,
            norm_eval,
            with_cp,
            init_cfg,
        )
        for module in self.modules():
            if isinstance(module, FullAttention):
                self._version = LEPE_VERSIONS[module.lepe_source]
        self.min_size = _min_size(
            arch, to_grid(region_grid), padding or arch['padding'], len(self.stages)
        )
        self.apply(_init_weights)


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


def _swin_downsample(in_dim: int, dim: int, stage: int) -> nn.Sequential:
    """Patch embedding by 4 (stage 0), patch merging by 2 after it."""
    if stage > 0:
        return nn.Sequential(nn.BatchNorm2d(in_dim), nn.Conv2d(in_dim, dim, 2, 2))
    return nn.Sequential(nn.Conv2d(in_dim, dim, 4, 4), nn.BatchNorm2d(dim))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
