"""BiXT as timm's models."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...models import BiXT
from .classifier import Classifier


class BiXTClassifier(Classifier):
    """A BiXT with pooled latents and a classifier.

    With ``features_only=True`` timm gives the tokens of blocks as maps of one stride, by default of
    the last block that has tokens.

    Example:
        >>> import timm, torch
        >>> import mmbiformer.hub.timm
        >>> net = timm.create_model('bixt_ti_l64_d13_p16s8', features_only=True, out_indices=(5,))
        >>> [tuple(each.shape) for each in net(torch.randn(2, 3, 64, 96))]
        [(2, 192, 8, 12)]

    Args:
        family: The class of the backbone.
        arch: Its arch.
        num_classes: Number of classes; 0 for pooled features. Defaults to 1000.
        global_pool: ``'avg'``, the mean of the latents, or '' for none. Defaults to ``'avg'``.
        drop_rate: Dropout before the classifier. Defaults to 0.
        in_chans: Channels of the images. Defaults to 3.
        device: Where the model goes. Defaults to None: as PyTorch says.
        dtype: Its type. Defaults to None: as PyTorch says.
        **kwargs: Arguments of the backbone, such as ``drop_path_rate``.
    """

    num_maps = 1

    def __init__(
        self,
        family: type[BiXT],
        arch: str,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_chans)
        self.options = dict(in_channels=in_chans, **kwargs)
        self.backbone = family(arch, **self.options)
        arch = self.backbone.arch
        self.num_features = self.head_hidden_size = arch['dim']
        self.head = nn.ModuleDict(dict(drop=nn.Dropout(drop_rate)))
        self.reset_classifier(num_classes, global_pool)
        self.feature_info = [
            dict(num_chs=arch['dim'], reduction=arch['stride'], module=f'backbone.blocks.{i}')
            for i in range(arch['depth'] - 1)
        ]
        self.to(device=device, dtype=dtype)

    @staticmethod
    def first_conv(arch: Mapping[str, Any]) -> str:
        return 'tokenizer.proj.0.0' if arch.get('tokenizer') == 'conv' else 'tokenizer.proj'

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the latents, (B, N, C), of images (B, in_chans, H, W)."""
        return self.backbone.run(x, ())[1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify latents: (B, num_classes), or (B, C) with ``pre_logits``."""
        if self.global_pool:
            x = self.backbone.norm(x.mean(1))
        x = self.head['drop'](x)
        return x if pre_logits else self.head['fc'](x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps of blocks.

        Args:
            x: Images of shape (B, in_chans, H, W).
            indices: Blocks: the last n, a list of numbers, or None for all. Defaults to None.
            norm: For timm; there is no norm of tokens.
            stop_early: For timm; blocks after the last that is asked for give the latents.
            output_fmt: ``'NCHW'``.
            intermediates_only: Whether to give the maps alone.

        Returns:
            list[Tensor] | tuple[Tensor, list[Tensor]]: The maps (B, C, H / s, W / s), or the
            latents and they.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW'")
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        maps, latents = self.backbone.run(x, taken)
        return maps if intermediates_only else (latents, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the maps of these blocks do not need; returns the blocks' numbers.

        Args:
            indices: Blocks: the last n, or a list of numbers.
            prune_norm: For timm; the norm of the latents goes.
            prune_head: For timm; the classifier goes.
        """
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        whole = self.backbone
        self.backbone = type(whole)(
            whole.arch, out_type='featmap', out_indices=taken, **self.options
        )
        self.backbone.to(whole.latents).load_state_dict(whole.state_dict(), strict=False)
        self.reset_classifier(0, '')
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head['fc']

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new last layer, of zeros as in the authors' code.

        Args:
            num_classes: Number of classes; 0 for pooled features.
            global_pool: ``'avg'`` or ''. Defaults to None: as it is.

        Raises:
            ValueError: If the pooling is another.
        """
        if global_pool is not None:
            if global_pool not in ('avg', ''):
                raise ValueError(f"global_pool={global_pool!r} must be 'avg' or ''")
            self.global_pool = global_pool
        self.num_classes = num_classes
        fc = nn.Identity()
        if num_classes:
            latents = self.backbone.latents
            fc = nn.Linear(self.num_features, num_classes).to(latents.device, latents.dtype)
            nn.init.zeros_(fc.weight)
            nn.init.zeros_(fc.bias)
        self.head['fc'] = fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Say which parameters make a layer, for layer-wise learning rates.

        Args:
            coarse: For timm; each block is one layer.

        Returns:
            dict[str, Any]: Patterns of names, as timm takes them.
        """
        blocks = r'^backbone\.blocks\.(\d+)'
        return dict(stem=r'^backbone\.(?:tokenizer|latents)', blocks=blocks)
