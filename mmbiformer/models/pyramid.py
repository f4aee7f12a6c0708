"""From one map to a pyramid, for hosts that lack such a neck."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class MapPyramid(BaseModule):
    """Resample maps of one size to several, each followed by a LayerNorm over channels.

    A transposed convolution of 2x2 doubles a map, max pooling shrinks it; maps of odd size are
    rounded up. MMSegmentation's ``Feature2Pyramid`` shrinks by 4 at most and MMDetection has none.

    Example:
        >>> neck = MapPyramid(192, scales=(1, 0.5, 0.25, 0.125))
        >>> [tuple(each.shape) for each in neck([torch.randn(1, 192, 64, 96)])]
        [(1, 192, 64, 96), (1, 192, 32, 48), (1, 192, 16, 24), (1, 192, 8, 12)]

    Args:
        dim: Channels, C.
        scales: Sizes of the maps that come out, in multiples of the one that goes in: powers of 2
            up to 4. Defaults to (2, 1, 0.5, 0.25), strides of 4 to 32 from a map of stride 8.
        init_cfg: MMEngine's initialization config. Defaults to None.

    Raises:
        ValueError: If a scale is not a power of 2 or above 4.
    """

    def __init__(
        self,
        dim: int,
        scales: Sequence[float] = (2, 1, 0.5, 0.25),
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.levels = nn.ModuleList(
            nn.Sequential(*_resampling(dim, scale), LayerNorm2d(dim)) for scale in scales
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Resample.

        Args:
            inputs: Maps of shape (B, C, H, W): one for all scales, or one for each.

        Returns:
            tuple[Tensor, ...]: One map (B, C, scale * H, scale * W) a scale.
        """
        if len(inputs) == 1:
            inputs = [inputs[0]] * len(self.levels)
        # RoIAlign takes memory to be NCHW, and convolutions keep the order that they find.
        return tuple(level(x).contiguous() for level, x in zip(self.levels, inputs, strict=True))


def _resampling(dim: int, scale: float) -> list[nn.Module]:
    if scale in (2, 4):
        up = [nn.ConvTranspose2d(dim, dim, 2, 2)]
        return up if scale == 2 else [*up, nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)]
    step = round(1 / scale) if scale > 0 else 0
    if scale > 1 or step < 1 or step & (step - 1) or step * scale != 1:
        raise ValueError(f'scale {scale} must be a power of 2, at most 4')
    return [nn.MaxPool2d(step, ceil_mode=True)] if step > 1 else []
