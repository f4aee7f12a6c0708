"""BiFormer: a four-stage vision transformer with bi-level routing attention (CVPR 2023)."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoint import adapt_backbone_state
from ..layers import MLP, BiLevelRoutingAttention, DepthwiseConv2d, FullAttention
from ..registry import MODELS

NORM_EPS = 1e-6
HEAD_DIM = 32

STL = dict(depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), mlp_ratio=4, layout='swin')
ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(depths=(2, 2, 8, 2), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'small': dict(depths=(4, 4, 18, 4), embed_dims=(64, 128, 256, 512), mlp_ratio=3),
    'base': dict(depths=(4, 4, 18, 4), embed_dims=(96, 192, 384, 768), mlp_ratio=3),
    'stl': STL,
    'stl_nchw': dict(STL, lepe_source='value', padding='projected'),
}
ARCH_DEFAULTS = dict(topks=(1, 4, 16, None), layout='conv', lepe_source='input', padding='input')


class BiFormerBlock(nn.Module):
    """Convolutional position embedding, attention and MLP, each with a residual.

    Args:
        dim: Channels, C.
        attn: Attention on channels-last maps.
        mlp_ratio: Hidden width of the MLP, in multiples of ``dim``.
        pos_embed: Whether the block begins with a depthwise 3x3 convolution.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, pos_embed: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv2d(dim, 3) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@MODELS.register_module()
class BiFormer(BaseModule):
    """BiFormer backbone.

    `BiFormer: Vision Transformer with Bi-Level Routing Attention
    <https://arxiv.org/abs/2303.08810>`_; equal to the authors' code,
    https://github.com/rayleizhu/BiFormer, number for number.

    For dense tasks (the default) the map of each stage in ``out_indices`` passes a LayerNorm of its
    own. For classification set ``final_norm=True``: the backbone then has the final BatchNorm
    instead and gives the last map only. Stages after the last of ``out_indices`` are not built, so
    no parameter goes unused.

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
            for ImageNet, 8 for ADE20K, 16 for COCO. Defaults to 7.
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
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' released files as they are. Defaults to None: truncated normal 0.02
            for linear layers, PyTorch's default for convolutions, as the authors.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = 'small',
        region_grid: int | tuple[int, int] = 7,
        out_indices: Sequence[int] | int | None = None,
        final_norm: bool = False,
        drop_path_rate: float = 0.0,
        padding: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = _check_arch(arch)
        depths, dims = arch['depths'], arch['embed_dims']
        num_stages = len(depths)
        self.out_indices = _check_out_indices(out_indices, num_stages, final_norm)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate} must lie in [0, 1)')
        num_built = max(self.out_indices) + 1
        if not -1 <= frozen_stages <= num_built:
            raise ValueError(
                f'frozen_stages={frozen_stages} must lie between -1 and the {num_built} stages'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp

        conv = arch['layout'] == 'conv'
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(num_built):
            make_downsample = _conv_downsample if conv else _swin_downsample
            self.downsample_layers.append(make_downsample(3 if i == 0 else dims[i - 1], dims[i], i))
            blocks = []
            for _ in range(depths[i]):
                if arch['topks'][i] is None:
                    attn = FullAttention(dims[i], lepe_source=arch['lepe_source'])
                else:
                    attn = BiLevelRoutingAttention(
                        dims[i],
                        num_heads=dims[i] // HEAD_DIM,
                        topk=arch['topks'][i],
                        region_grid=region_grid,
                        padding=padding or arch['padding'],
                    )
                blocks.append(
                    BiFormerBlock(dims[i], attn, arch['mlp_ratio'], conv, next(drop_paths))
                )
            self.stages.append(nn.ModuleList(blocks))
        if final_norm:
            self.norm = nn.BatchNorm2d(dims[-1])
        else:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(dims[i], eps=NORM_EPS))
        self.final_norm = final_norm

        self.apply(_init_weights)
        self._register_load_state_dict_pre_hook(adapt_backbone_state, with_module=True)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: Images of shape (B, 3, H, W).

        Returns:
            tuple[Tensor, ...]: One map (B, C, H / s, W / s) for each of ``out_indices``, with
            strides s of 4, 8, 16 and 32. Sizes are rounded up, by the layout ``'swin'`` down.
        """
        outs = []
        x = x.contiguous(memory_format=torch.channels_last)
        for i, stage in enumerate(self.stages):
            x = self.downsample_layers[i](x).permute(0, 2, 3, 1)
            for block in stage:
                if self.with_cp and x.requires_grad:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if i in self.out_indices and not self.final_norm:
                # mmcv's RoIAlign reads memory as NCHW, whatever the strides say.
                outs.append(getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2).contiguous())
            x = x.permute(0, 3, 1, 2)
        return (self.norm(x),) if self.final_norm else tuple(outs)

    def train(self, mode: bool = True) -> 'BiFormer':
        """Set the mode; frozen stages, and with ``norm_eval`` BatchNorm, stay in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = []
        if self.frozen_stages >= 0:
            frozen.append(self.downsample_layers[0])
        for i in range(self.frozen_stages):
            frozen += [self.downsample_layers[i], self.stages[i]]
            if i in self.out_indices and not self.final_norm:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval().requires_grad_(False)


def _conv_downsample(in_dim: int, dim: int, stage: int) -> nn.Sequential:
    """Overlapping 3x3 convolutions: the stem by 4 (stage 0), by 2 after it."""
    if stage > 0:
        return nn.Sequential(nn.Conv2d(in_dim, dim, 3, 2, 1), nn.BatchNorm2d(dim))
    return nn.Sequential(
        nn.Conv2d(in_dim, dim // 2, 3, 2, 1),
        nn.BatchNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1),
        nn.BatchNorm2d(dim),
    )


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


def _check_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch={arch!r} is unknown; choose one of {list(ARCHS)} or give a dict'
            )
        arch = ARCHS[arch]
    required, known = {'depths', 'embed_dims', 'mlp_ratio'}, {*ARCH_DEFAULTS}
    if not required <= {*arch} <= required | known:
        raise ValueError(
            f'an arch dict needs {sorted(required)} and may have {sorted(known)}; '
            f'got {sorted(arch)}'
        )
    arch = {**ARCH_DEFAULTS, **arch}
    depths, dims, topks = arch['depths'], arch['embed_dims'], arch['topks']
    if not 0 < len(depths) == len(dims) == len(topks):
        raise ValueError(
            'depths, embed_dims and topks must have one entry a stage; '
            f'got {depths}, {dims}, {topks}'
        )
    if any(dim < 1 or dim % HEAD_DIM for dim in dims):
        raise ValueError(f'embed_dims={dims} must be multiples of {HEAD_DIM}, the head width')
    if arch['layout'] not in ('conv', 'swin'):
        raise ValueError(f"layout={arch['layout']!r} must be 'conv' or 'swin'")
    return arch


def _check_out_indices(
    out_indices: Sequence[int] | int | None, num_stages: int, final_norm: bool
) -> tuple[int, ...]:
    last = (num_stages - 1,)
    if out_indices is None:
        out_indices = last if final_norm else tuple(range(num_stages))
    elif isinstance(out_indices, int):
        out_indices = (out_indices,)
    if not all(type(i) is int for i in out_indices):
        raise ValueError(f'out_indices={out_indices!r} must be an int or a sequence of ints')
    checked = tuple(i + num_stages if i < 0 else i for i in out_indices)
    if (
        not checked
        or list(checked) != sorted({*checked})
        or not 0 <= checked[0] <= checked[-1] < num_stages
    ):
        raise ValueError(
            f'out_indices={out_indices} must be rising stage numbers from 0 to {num_stages - 1}'
        )
    if final_norm and checked != last:
        raise ValueError(
            f'final_norm=True gives the last map only: out_indices must be {last}, '
            f'got {out_indices}; leave final_norm out for multi-scale maps'
        )
    return checked
