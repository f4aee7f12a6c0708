"""The first node of a whole model: images as they are decoded, normalized and padded."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Images(nn.Module):
    """Normalizes and pads images as the config's data preprocessor does.

    Args:
        mean: Of each channel, in the order of the network's channels.
        std: As ``mean``.
        rgb: Whether the network's channels are red, green, blue; else the other way round.
        canvas: Height and width of what the network sees, in pixels.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], rgb: bool, canvas: tuple[int, int]
    ) -> None:
        super().__init__()
        self.rgb, self.canvas = rgb, canvas
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def of(cls, settings: Mapping[str, Any], canvas: tuple[int, int]) -> 'Images':
        """As a config's data preprocessor says.

        Args:
            settings: The ``data_preprocessor`` of a config.
            canvas: Height and width in pixels.
        """
        rgb = bool(settings.get('to_rgb') or settings.get('bgr_to_rgb'))
        return cls(settings.get('mean', [0.0] * 3), settings.get('std', [1.0] * 3), rgb, canvas)

    def forward(self, images: Tensor) -> Tensor:
        """RGB images (B, H, W, 3), uint8, at most as large as the canvas, to (B, 3, *canvas)."""
        height, width = images.shape[1:3]
        x = images.permute(0, 3, 1, 2).float()
        x = (x if self.rgb else x.flip(1)).sub(self.mean).div(self.std)
        return F.pad(x, (0, self.canvas[1] - width, 0, self.canvas[0] - height))
