"""DeBiFormer: BiFormer with deformable agents in every other block (ACCV 2024)."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..layers import BiLevelRoutingAttention, ConvMLP, DeformableAgentAttention
from ..registry import MODELS
from .hierarchical import HEAD_DIM, Block, HierarchicalBackbone, check_arch, conv_downsample

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


@MODELS.register_module()
class DeBiFormer(HierarchicalBackbone):
    """DeBiFormer backbone.

    `DeBiFormer: Vision Transformer with Deformable Agent Bi-level Routing Attention
    <https://arxiv.org/abs/2410.08582>`_; equal to the authors' code,
    https://github.com/maclong01/DeBiFormer, number for number, with the misspelt keyword mended
    that keeps their files from running, and with padding on.

    Blocks come in pairs: one with bi-level routing attention, one with deformable agent attention;
    in the last stage both are of the second kind. Maps, norms and the stages that are built are as
    in :class:`BiFormer`.

    What the released models do, and one would not guess:

    - one offset: the offset network has one output channel, so an agent moves as far down as to
      the right.
    - raw offset: it is neither squashed nor limited; only positions are clamped to the map.
    - mixed corners: agents start at the centres of grid cells, -1 and 1 being the map's outer
      edges, but sampling and the tokens' own positions take them to be the outer tokens' centres.
    - sampled input: agents are sampled from the block's normed input, not from its queries, and
      their first residual adds to that.
    - whole-width scale: both of its attentions scale logits by C ** -0.5, not by the head's width.
    - stretched table: the position table is made for the maps of a 224 x 224 image and stretched
      over any other.
    - visible padding: agents are zero-padded to a multiple of the grid before their projection,
      are placed at the centre of the map, and are attended to.
    - constant 49: the last stage routes to 49 regions at any grid, not to all.
    - map norms: the norms of the dense maps have epsilon 1e-5, all others 1e-6 but the offset
      network's, which has 1e-5 too.
    - unused norm_eval: the authors' models take it and do nothing with it, so their BatchNorms were
      trained in detection too.
    - no initialization: the authors' loop reaches no layer, so weights start as PyTorch's do.
    - sizes: the paper's and README's 77 M parameters of B are not those of the published class,
      which has 95.5 M (depths 2 2 9 2); 2 2 9 1, in an unused function, makes 71.7 M.

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
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' files as they are. Defaults to None: PyTorch's defaults, as the
            authors.

    Raises:
        ValueError: If an argument does not fit.
    """

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
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = check_arch(arch, ARCHS, {'depths', 'embed_dims'}, ARCH_DEFAULTS)

        def build_stage(i: int, drop_paths: list[float]) -> tuple[nn.Module, list[nn.Module]]:
            of_stage = {key: values[i] for key, values in arch.items()}
            dim = of_stage['embed_dims']
            shared = dict(
                num_heads=dim // HEAD_DIM,
                region_grid=region_grid,
                padding=padding,
                backend=backend,
            )

            def routing_or_agents(topk: int | None) -> nn.Module:
                if topk is not None:
                    return BiLevelRoutingAttention(dim, topk=topk, **shared)
                return DeformableAgentAttention(
                    dim,
                    topk=of_stage['agent_topks'],
                    num_groups=of_stage['groups'],
                    stride=of_stage['strides'],
                    offset_kernel=of_stage['offset_kernels'],
                    table_size=of_stage['table_sizes'],
                    mlp_ratio=of_stage['agent_mlp_ratios'],
                    **shared,
                )

            blocks = [
                Block(
                    dim,
                    routing_or_agents(topk),
                    ConvMLP(dim, int(of_stage['mlp_ratios'] * dim)),
                    pos_embed=True,
                    drop_path=drop_path,
                )
                for drop_path in drop_paths
                for topk in (of_stage['topks'], None)
            ]
            return conv_downsample(arch['embed_dims'][i - 1] if i else 3, dim, i), blocks

        super().__init__(
            arch['depths'],
            arch['embed_dims'],
            build_stage,
            1e-5,  # quirk "map norms"
            out_indices,
            final_norm,
            drop_path_rate,
            frozen_stages,
            norm_eval,
            with_cp,
            init_cfg,
        )
