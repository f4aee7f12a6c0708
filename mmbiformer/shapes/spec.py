"""The look of the scenes: the classes, and all settings of an image."""

import math
from dataclasses import dataclass, field

from ..errors import UserError

GENERATOR = 'mmbiformer-shapes'
VERSION = 1
"""Raised when the same parameters give other images."""

SPLITS = ('train', 'val')

CLASSES = ('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross', 'crescent')


@dataclass(frozen=True)
class ShapesSpec:
    """All settings of a scene.

    A scene is harder with more objects, smaller sizes, higher ``max_occlusion``, more distractors,
    lower ``contrast`` or higher ``texture``. The help of each field says what it is.

    Raises:
        UserError: If a value makes no sense.
    """

    size: tuple[int, int] = field(
        default=(192, 160), metadata={'help': 'image width and height in pixels'}
    )
    objects: tuple[int, int] = field(
        default=(2, 6), metadata={'help': 'fewest and most shapes per image (uniform)'}
    )
    shape_size: tuple[float, float] = field(
        default=(8.0, 80.0),
        metadata={'help': 'smallest and largest longer side of a whole shape in pixels'},
    )
    large_bias: float = field(
        default=4.0,
        metadata={'help': 'size distribution: 1 is log-uniform, above 1 favours large shapes'},
    )
    max_occlusion: float = field(
        default=0.3,
        metadata={'help': 'largest fraction of a shape hidden by others or by the image border'},
    )
    distractors: tuple[int, int] = field(
        default=(1, 4), metadata={'help': 'fewest and most distractors per image (uniform)'}
    )
    contrast: float = field(
        default=50.0,
        metadata={'help': 'smallest RGB distance of any other colour to its surroundings (0..255)'},
    )
    class_colour: float = field(
        default=0.9,
        metadata={'help': 'share of shapes in the hue of their class; the rest have any colour'},
    )
    texture: float = field(
        default=1.0, metadata={'help': 'strength of all textures: 0 is plain, 1 is normal'}
    )
    spread: float = field(
        default=1.0,
        metadata={'help': 'share of the image, about its middle, for the centres of shapes (0..1)'},
    )

    def __post_init__(self) -> None:
        """Check the values; turn lists into tuples."""
        for name in ('size', 'objects', 'shape_size', 'distractors'):
            # The command line gives lists; tuples keep specs comparable.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ('objects', 'shape_size', 'distractors'):
            low, high = getattr(self, name)
            _require(0 <= low <= high, name, 'an ascending pair of numbers >= 0', (low, high))
        smallest, largest = self.shape_size
        _require(smallest >= 8, 'shape_size', 'at least 8 pixels: less shows no class', smallest)
        _require(min(self.size) >= largest, 'size', f'at least shape_size, {largest:g}', self.size)
        _require(0 < self.large_bias < math.inf, 'large_bias', 'positive', self.large_bias)
        _require(0 <= self.max_occlusion < 1, 'max_occlusion', 'in [0, 1)', self.max_occlusion)
        _require(0 <= self.contrast <= 255, 'contrast', 'in [0, 255]', self.contrast)
        _require(0 <= self.texture < math.inf, 'texture', 'finite, 0 or above', self.texture)
        for name in ('class_colour', 'spread'):
            value = getattr(self, name)
            _require(0 <= value <= 1, name, 'in [0, 1]', value)


def _require(holds: bool, name: str, wanted: str, given: object) -> None:
    if not holds:
        raise UserError(f'{name} must be {wanted}; got {given}')
