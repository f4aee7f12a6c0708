"""Backbones that give maps of several sizes: blocks, stages and downsampling."""

from collections.abc import Iterable, Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import DepthwiseConv2d, LayerNorm
from ..layers.inplace import add, in_parts
from .base import Backbone, drop_path_rates

NORM_EPS = 1e-6
HEAD_DIM = 32


class Block(nn.Module):
    """Convolutional position embedding, attention and MLP, each with a residual.

    Args:
        dim: Channels, C.
        attn: Attention on channels-last maps.
        mlp: MLP on channels-last maps.
        pos_embed: Whether the block begins with a depthwise 3x3 convolution.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, pos_embed: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.pos_embed = DepthwiseConv2d(dim, 3) if pos_embed else None
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        if self.pos_embed is not None:
            x = add(x, self.pos_embed(x))
        x = add(x, self.drop_path(self.attn(self.norm1(x))))
        return add(x, self.drop_path(self.mlp(self.norm2(x))))


class Stage(nn.Sequential):
    """Blocks on maps of one size.

    A family's stage builds its blocks itself and passes them on.

    Args:
        blocks: Modules on channels-last maps.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        """Run the blocks.

        Args:
            x: Map of shape (B, H, W, C).
            with_cp: Whether to recompute blocks in the backward pass. Defaults to False.

        Returns:
            Tensor: (B, H, W, C).
        """
        return in_parts(self, lambda x: (self._run(x, with_cp),), x)[0]

    def _run(self, x: Tensor, with_cp: bool) -> Tensor:
        for block in self:
            if with_cp and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class HierarchicalBackbone(Backbone):
    """Stages of blocks on channels-last maps, each after a downsampling layer.

    A family defines :meth:`build_stage`. Stages after the last of ``out_indices`` are not built.
    The arguments that users pass are explained at :class:`~mmbiformer.models.BiFormer`.

    Args:
        arch: The settings of the family, complete, with ``depths`` and ``embed_dims``: numbers to
            raise the stochastic depth by, and channels, one entry a stage.
        stage_options: More keyword arguments for :meth:`build_stage`.
        out_indices: Stages whose maps are returned.
        final_norm: Whether to end in the BatchNorm that the classification head expects.
        drop_path_rate: Stochastic depth of the last block.
        frozen_stages: Stages to freeze.
        norm_eval: Whether BatchNorm stays in eval mode while training.
        with_cp: Whether to recompute blocks in the backward pass.
        in_channels: Channels of the images.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If an argument does not fit. In ``forward``: if the images are too small.

    Attributes:
        map_norm_eps (float): Epsilon of the norms of the returned maps.
    """

    map_norm_eps = NORM_EPS
    embedding = 'downsample_layers.0', 2

    def __init__(
        self,
        *,
        arch: dict[str, Any],
        stage_options: dict[str, Any],
        out_indices: Sequence[int] | int | None,
        final_norm: bool,
        drop_path_rate: float,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        in_channels: int,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(in_channels=in_channels, norm_eval=norm_eval, init_cfg=init_cfg)
        self.arch = arch
        depths, embed_dims = arch['depths'], arch['embed_dims']
        self.out_indices = _check_out_indices(out_indices, len(depths), final_norm)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        num_built = max(self.out_indices) + 1
        if not -1 <= frozen_stages <= num_built:
            raise ValueError(
                f'frozen_stages={frozen_stages} must lie between -1 and the {num_built} stages'
            )
        self.frozen_stages = frozen_stages
        self.final_norm = final_norm
        self.with_cp = with_cp

        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths[:num_built]):
            drop_paths = [next(rates) for _ in range(depth)]
            self.stages.append(self.build_stage(i, drop_paths, **stage_options))
            self.downsample_layers.append(self.build_downsample(i))
        if final_norm:
            self.norm = nn.BatchNorm2d(embed_dims[-1])
        else:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(embed_dims[i], eps=self.map_norm_eps))
        self.freeze()

    def build_stage(self, index: int, drop_paths: list[float], **options: Any) -> Stage:
        """Build a stage.

        Args:
            index: Its number, from 0.
            drop_paths: Stochastic depth rates, one for each of the stage's ``depths``.
            **options: The ``stage_options``.
        """
        raise NotImplementedError

    def build_downsample(self, index: int) -> nn.Module:
        """Build what comes before a stage: 3x3 convolutions, by 4 in the stem, by 2 after it."""
        dim, in_dim = self.arch['embed_dims'][index], self.in_dim(index)
        if index > 0:
            return nn.Sequential(nn.Conv2d(in_dim, dim, 3, 2, 1), nn.BatchNorm2d(dim))
        return nn.Sequential(
            nn.Conv2d(in_dim, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )

    def in_dim(self, index: int) -> int:
        """Channels that come into a stage's downsampling layer."""
        return self.arch['embed_dims'][index - 1] if index else self.in_channels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: Images of shape (B, in_channels, H, W).

        Returns:
            tuple[Tensor, ...]: One map (B, C, H / s, W / s) for each of ``out_indices``, with
            strides s of 4, 8, 16 and 32. Sizes are rounded up, by BiFormer's layout ``'swin'``
            down.

        Raises:
            ValueError: If the images are too small, or have another shape.
        """
        x = self.prepare(x)
        outs = []
        for i in range(len(self.stages)):
            x = self.run_stage(i, x)
            if i in self.out_indices and not self.final_norm:
                out = getattr(self, f'norm{i}')(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                outs.append(out.contiguous())
        # MMCV's RoIAlign reads memory as NCHW, whatever the strides say
        # (findings/mmcv-roialign-channels-last.sh).
        return (self.norm(x).contiguous(),) if self.final_norm else tuple(outs)

    def prepare(self, images: Tensor) -> Tensor:
        """Check images and lay them out in memory as channels last."""
        self.check_images(images)
        # Not memory_format=torch.channels_last, which torch.func.vmap does not know.
        return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """Compute a stage's map (B, C, H, W), channels last in memory, from what comes before."""
        x = self.downsample_layers[index](x).permute(0, 2, 3, 1)
        return self.stages[index](x, self.with_cp).permute(0, 3, 1, 2)

    def frozen_modules(self) -> Iterable[nn.Module]:
        if self.frozen_stages >= 0:
            yield self.downsample_layers[0]
        for i in range(self.frozen_stages):
            yield from (self.downsample_layers[i], self.stages[i])
            if i in self.out_indices and not self.final_norm:
                yield getattr(self, f'norm{i}')

    def num_layers(self) -> int:
        return sum(map(len, self.stages)) + 2

    def layer_of(self, name: str) -> int | None:
        part, _, rest = name.partition('.')
        if part not in ('downsample_layers', 'stages'):
            return None
        stage, block = rest.split('.')[:2]
        before = sum(len(self.stages[i]) for i in range(int(stage)))
        if part == 'stages':
            return before + int(block) + 1
        return before + 1 if before else 0  # with the stage's first block

    def may_differ(self, name: str) -> bool:
        part, _, rest = name.partition('.')
        if part not in ('downsample_layers', 'stages'):
            return True  # norms of maps, and the norm for classification
        stage = rest.partition('.')[0]
        return stage.isdecimal() and int(stage) >= len(self.stages)


def check_arch(
    arch: str | dict[str, Any],
    archs: dict[str, dict[str, Any]],
    required: set[str],
    defaults: dict[str, Any],
) -> dict[str, Any]:
    """Look up an arch by name and fill in what it leaves out.

    Args:
        arch: A name, or a dict.
        archs: The known names.
        required: Keys that a dict must have.
        defaults: Keys that it may have, and their defaults. Tuples and lists hold one entry a
            stage.

    Returns:
        dict[str, Any]: A new dict with all keys.

    Raises:
        ValueError: If the name or a key is unknown, or if values do not fit together.
    """
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(
                f'arch={arch!r} is unknown; choose one of {list(archs)} or give a dict'
            )
        arch = archs[arch]
    if not required <= {*arch} <= required | {*defaults}:
        raise ValueError(
            f'an arch dict needs {sorted(required)} and may have {sorted(defaults)}; '
            f'got {sorted(arch)}'
        )
    arch = {**defaults, **arch}
    per_stage = {key: value for key, value in arch.items() if isinstance(value, (list, tuple))}
    if len({len(value) for value in per_stage.values()}) > 1 or not arch['depths']:
        raise ValueError(
            f'{", ".join(per_stage)} must have one entry a stage; '
            f'got {", ".join(map(str, per_stage.values()))}'
        )
    dims = arch['embed_dims']
    if any(dim < 1 or dim % HEAD_DIM for dim in dims):
        raise ValueError(f'embed_dims={dims} must be multiples of {HEAD_DIM}, the head width')
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
