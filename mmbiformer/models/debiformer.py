"""DeBiFormer: BiFormer with deformable agents in every other block (ACCV 2024)."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..layers import BiLevelRoutingAttention, ConvMLP, DeformableAgentAttention
from ..registry import MODELS
from .base import rename
from .hierarchical import HEAD_DIM, Block, HierarchicalBackbone, Stage, check_arch

ARCHS: dict[str, dict[str, Any]] = {
    'tiny': dict(depths=(1, 1, 4, 1), embed_dims=(64, 128, 256, 512)),
    'small': dict(
        depths=(2, 2, 9, 3),
        embed_dims=(64, 128, 256, 512),
        mlp_ratios=(3, 3, 3, 2),
        agent_mlp_ratios=(3, 3, 3, 1),
    ),
    'base': dict(depths=(2, 2, 9, 2), embed_dims=(96, 192, 384, 768), groups=(1, 2, 3, 6)),
}
ARCH_DEFAULTS = dict(
    mlp_ratios=(3, 3, 3, 3),
    agent_mlp_ratios=(3, 3, 3, 3),
    topks=(1, 4, 16, None),
    agent_topks=(4, 8, 16, 49),  # quirk "constant 49"
    groups=(1, 2, 4, 8),
    strides=(8, 4, 2, 1),
    offset_kernels=(9, 7, 5, 3),
    table_sizes=(56, 28, 14, 7),  # quirk "stretched table"
)

# The authors' names, and ours.
RELEASED_NAME = re.compile(r'stages\.\d+\.\d+\.mlp1\.linear1\.0\.weight')
PAIR = r'^stages\.(\d+)\.(\d+)\.(pos_embed|norm|attn|mlp)([1-4])\.'


def _split_pair(match: re.Match) -> str:
    """A layer's name in the n-th pair of blocks to that in block 2 n or 2 n + 1."""
    stage, pair, layer, half = match[1], int(match[2]), match[3], int(match[4]) - 1
    if layer == 'norm':  # four in a pair
        half, number = divmod(half, 2)
        layer = f'norm{number + 1}'
    return f'stages.{stage}.{2 * pair + half}.{layer}.'


RENAMES = (
    (PAIR, _split_pair),
    (r'\.attn\.(?:qkv|qkv_conv)\.qkv\.', '.attn.qkv.'),
    (r'\.attn\.(?:wo|proj_out)\.', '.attn.proj.'),
    (r'\.attn\.lepe1\.', '.attn.lepe.'),
    (r'\.attn\.conv_offset_q\.0\.', '.attn.offset.conv.'),
    (r'\.attn\.conv_offset_q\.1\.norm\.', '.attn.offset.norm.'),
    (r'\.attn\.conv_offset_q\.3\.', '.attn.offset.head.'),
    (r'\.attn\.proj_q\.', '.attn.agent_query.'),
    (r'\.attn\.proj_k\.', '.attn.agent_key.'),
    (r'\.attn\.proj_v\.', '.attn.agent_value.'),
    (r'\.attn\.unifyheads1\.', '.attn.agent_proj.'),
    (r'\.attn\.norm2\.', '.attn.agent_norm1.'),
    (r'\.attn\.norm\.', '.attn.agent_norm2.'),
    (r'\.attn\.mlp\.', '.attn.agent_mlp.'),
    (r'mlp\.linear1\.0\.', 'mlp.fc1.'),
    (r'mlp\.linear2\.0\.', 'mlp.fc2.'),
    (r'mlp\.dwc\.', 'mlp.conv.'),
    (r'^extra_norms\.(\d)\.ln\.', r'norm\1.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


@MODELS.register_module()
class DeBiFormer(HierarchicalBackbone):
    """DeBiFormer backbone.

    `DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention
    <https://arxiv.org/abs/2410.08582>`_; equal to the authors' code,
    https://github.com/maclong01/DeBiFormer, number for number. Their files do not run as published:
    here a misspelt keyword is mended, and padding is on.

    Blocks come in pairs: one with bi-level routing attention, one with deformable agent attention;
    in the last stage both are of the second kind. Maps, norms and the stages that are built are as
    in :class:`BiFormer`.

    The released models have these quirks, which the paper does not lead one to expect:

    - one offset: the offset network has one output channel, so an agent moves as far down as to
      the right.
    - raw offset: the offset is neither squashed nor limited; only positions are clamped to the map.
    - mixed corners: agents start at the centres of grid cells, where -1 and 1 are the map's outer
      edges. Sampling, and the tokens' own positions, take -1 and 1 to be the outer tokens' centres.
    - sampled input: agents are sampled from the block's normed input, not from its queries, and
      their first residual adds to that.
    - whole-width scale: both attentions scale logits by C ** -0.5, not by the head's width.
    - stretched table: the position table is made for the maps of a 224 x 224 image and stretched
      over any other.
    - visible padding: agents are zero-padded to a multiple of the grid before their projection.
      The padded agents lie at the centre of the map and are attended to.
    - constant 49: the last stage routes to 49 regions at any grid, not to all.
    - map norms: the norms of the dense maps have epsilon 1e-5. All others have 1e-6, except that of
      the offset network, which has 1e-5 too.
    - unused norm_eval: the authors' models take this argument and ignore it, so their BatchNorms
      were trained in detection too.
    - no initialization: the authors' loop reaches no layer, so weights start as PyTorch's do.
    - sizes: the paper and the README give 77 M parameters for B. The published class has 95.5 M
      (depths 2 2 9 2); depths 2 2 9 1, in an unused function, make 71.7 M.

    Example:
        >>> import torch
        >>> from mmbiformer.models import DeBiFormer
        >>> net = DeBiFormer('tiny', region_grid=8, out_indices=(2, 3))
        >>> [tuple(each.shape) for each in net(torch.randn(1, 3, 256, 256))]
        [(1, 256, 16, 16), (1, 512, 8, 8)]

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict of, one entry a stage,

            - depths (sequence of int): Pairs of blocks.
            - embed_dims (sequence of int): Channels, multiples of 32.
            - mlp_ratios (sequence of float): Hidden width of the MLPs. Defaults to (3, 3, 3, 3).
            - agent_mlp_ratios (sequence of float): Hidden width of the MLPs inside the agent
              attention. Defaults to (3, 3, 3, 3).
            - topks (sequence of int | None): Routed regions of the first block of a pair; None
              makes it an agent block too. Defaults to (1, 4, 16, None).
            - agent_topks (sequence of int): Routed regions of agents. Defaults to (4, 8, 16, 49).
            - groups (sequence of int): Groups of channels whose agents move together; they divide
              the heads, of which there is one for 32 channels. Defaults to (1, 2, 4, 8).
            - strides (sequence of int): Tokens per agent along a side. Defaults to (8, 4, 2, 1).
            - offset_kernels (sequence of int): Kernel sides of the offset networks.
              Defaults to (9, 7, 5, 3).
            - table_sizes (sequence of int): Sides of the maps that the position tables are made
              for. Defaults to (56, 28, 14, 7).

            Defaults to ``'small'``.
        region_grid: Regions per column and per row of a map, an int or a pair, at least 49 in all
            for the released archs. The authors use 7 for ImageNet, 8 for ADE20K; for COCO 8, 16
            and 32 with T, S and B. ``'auto'`` chooses for each map, as at :class:`BiFormer`; the
            attention of all tokens to all agents, which takes most of the time of large images,
            does not depend on the grid. Defaults to 7.
        out_indices: Stages whose maps are returned, from 0. Defaults to None: all for dense tasks,
            the last with ``final_norm``.
        final_norm: Whether to end in the BatchNorm that the classification head expects.
            Defaults to False.
        drop_path_rate: Stochastic depth of the last pair; it rises linearly from 0 over all pairs.
            Defaults to 0.
        padding: What to do with maps whose sides are not multiples of the grid: ``'input'``, as
            released, or ``'mask'``, see :class:`~mmbiformer.layers.DeformableAgentAttention`.
            Defaults to ``'input'``.
        frozen_stages: Freeze the stem (0), or the stem and the first n stages (n); -1 freezes
            nothing. Defaults to -1.
        norm_eval: Whether BatchNorm stays in eval mode while training. Defaults to False.
        with_cp: Whether to recompute blocks in the backward pass to save memory. Defaults to False.
        backend: Backend of :func:`mmbiformer.ops.routed_attention`. Defaults to ``'auto'``.
        in_channels: Channels of the images. Defaults to 3.
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' files as they are. Defaults to None: PyTorch's defaults, as the
            authors.

    Raises:
        ValueError: If an argument does not fit.
    """

    archs = ARCHS
    authors_page = 'https://github.com/maclong01/DeBiFormer'
    map_norm_eps = 1e-5  # quirk "map norms"

    def __init__(
        self,
        arch: str | dict[str, Any] = 'small',
        region_grid: int | tuple[int, int] | str = 7,
        out_indices: Sequence[int] | int | None = None,
        final_norm: bool = False,
        drop_path_rate: float = 0.0,
        padding: str = 'input',
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: str = 'auto',
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            arch=check_arch(arch, ARCHS, {'depths', 'embed_dims'}, ARCH_DEFAULTS),
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

    def build_stage(self, index: int, drop_paths: list[float], **options: Any) -> Stage:
        arch = {key: values[index] for key, values in self.arch.items()}
        return DeBiFormerStage(
            arch['embed_dims'],
            topk=arch['topks'],
            mlp_ratio=arch['mlp_ratios'],
            agents=dict(
                topk=arch['agent_topks'],
                num_groups=arch['groups'],
                stride=arch['strides'],
                offset_kernel=arch['offset_kernels'],
                table_size=arch['table_sizes'],
                mlp_ratio=arch['agent_mlp_ratios'],
            ),
            drop_paths=drop_paths,
            **options,
        )

    @staticmethod
    def is_released(names: Iterable[str]) -> bool:
        return any(map(RELEASED_NAME.fullmatch, names))

    @staticmethod
    def convert_released(weights: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
        return rename(weights, RENAMES)


class DeBiFormerStage(Stage):
    """Pairs of blocks of DeBiFormer on maps of one size.

    Args:
        dim: Channels, C.
        topk: Routed regions of the first block of a pair; None makes it an agent block too.
        mlp_ratio: Hidden width of the MLPs, in multiples of ``dim``.
        agents: Arguments of :class:`~mmbiformer.layers.DeformableAgentAttention`.
        drop_paths: Stochastic depth rates, one a pair.
        **routing: ``region_grid``, ``padding`` and ``backend`` of both kinds of attention.
    """

    def __init__(
        self,
        dim: int,
        topk: int | None,
        mlp_ratio: float,
        agents: dict[str, Any],
        drop_paths: list[float],
        **routing: Any,
    ) -> None:
        blocks = []
        for drop_path in drop_paths:
            for of_half in (topk, None):
                if of_half is None:
                    attn = DeformableAgentAttention(dim, dim // HEAD_DIM, **agents, **routing)
                else:
                    attn = BiLevelRoutingAttention(dim, dim // HEAD_DIM, of_half, **routing)
                mlp = ConvMLP(dim, int(mlp_ratio * dim))
                blocks.append(Block(dim, attn, mlp, pos_embed=True, drop_path=drop_path))
        super().__init__(blocks)
