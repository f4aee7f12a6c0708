"""What the four-stage backbones share: blocks, downsampling, and the contract with the hosts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..checkpoint import adapt_backbone_state, named
from ..layers import DepthwiseConv2d, LayerNorm
from ..layers.inplace import add, reused_memory
from ..ops.regions import ceil_div, eager

NORM_EPS = 1e-6
HEAD_DIM = 32
# How large a map may be in inference on CPU: what a block makes of it is then small enough to stay
# in the processor's cache and for glibc to keep its memory for the next block.
MAP_BYTES = 3 * 2**20


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


class HierarchicalBackbone(BaseModule):
    """Stages of blocks on channels-last maps, each after a downsampling layer.

    A model passes its arch and how it builds a stage; the other arguments are those of every
    backbone here, see :class:`~mmbiformer.models.BiFormer`.

    Args:
        depths: Drop path rates per stage; they rise linearly over all of them.
        embed_dims: Channels per stage.
        build_stage: From a stage's number and drop path rates to its downsampling layer, on NCHW
            maps, and its blocks, on channels-last maps. Not called for stages after the last of
            ``out_indices``.
        map_norm_eps: Epsilon of the norms of the returned maps.
        out_indices: Stages whose maps are returned.
        final_norm: Whether to end in the BatchNorm that the classification head expects.
        drop_path_rate: Stochastic depth of the last block.
        frozen_stages: Stages to freeze.
        norm_eval: Whether BatchNorm stays in eval mode while training.
        with_cp: Whether to recompute blocks in the backward pass.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If an argument does not fit. In ``forward``: if the images are too small.

    Attributes:
        min_size (tuple[int, int]): Height and width of the smallest images, in pixels. A model that
            needs more than one pixel sets it.
    """

    min_size = (1, 1)

    def __init__(
        self,
        depths: Sequence[int],
        embed_dims: Sequence[int],
        build_stage: Callable[[int, list[float]], tuple[nn.Module, Iterable[nn.Module]]],
        map_norm_eps: float,
        out_indices: Sequence[int] | int | None,
        final_norm: bool,
        drop_path_rate: float,
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(_without_prefix(init_cfg))
        self.out_indices = _check_out_indices(out_indices, len(depths), final_norm)
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
        self.final_norm = final_norm

        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device='cpu')
        drop_paths = [rates.tolist() for rates in drop_paths.split(list(depths))]
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(num_built):
            downsample, blocks = build_stage(i, drop_paths[i])
            self.downsample_layers.append(downsample)
            self.stages.append(nn.ModuleList(blocks))
        if final_norm:
            self.norm = nn.BatchNorm2d(embed_dims[-1])
        else:
            for i in self.out_indices:
                self.add_module(f'norm{i}', nn.LayerNorm(embed_dims[i], eps=map_norm_eps))

        self._register_load_state_dict_pre_hook(adapt_backbone_state, with_module=True)
        self._freeze()

    def init_weights(self) -> None:
        """Do as ``init_cfg`` says; an error about a file of weights names it."""
        settings = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        paths = [str(each['checkpoint']) for each in settings if 'checkpoint' in each]
        with named(' or '.join(paths)):
            super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: Images of shape (B, 3, H, W).

        Returns:
            tuple[Tensor, ...]: One map (B, C, H / s, W / s) for each of ``out_indices``, with
            strides s of 4, 8, 16 and 32. Sizes are rounded up, by BiFormer's layout ``'swin'``
            down.

        Raises:
            ValueError: If the images are too small, or are no images.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f'images must have the shape (B, 3, H, W), got {tuple(x.shape)}')
        if x.shape[2] < self.min_size[0] or x.shape[3] < self.min_size[1]:
            raise ValueError(
                f'images of {x.shape[2]}x{x.shape[3]} pixels are too small, this model needs at '
                f'least {self.min_size[0]}x{self.min_size[1]}; resize or pad them'
            )
        outs = []
        # channels_last, in words that torch.func.vmap knows too.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for i, stage in enumerate(self.stages):
            x = self.downsample_layers[i](x).permute(0, 2, 3, 1)
            x = self._run_in_parts(stage, x) if spares_memory(stage, x) else self._run(stage, x)
            if i in self.out_indices and not self.final_norm:
                # mmcv's RoIAlign reads memory as NCHW, whatever the strides say.
                outs.append(getattr(self, f'norm{i}')(x).permute(0, 3, 1, 2).contiguous())
            x = x.permute(0, 3, 1, 2)
        return (self.norm(x),) if self.final_norm else tuple(outs)

    def _run(self, stage: nn.ModuleList, x: Tensor) -> Tensor:
        for block in stage:
            if self.with_cp and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _run_in_parts(self, stage: nn.ModuleList, x: Tensor) -> Tensor:
        """A few images at a time; nothing in a block mixes them."""
        images = max(1, MAP_BYTES // max(1, x.shape[1:].numel() * x.element_size()))
        # As many in each part: the threads have too little to share in what would be left over.
        shares = x.tensor_split(max(1, ceil_div(len(x), images)))
        with reused_memory():
            parts = [self._run(stage, part) for part in shares]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def train(self, mode: bool = True) -> 'HierarchicalBackbone':
        """Set the mode; frozen stages, and with ``norm_eval`` BatchNorm, stay in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Tell in which layer a parameter is, for layer-wise learning rate decay.

        Layer 0 is the stem; each block is one layer, its stage's first with the downsampling in
        front of it. New parts are in the last layer: norms of the maps, neck and heads.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: The backbone's name in the model, with a dot. Defaults to ''.

        Returns:
            tuple[int, int]: The layer, from 0, and the number of layers.
        """
        depths = [len(stage) for stage in self.stages]
        num_layers = sum(depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        part, stage, *rest = param_name.removeprefix(prefix).split('.')
        if part == 'stages':
            return sum(depths[: int(stage)]) + int(rest[0]) + 1, num_layers
        if part == 'downsample_layers':
            return sum(depths[: int(stage)]) + 1 if int(stage) else 0, num_layers
        return num_layers - 1, num_layers

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


def spares_memory(stage: nn.ModuleList, x: Tensor) -> bool:
    """Whether a stage's blocks can take a batch in parts and reuse memory: in inference on CPU.

    Where a hook, a wrapper or a patched ``forward`` listens they do neither: it gets whole batches,
    and may keep them.
    """
    if x.device.type != 'cpu' or torch.is_grad_enabled() or not eager():
        return False
    hooks = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    return not hooks and not any(map(_may_listen, stage.modules()))


def _may_listen(module: nn.Module) -> bool:
    """Whether anyone may have added code that sees what goes in and out of a module."""
    package = type(module).__module__.partition('.')[0]
    return bool(
        package not in ('mmbiformer', 'timm', 'torch')
        or 'forward' in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
    )


def conv_downsample(in_dim: int, dim: int, stage: int) -> nn.Sequential:
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


def _without_prefix(init_cfg: dict | list[dict] | None) -> dict | list[dict] | None:
    """An initialization config without the prefix that backbones take off by themselves.

    Where MMEngine takes it off, the version of the weights is lost, which tells like archs apart.
    """
    if isinstance(init_cfg, list):
        return [_without_prefix(each) for each in init_cfg]
    if isinstance(init_cfg, Mapping) and init_cfg.get('prefix') in ('backbone', 'backbone.'):
        return {key: value for key, value in init_cfg.items() if key != 'prefix'}
    return init_cfg


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
