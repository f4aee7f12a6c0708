"""The contract of every backbone with the host libraries."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import CheckpointError, escaped
from ..registry import MODELS


class Backbone(BaseModule):
    """The contract with MMDetection, MMSegmentation, MMPretrain and timm.

    A family of models is a subclass in a file of its own, registered in ``MODELS``. Its ``forward``
    begins with :meth:`check_images` and returns a tuple of tensors; maps are contiguous NCHW. Its
    ``__init__`` ends with :meth:`freeze`. It defines :meth:`frozen_modules`, :meth:`num_layers` and
    :meth:`layer_of`, and, if its authors released weights, the class attributes below,
    :meth:`is_released` and :meth:`convert_released`.

    Args:
        in_channels: Channels of the images. Defaults to 3.
        norm_eval: Whether BatchNorm stays in eval mode while training. Defaults to False.
        init_cfg: MMEngine's initialization config. Defaults to None.

    Attributes:
        archs (dict[str, dict]): The named settings of the family.
        released (dict[str, str]): URLs of the authors' ImageNet-1K weights by arch.
        authors_page (str): Where the authors' code and weights are.
        min_size (tuple[int, int]): Height and width of the smallest images, in pixels.
        embedding (tuple[str, int]): Name of the module that makes tokens of images, and the
            dimension of their rows, which that of their columns follows.
    """

    archs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    released: ClassVar[Mapping[str, str]] = {}
    authors_page: ClassVar[str] = ''
    min_size: tuple[int, int] = (1, 1)
    embedding: ClassVar[tuple[str, int]]

    def __init__(
        self,
        *,
        in_channels: int = 3,
        norm_eval: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.norm_eval = norm_eval
        self.register_load_state_dict_pre_hook(_take_prefixed_names)

    # Defined by a family.

    def frozen_modules(self) -> Iterable[nn.Module]:
        """Modules that ``frozen_stages`` keeps from learning. Defaults to none."""
        return ()

    def num_layers(self) -> int:
        """Number of layers for learning rate decay: the stem, each block, and all the rest."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int | None:
        """The layer of a parameter of this backbone, 0 for the stem; None for the last layer."""
        raise NotImplementedError

    def may_differ(self, name: str) -> bool:
        """Whether a parameter may be in this model and not in a file, or the other way round.

        So may the parts of another task, and blocks that are not built. Defaults to False.
        """
        return False

    @staticmethod
    def is_released(names: Iterable[str]) -> bool:
        """Whether these are the parameters of a model of this family under its authors' names."""
        return False

    @staticmethod
    def convert_released(weights: Mapping[str, Tensor]) -> 'OrderedDict[str, Tensor]':
        """Rename the authors' parameters.

        Args:
            weights: Tensors under the authors' names, without ``backbone.``.

        Returns:
            OrderedDict[str, Tensor]: Tensors under the names of this backbone, and ``head.fc.…``.
        """
        raise NotImplementedError

    # Common to all families.

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless these are images (B, in_channels, H, W) of at least min_size."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f'images must have the shape (B, {self.in_channels}, H, W), '
                f'got {tuple(images.shape)}'
            )
        height, width = images.shape[2:]
        if height < self.min_size[0] or width < self.min_size[1]:
            raise ValueError(
                f'images of {height}x{width} pixels are too small, this model needs at least '
                f'{self.min_size[0]}x{self.min_size[1]}; resize or pad them'
            )

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the mode; frozen modules, and with ``norm_eval`` BatchNorm, stay in eval mode."""
        super().train(mode)
        self.freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze(self) -> None:
        """Keep the frozen modules from learning."""
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Tell in which layer a parameter is, for layer-wise learning rate decay.

        Layer 0 is the stem; each block is one layer. Norms of the outputs, necks and heads are new
        for each task and make the last layer.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: The backbone's name in the model, with a dot. Defaults to ''.

        Returns:
            tuple[int, int]: The layer, from 0, and the number of layers.
        """
        layer = None
        if param_name.startswith(prefix):
            layer = self.layer_of(param_name.removeprefix(prefix))
        return self.num_layers() - 1 if layer is None else layer, self.num_layers()

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        A file (``type='Pretrained'``) is read once, through MMEngine. It may hold the backbone
        alone or a whole model, whose backbone is under ``backbone.…`` or the given ``prefix``.

        Raises:
            CheckpointError: If the file does not fit this model.
        """
        settings = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        files = [each for each in settings if each.get('type') in ('Pretrained', PretrainedInit)]
        if self.is_init or not files:
            super().init_weights()
            return
        initialize(self, [each for each in settings if each not in files])
        for each in files:
            path = each['checkpoint']
            found = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
            if isinstance(found, Mapping):
                found = found.get('state_dict', found)
            self._load_file(found, path, each.get('prefix'))
        self.is_init = True

    def problems_with(self, weights: Mapping[str, Any]) -> list[str]:
        """List the problems that keep weights from being loaded into this backbone.

        Parts of another task may be missing, and those that this model has no place for are left
        out; see :meth:`may_differ`.

        Args:
            weights: Weights under the names of this backbone, perhaps with other models' parts.
        """
        own = self.state_dict()
        parts = {name.partition('.')[0] for name in own}
        needed = {name: own[name] for name in own if name in weights or not self.may_differ(name)}
        return misfits(needed, weights) + [
            f'{escaped(name)} is not in the model'
            for name in weights
            if name not in own and name.partition('.')[0] in parts and not self.may_differ(name)
        ]

    def _load_file(self, found: Any, path: str, prefix: str | None) -> None:
        """Load what fits and say in one line what else there is, or raise CheckpointError."""
        own = self.state_dict()
        weights = {
            name.removeprefix('module.'): value
            for name, value in (found.items() if isinstance(found, Mapping) else ())
            if isinstance(name, str)
        }
        if prefix is None:
            prefix = '' if own.keys() & weights.keys() else 'backbone.'
        elif prefix:
            prefix = prefix.removesuffix('.') + '.'
        given = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        family = type(self).__name__
        problems = self.problems_with(given)
        if not given:
            problems = [f"every '{prefix}…' is missing; it holds {escaped(listed([*weights]))}"]
        if problems:
            raise CheckpointError(
                f'{path} does not fit this {family}: {listed(problems)}. Choose the arch of the '
                f"file or another file; the authors' page is {self.authors_page}"
            )
        fitting = {name: value for name, value in given.items() if name in own}
        self.load_state_dict(fitting, strict=False)
        new = {_part(name) for name in own if name not in given}
        left_out = {_part(name) for name in given if name not in own}
        left_out = {f'{x} in part' if x in {*map(_part, fitting)} else x for x in left_out}
        left_out |= {name.partition('.')[0] for name in weights if not name.startswith(prefix)}
        told = [f'{path}: {len(fitting)} weights loaded into {family}']
        told += [f'new: {", ".join(sorted(new))}'] if new else []
        told += [f'left out: {escaped(", ".join(sorted(left_out)))}'] if left_out else []
        print_log('; '.join(told), logger='current')


def families() -> list[type[Backbone]]:
    """The families of backbones: all subclasses that are registered in ``MODELS``."""
    registered = MODELS.module_dict.values()
    return [each for each in registered if isinstance(each, type) and issubclass(each, Backbone)]


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """List the problems that keep weights from being loaded as they are.

    Args:
        own: The weights that are needed, by name.
        given: The weights that there are.

    Returns:
        list[str]: Weights that are missing, have another shape, or are integers in the place of
        floating-point numbers. (torch would load quantized weights without their scales.)
    """
    problems = []
    for name, value in own.items():
        found = given.get(name)
        if name not in given:
            if not name.endswith('num_batches_tracked'):  # old files have none
                problems.append(f'{name} is missing')
        elif not isinstance(found, Tensor) or found.shape != value.shape:
            shape = tuple(getattr(found, 'shape', ()))
            problems.append(f'{name} is {shape} instead of {tuple(value.shape)}')
        elif value.is_floating_point() and not found.is_floating_point():
            problems.append(f'{name} is of {found.dtype} instead of {value.dtype}')
    return problems


def listed(problems: Sequence[str], count: int = 3) -> str:
    """The first few of many problems in one text, and how many more there are."""
    more = f' and {len(problems) - count} more' if len(problems) > count else ''
    return ', '.join(problems[:count]) + more


def rename(
    weights: Mapping[str, Tensor],
    patterns: Iterable[tuple[str, str | Callable[[re.Match], str]]],
) -> 'OrderedDict[str, Tensor]':
    """Give weights other names; those of 1x1 convolutions become those of linear layers.

    Args:
        weights: Tensors by name.
        patterns: Regular expressions and their replacements, applied to each name in turn.

    Returns:
        OrderedDict[str, Tensor]: The same tensors, 1x1 kernels without their last two dimensions.
    """
    renamed = OrderedDict()
    for name, value in weights.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    return renamed


def drop_path_rates(rate: float, count: int) -> list[float]:
    """Stochastic depth of ``count`` blocks: it rises linearly from 0 to ``rate``.

    Raises ValueError if ``rate`` is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate={rate} must lie in [0, 1)')
    return torch.linspace(0, rate, count, device='cpu').tolist()


def _take_prefixed_names(
    module: Backbone, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    """Let a backbone that is loaded by itself take ``backbone.…`` as its own names."""
    if prefix == '' and not module.state_dict().keys() & state_dict.keys():
        for name in [name for name in state_dict if name.startswith('backbone.')]:
            state_dict[name.removeprefix('backbone.')] = state_dict.pop(name)


def _part(name: str) -> str:
    """The part of a model that a weight belongs to, such as ``stages.3`` or ``norm``."""
    first, second = [*name.split('.'), ''][:2]
    return f'{first}.{second}' if second.isdecimal() else first
