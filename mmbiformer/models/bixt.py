"""BiXT: latents and tokens that attend to each other (NeurIPS 2024)."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, DropPath, LayerScale, lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import MLP, BidirectionalCrossAttention, LayerNorm, Tokenizer
from ..layers.inplace import add, in_parts
from ..registry import MODELS
from .base import Backbone, drop_path_rates, rename

NORM_EPS = 1e-6
HEAD_DIM = 32
MLP_RATIO = 4

TI, ED256 = dict(dim=192), dict(dim=256)
ARCHS: dict[str, dict[str, Any]] = {
    'ti_l64_p16': TI,
    'ti_l64_p16s8': dict(TI, stride=8),
    'ti_l64_p16s4': dict(TI, stride=4),
    'ti_l32_p16': dict(TI, num_latents=32),
    'ti_l32_p16s8': dict(TI, num_latents=32, stride=8),
    'ti_l128_p16': dict(TI, num_latents=128),
    'ti_l128_p16s8': dict(TI, num_latents=128, stride=8),
    'ti_l64_d13_p16': dict(TI, depth=13),
    'ti_l64_d13_p16s8': dict(TI, depth=13, stride=8),
    'ti_l64_d13_p16s4': dict(TI, depth=13, stride=4),
    'ed256_l64_p16': ED256,
    'ed256_l64_p16s8': dict(ED256, stride=8),
    'ed256LS_l64_p16s8': dict(ED256, stride=8, layer_scale=1e-5),
    'ti_cnv_l64_p16': dict(TI, tokenizer='conv'),
    'ti_cnv_l64_d13_p16': dict(TI, tokenizer='conv', depth=13),
    'ti_cnv_l64_d13_p8': dict(TI, tokenizer='conv', depth=13, stride=8),
    'ti_cnv_l64_d13_p4': dict(TI, tokenizer='conv', depth=13, stride=4),
}
ARCH_DEFAULTS = dict(depth=12, num_latents=64, stride=16, tokenizer='patch', layer_scale=None)

# The last block's latents come out of these modules; no map reads them.
LAST_LATENTS = re.compile(r'refine\.|cross\.(?:attn\.proj|ls[12]|norm2|mlp)_latents\.')

# The authors' names, and ours.
RELEASED_NAME = 'blocks.0.cross_attention_latents_token.attn.rv_patches.weight'
RENAMES = (
    (r'^patch_embed\.', 'tokenizer.'),
    (r'^fourier_pos_encode\.token_projection\.', 'tokenizer.pos_proj.'),
    (r'\.cross_attention_latents_token\.', '.cross.'),
    (r'\.self_attention_latents\.', '.refine.'),
    (r'\.rv_patches\.', '.rv_tokens.'),
    (r'_lat\.', '_latents.'),
    (r'_pat\.', '_tokens.'),
    (r'^fc_norm\.', 'norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


@MODELS.register_module()
class BiXT(Backbone):
    """BiXT backbone.

    `Perceiving Longer Sequences With Bi-Directional Cross-Attention Transformers
    <https://arxiv.org/abs/2402.12138>`_; equal to the authors' code,
    https://github.com/mrkshllr/BiXT, number for number.

    A few latents and all tokens of an image exchange what they know in each block, by one matrix of
    scores; then the latents attend to themselves. Time and memory grow linearly with the tokens.
    Images of any size: the table of positions is computed for the size at hand, so the authors'
    models for 384x384 are these archs at another size. An image whose sides are not multiples of
    the stride is padded with zeros at the right and bottom, and its map is rounded up.

    For classification the last block updates the latents only. Maps come from the blocks before it:
    the authors train 13 blocks (``d13``) and leave the last one out in dense tasks. What no output
    reads is not built.

    Example:
        >>> import torch
        >>> from mmbiformer.models import BiXT
        >>> tuple(BiXT('ti_l64_p16')(torch.randn(2, 3, 224, 224))[0].shape)
        (2, 192)
        >>> net = BiXT('ti_l64_d13_p16s8', out_type='featmap')
        >>> tuple(net(torch.randn(1, 3, 64, 96))[0].shape)
        (1, 192, 8, 12)

    Args:
        arch: The authors' name without ``bixt_``, such as ``'ti_l64_p16s8'``: 64 latents, patches
            of 16x16 pixels every 8 pixels; see ``BiXT.archs``. Or a dict of

            - dim (int): Channels, a multiple of 32.
            - depth (int): Blocks, the one for latents only included. Defaults to 12.
            - num_latents (int): Defaults to 64.
            - stride (int): Pixels from token to token: 4, 8 or 16. Defaults to 16.
            - tokenizer (str): ``'patch'``: one convolution of 16x16 pixels; ``'conv'``: 3x3
              convolutions of stride 2. Defaults to ``'patch'``.
            - layer_scale (float | None): Initial factor on each branch. Defaults to None, no
              factors.

            Defaults to ``'ti_l64_p16'``.
        out_type: What is returned:

            - ``'avg_latents'``: the latents' mean after a LayerNorm, (B, C), for classification;
            - ``'latents'``: the latents, (B, N, C);
            - ``'featmap'``: the tokens of the blocks in ``out_indices`` as maps (B, C, H, W).

            Defaults to ``'avg_latents'``.
        out_indices: Blocks whose tokens are returned, from 0; negative numbers count from the last
            block that has tokens. Defaults to None: that block. For ``'featmap'`` only.
        drop_path_rate: Stochastic depth of the last block, for cross- and self-attention, or a pair
            of rates. It rises linearly from 0 over all blocks. Defaults to 0.
        frozen_stages: Freeze the tokenizer, positions and latents (0), or these and the first n
            blocks (n); -1 freezes nothing. Defaults to -1.
        norm_eval: Whether BatchNorm, which only the tokenizer ``'conv'`` has, stays in eval mode
            while training. Defaults to False.
        with_cp: Whether to recompute blocks in the backward pass to save memory. Defaults to False.
        backend: Backend of :func:`mmbiformer.ops.bidirectional_attention`. Defaults to ``'auto'``.
        in_channels: Channels of the images. Defaults to 3.
        init_cfg: MMEngine's initialization config; ``dict(type='Pretrained', checkpoint=FILE)``
            takes the authors' files as they are, unpacked. Defaults to None: the authors' way,
            Xavier uniform for linear layers and LeCun normal for convolutions.

    Raises:
        ValueError: If an argument does not fit. In ``forward``: if the images have another shape.
    """

    archs = ARCHS
    authors_page = 'https://github.com/mrkshllr/BiXT'
    embedding = 'tokenizer', 1

    def __init__(
        self,
        arch: str | dict[str, Any] = 'ti_l64_p16',
        out_type: str = 'avg_latents',
        out_indices: Sequence[int] | int | None = None,
        drop_path_rate: float | tuple[float, float] = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        backend: str = 'auto',
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(in_channels=in_channels, norm_eval=norm_eval, init_cfg=init_cfg)
        self.arch = arch = _check_arch(arch)
        if out_type not in ('avg_latents', 'latents', 'featmap'):
            raise ValueError(f"out_type={out_type!r} must be 'avg_latents', 'latents' or 'featmap'")
        self.out_type = out_type
        self.out_indices = _check_out_indices(out_indices, out_type, arch['depth'])
        self.with_cp = with_cp
        dim, depth = arch['dim'], arch['depth']

        self.tokenizer = Tokenizer(in_channels, dim, arch['stride'], arch['tokenizer'])
        self.latents = nn.Parameter(torch.zeros(1, arch['num_latents'], dim))
        rates = drop_path_rate
        rates = rates if isinstance(rates, (list, tuple)) else (rates, rates)
        if len(rates) != 2:
            raise ValueError(f'drop_path_rate={rates} must be a number or a pair')
        cross, refine = (drop_path_rates(rate, depth) for rate in rates)
        maps = out_type == 'featmap'
        built = max(self.out_indices) + 1 if maps else depth
        if not -1 <= frozen_stages <= built:
            raise ValueError(
                f'frozen_stages={frozen_stages} must lie between -1 and the {built} blocks'
            )
        self.frozen_stages = frozen_stages
        self.blocks = nn.ModuleList(
            BiXTBlock(
                dim,
                to_latents=not maps or i < built - 1,
                to_tokens=maps or i < built - 1,
                layer_scale=arch['layer_scale'],
                cross_drop_path=cross[i],
                refine_drop_path=refine[i],
                backend=backend,
            )
            for i in range(built)
        )
        if out_type == 'avg_latents':
            self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self._initialize()
        self.freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute latents or maps.

        Args:
            x: Images of shape (B, in_channels, H, W).

        Returns:
            tuple[Tensor, ...]: As ``out_type`` says. Maps are (B, C, H / s, W / s) for a stride s,
            rounded up.

        Raises:
            ValueError: If the images have another shape.
        """
        maps, latents = self.run(x, self.out_indices)
        if self.out_type == 'featmap':
            return tuple(maps)
        return (self.norm(latents.mean(1)) if self.out_type == 'avg_latents' else latents,)

    def run(self, images: Tensor, out_indices: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Run all blocks.

        Args:
            images: (B, in_channels, H, W).
            out_indices: Blocks whose tokens are wanted.

        Returns:
            tuple[list[Tensor], Tensor]: The maps (B, C, H / s, W / s), contiguous, and the latents,
            (B, N, C).
        """
        self.check_images(images)
        tokens = self.tokenizer(images)
        # Copies, as FLOP counters fail at a view of a parameter; len() would fix it in a graph.
        latents = self.latents.repeat(tokens.shape[0], 1, 1)
        run = partial(self._run_blocks, out_indices)
        *maps, latents = in_parts(self.blocks, run, tokens, latents)
        return [each.permute(0, 3, 1, 2).contiguous() for each in maps], latents

    def _run_blocks(
        self, out_indices: Sequence[int], tokens: Tensor, latents: Tensor
    ) -> tuple[Tensor, ...]:
        """The tokens of some blocks, (B, H, W, C), and the latents, (B, N, C)."""
        maps = []
        for i, block in enumerate(self.blocks):
            run = block
            if self.with_cp and tokens.requires_grad:
                run = partial(checkpoint, block, use_reentrant=False)
            latents, tokens = run(latents, tokens)
            if i in out_indices:
                maps.append(tokens)
        return *maps, latents

    def _initialize(self) -> None:
        """Initialize as the authors do."""
        trunc_normal_(self.latents, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MLP):
                nn.init.normal_(module.fc1.bias, std=1e-6)
                nn.init.normal_(module.fc2.bias, std=1e-6)
        lecun_normal_(self.tokenizer.pos_proj.weight)  # a 1x1 convolution there

    def freeze(self) -> None:
        super().freeze()
        if self.frozen_stages >= 0:
            self.latents.requires_grad_(False)

    def frozen_modules(self) -> Iterable[nn.Module]:
        if self.frozen_stages >= 0:
            yield self.tokenizer
        yield from self.blocks[: max(self.frozen_stages, 0)]

    def num_layers(self) -> int:
        return len(self.blocks) + 2

    def layer_of(self, name: str) -> int | None:
        part, _, rest = name.partition('.')
        if part == 'blocks':
            return int(rest.partition('.')[0]) + 1
        return 0 if part in ('tokenizer', 'latents') else None

    def may_differ(self, name: str) -> bool:
        index = re.match(r'blocks\.(\d+)\.', name)
        if not index:
            return name.startswith('norm.')
        last = len(self.blocks) - 1
        if int(index[1]) != last or self.out_type != 'featmap':
            return int(index[1]) > last
        return bool(LAST_LATENTS.match(name, index.end()))

    @staticmethod
    def is_released(names: Iterable[str]) -> bool:
        return RELEASED_NAME in names

    @staticmethod
    def convert_released(weights: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
        # The table of positions belongs to one image size.
        own = {name: x for name, x in weights.items() if name != 'fourier_pos_encode.pos'}
        return rename(own, RENAMES)


class BiXTBlock(nn.Module):
    """Latents and tokens exchange, each side passes an MLP, the latents attend to themselves.

    Args:
        dim: Channels, C.
        to_latents: Whether latents come out.
        to_tokens: Whether tokens come out.
        layer_scale: Initial factor on each branch; None for no factors.
        cross_drop_path: Stochastic depth rate of the exchange.
        refine_drop_path: Stochastic depth rate of the latents' self-attention.
        backend: Backend of :func:`mmbiformer.ops.bidirectional_attention`.
    """

    def __init__(
        self,
        dim: int,
        to_latents: bool,
        to_tokens: bool,
        layer_scale: float | None,
        cross_drop_path: float,
        refine_drop_path: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.cross = CrossBlock(dim, to_latents, to_tokens, layer_scale, cross_drop_path, backend)
        self.refine = LatentBlock(dim, layer_scale, refine_drop_path) if to_latents else None

    def forward(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and (B, H, W, C) to the same; a side that does not come out is as it was."""
        latents, tokens = self.cross(latents, tokens)
        return latents if self.refine is None else self.refine(latents), tokens


class CrossBlock(nn.Module):
    """The exchange and, for each side that comes out of it, a residual and an MLP.

    The arguments are explained at :class:`BiXTBlock`.
    """

    def __init__(
        self,
        dim: int,
        to_latents: bool,
        to_tokens: bool,
        layer_scale: float | None,
        drop_path: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.norm1_latents = LayerNorm(dim, eps=NORM_EPS)
        self.norm1_tokens = LayerNorm(dim, eps=NORM_EPS)
        self.attn = BidirectionalCrossAttention(
            dim, dim // HEAD_DIM, to_latents, to_tokens, backend
        )
        for side, comes_out in (('latents', to_latents), ('tokens', to_tokens)):
            if comes_out:
                self.add_module(f'ls1_{side}', _layer_scale(dim, layer_scale))
                self.add_module(f'norm2_{side}', LayerNorm(dim, eps=NORM_EPS))
                self.add_module(f'mlp_{side}', MLP(dim, MLP_RATIO * dim))
                self.add_module(f'ls2_{side}', _layer_scale(dim, layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) and (B, H, W, C) to the same."""
        to_latents, to_tokens = self.attn(self.norm1_latents(latents), self.norm1_tokens(tokens))
        if to_latents is not None:
            latents = add(latents, self.drop_path(self.ls1_latents(to_latents)))
            branch = self.ls2_latents(self.mlp_latents(self.norm2_latents(latents)))
            latents = add(latents, self.drop_path(branch))
        if to_tokens is not None:
            tokens = add(tokens, self.drop_path(self.ls1_tokens(to_tokens)))
            branch = self.ls2_tokens(self.mlp_tokens(self.norm2_tokens(tokens)))
            tokens = add(tokens, self.drop_path(branch))
        return latents, tokens


class LatentBlock(nn.Module):
    """Self-attention of the latents and an MLP, each with a residual.

    Args:
        dim: Channels, C.
        layer_scale: Initial factor on each branch; None for no factors.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, layer_scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, dim // HEAD_DIM, qkv_bias=True)
        self.ls1 = _layer_scale(dim, layer_scale)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, MLP_RATIO * dim)
        self.ls2 = _layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        x = add(x, self.drop_path(self.ls1(self.attn(self.norm1(x)))))
        return add(x, self.drop_path(self.ls2(self.mlp(self.norm2(x)))))


def _layer_scale(dim: int, factor: float | None) -> nn.Module:
    return nn.Identity() if factor is None else LayerScale(dim, factor)


def _check_arch(arch: str | dict[str, Any]) -> dict[str, Any]:
    """A new dict with all keys, or ValueError."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f'arch={arch!r} is unknown; choose one of {[*ARCHS]} or give a dict')
        arch = ARCHS[arch]
    if not {'dim'} <= {*arch} <= {'dim', *ARCH_DEFAULTS}:
        raise ValueError(
            f"an arch dict needs 'dim' and may have {sorted(ARCH_DEFAULTS)}; got {sorted(arch)}"
        )
    arch = {**ARCH_DEFAULTS, **arch}
    if arch['dim'] < 1 or arch['dim'] % HEAD_DIM:
        raise ValueError(f'dim={arch["dim"]} must be a multiple of {HEAD_DIM}, the head width')
    if arch['depth'] < 2 or arch['num_latents'] < 1:
        raise ValueError(
            f'depth={arch["depth"]} must be at least 2 and num_latents={arch["num_latents"]} at '
            'least 1'
        )
    return arch


def _check_out_indices(
    out_indices: Sequence[int] | int | None, out_type: str, depth: int
) -> tuple[int, ...]:
    """Numbers of blocks with tokens, from 0; none if no maps come out."""
    if out_type != 'featmap':
        if out_indices is not None:
            raise ValueError(f"out_indices={out_indices} is for out_type='featmap' only")
        return ()
    with_tokens = depth - 1
    if out_indices is None:
        out_indices = -1
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not all(type(i) is int for i in indices):
        raise ValueError(f'out_indices={out_indices!r} must be an int or a sequence of ints')
    checked = tuple(i + with_tokens if i < 0 else i for i in indices)
    rising = checked and list(checked) == sorted({*checked})
    if not rising or not 0 <= checked[0] <= checked[-1] < with_tokens:
        raise ValueError(
            f'out_indices={out_indices} must be rising numbers of blocks from 0 to '
            f'{with_tokens - 1}'
        )
    return checked
