"""Importing this makes ``timm.create_model('biformer_small')`` work, with ``features_only`` too."""

from collections import OrderedDict
from dataclasses import asdict, is_dataclass
from typing import Any

from mmengine.runner import CheckpointLoader, load_state_dict
from timm.layers import ClassifierHead
from timm.models import FeatureInfo, register_model
from torch import Tensor, nn

from ..checkpoint import RELEASED
from ..models import BiFormer
from ..safe_load import CheckpointError


class BiFormerClassifier(nn.Module):
    """BiFormer with a classifier, as timm's models are.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'stl'`` or ``'stl_nchw'``.
        num_classes: Number of classes; 0 for pooled features. Defaults to 1000.
        global_pool: timm's name of the pooling, '' for none. Defaults to ``'avg'``.
        drop_rate: Dropout before the classifier. Defaults to 0.
        **kwargs: Arguments of :class:`~mmbiformer.models.BiFormer`.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.backbone = BiFormer(arch, final_norm=True, **kwargs)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.backbone.norm.num_features
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map, (B, C, H / 32, W / 32), of images (B, 3, H, W)."""
        return self.backbone(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify a map: (B, num_classes), or (B, C) with ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new last layer.

        Args:
            num_classes: Number of classes; 0 for pooled features.
            global_pool: timm's name of the pooling. Defaults to None: as it is.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass, or keep what it computes."""
        self.backbone.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which parameters make a layer, for layer-wise learning rates.

        Args:
            coarse: Whether a stage is one layer. Defaults to False: each block is one, a stage's
                first with the downsampling before it.

        Returns:
            dict[str, Any]: Patterns of names, as timm takes them.
        """
        blocks = [
            (r'^backbone\.downsample_layers\.(\d+)', (0,)),
            (r'^backbone\.stages\.(\d+)\.(\d+)', None),
        ]
        stages = r'^backbone\.(?:downsample_layers|stages)\.(\d+)'
        return dict(stem=r'^backbone\.downsample_layers\.0', blocks=stages if coarse else blocks)


class BiFormerFeatures(BiFormer):
    """BiFormer that gives a list of maps and says what they are in ``feature_info``, as in timm.

    The maps pass a LayerNorm each, as those for dense tasks do.

    Args:
        arch: As of :class:`BiFormerClassifier`.
        **kwargs: Arguments of :class:`~mmbiformer.models.BiFormer`, such as ``out_indices``.
    """

    def __init__(self, arch: str, **kwargs: Any) -> None:
        super().__init__(arch, **kwargs)
        info = [
            dict(num_chs=len(stage[0].norm1.weight), reduction=4 * 2**i, module=f'stages.{i}')
            for i, stage in enumerate(self.stages)
        ]
        self.feature_info = FeatureInfo(info, self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, H / s, W / s) of images (B, 3, H, W)."""
        return list(super().forward(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass, or keep what it computes."""
        self.with_cp = enable


def _create(
    arch: str,
    pretrained: bool = False,
    features_only: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model; the unnamed arguments are what timm passes to every entry point.

    With ``pretrained`` the weights are the authors', downloaded from their page into the folder of
    ``torch.hub``, or those of ``pretrained_cfg_overlay=dict(file=...)`` or ``dict(url=...)``.

    Raises:
        ValueError: If other weights are asked for in a way that is not known here.
    """
    if pretrained_cfg and isinstance(pretrained_cfg, str):
        raise ValueError(f"there are no weights {pretrained_cfg!r}; leave '.{pretrained_cfg}' out")
    if is_dataclass(pretrained_cfg):  # timm's PretrainedCfg
        pretrained_cfg = asdict(pretrained_cfg)
    source = {**(pretrained_cfg or {}), **(pretrained_cfg_overlay or {})}
    if features_only:
        for name in ('num_classes', 'global_pool', 'drop_rate'):
            kwargs.pop(name, None)
    model = (BiFormerFeatures if features_only else BiFormerClassifier)(arch, **kwargs)
    if pretrained:
        for name in ('hf_hub_id', 'state_dict'):
            if source.get(name):
                raise ValueError(f'weights by {name} are not known here; give file or url')
        if cache_dir:
            raise ValueError(f'cache_dir={cache_dir!r} is not used; set TORCH_HOME to that folder')
        path = source.get('file') or source.get('url') or RELEASED[arch]
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
        state_dict = checkpoint.get('state_dict', checkpoint)
        versions = getattr(state_dict, '_metadata', {})
        state_dict = {name.removeprefix('module.'): state_dict[name] for name in state_dict}
        if not any(name.startswith('backbone.') for name in state_dict):  # a backbone alone
            state_dict = {
                name if name.startswith('head.') else f'backbone.{name}': value
                for name, value in state_dict.items()
            }
        if 'backbone.stages.0.0.norm1.weight' not in state_dict:
            raise CheckpointError(f'{path} holds no weights of a BiFormer; take another file')
        own = model.state_dict()
        for name in ('head.fc.weight', 'head.fc.bias'):
            # A classifier of other classes stays new.
            if name in state_dict and (
                name not in own or own[name].shape != state_dict[name].shape
            ):
                del state_dict[name]
        state_dict = OrderedDict(state_dict)
        state_dict._metadata = {'backbone': versions.get('backbone') or versions.get('', {})}
        load_state_dict(model, state_dict, strict=False)
    return model


@register_model
def biformer_tiny(**kwargs: Any) -> nn.Module:
    """BiFormer-T, 13.1 M parameters, 2.2 G MACs."""
    return _create('tiny', **kwargs)


@register_model
def biformer_small(**kwargs: Any) -> nn.Module:
    """BiFormer-S, 25.5 M parameters, 4.5 G MACs."""
    return _create('small', **kwargs)


@register_model
def biformer_base(**kwargs: Any) -> nn.Module:
    """BiFormer-B, 56.8 M parameters, 9.8 G MACs."""
    return _create('base', **kwargs)


@register_model
def biformer_stl(**kwargs: Any) -> nn.Module:
    """BiFormer-STL, 28.4 M parameters, 4.6 G MACs."""
    return _create('stl', **kwargs)


@register_model
def biformer_stl_nchw(**kwargs: Any) -> nn.Module:
    """BiFormer-STL-nchw, 28.4 M parameters, 4.6 G MACs."""
    return _create('stl_nchw', **kwargs)
