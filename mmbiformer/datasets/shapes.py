"""Synthetic scenes of simple shapes with exact instance masks.

They replace a download wherever a small but real vision task is needed: textured shapes of
several classes over textured backgrounds, rotated, hiding one another, among strokes and blobs
that belong to no class. They need no external files and every image follows from a seed.

:func:`render_scene` turns a random generator and a :class:`ShapesSpec` into a :class:`Scene`.
Nothing here knows of file formats: see ``shapes_formats.py`` and ``shapes_folder.py``.

Throughout, continuous coordinates put the centre of pixel ``(row i, column j)`` at
``(x, y) = (j + 0.5, i + 0.5)``, lengths are in pixels and colours are RGB in 0..255.
"""

import math
from collections.abc import Callable
from colorsys import hsv_to_rgb
from dataclasses import dataclass, field

import cv2
import numpy as np

GENERATOR = 'mmbiformer-shapes'
VERSION = 1
"""Raised whenever the same parameters would give other images."""

SPLITS = ('train', 'val')

CLASSES = ('disc', 'rectangle', 'triangle', 'star', 'ring', 'cross', 'crescent')

MIN_VISIBLE_PX = 20
"""Shapes showing fewer pixels than this are never left in a scene, whatever the spec."""

MAX_DISTRACTOR_OCCLUSION = 0.3
"""Largest hidden fraction of a distractor: a single lobe of a blob, say, could pass for a disc."""

SUPERSAMPLE = 4
"""Subpixels per pixel side when an outline is turned into pixel coverage."""

PLACEMENT_TRIES = 30
"""Positions tried for one shape or distractor before it is left out."""


@dataclass(frozen=True)
class ShapesSpec:
    """What a scene looks like: all difficulty knobs of the data set.

    Harder: more objects, smaller sizes, higher ``max_occlusion``, more distractors, lower
    ``contrast``, higher ``texture``.
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
            # Lists come from the command line; tuples keep specs comparable.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ('objects', 'shape_size', 'distractors'):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f'{name} must be an ascending pair of numbers >= 0')
        if self.shape_size[0] < 8:
            raise ValueError('shape_size must start at 8 pixels or more: less shows no class')
        if min(self.size) < self.shape_size[1]:
            raise ValueError('size must be at least the largest shape_size')
        if not 0 < self.large_bias < math.inf:
            raise ValueError('large_bias must be positive')
        if not 0 <= self.max_occlusion < 1:
            raise ValueError('max_occlusion must be in [0, 1)')
        if not 0 <= self.contrast <= 255:
            raise ValueError('contrast must be in [0, 255]')
        if not 0 <= self.texture < math.inf:
            raise ValueError('texture must be finite, 0 or above')
        for name in ('class_colour', 'spread'):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f'{name} must be in [0, 1]')


@dataclass(frozen=True)
class Instance:
    """One annotated shape of a scene.

    Attributes:
        label: Index into :data:`CLASSES`.
        mask: Visible pixels, bool, ``(H, W)``.
        size: Longer side of the whole shape's axis-aligned box, hidden parts included, in pixels.
        occlusion: Fraction of the whole shape hidden by others or by the image border, 0..1.
    """

    label: int
    mask: np.ndarray
    size: float
    occlusion: float


@dataclass(frozen=True)
class Scene:
    """One rendered image and what is in it.

    Attributes:
        image: RGB, uint8, ``(H, W, 3)``.
        instances: Shapes from back to front; their masks do not overlap.
        distractors: Visible pixels of what belongs to no class, bool, ``(H, W)`` each.
    """

    image: np.ndarray
    instances: list[Instance]
    distractors: list[np.ndarray]


# Outlines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """Geometry of one element before it is placed.

    Attributes:
        contours: Point lists ``(N, 2)`` as ``(x, y)`` around the origin. Closed contours are
            filled by the even-odd rule, so a contour within another is a hole.
        stroke: Line width in pixels for open lines, or ``None`` for closed contours.
    """

    contours: list[np.ndarray]
    stroke: float | None = None


def _polar(angles: np.ndarray, radii: np.ndarray | float) -> np.ndarray:
    """Points ``(N, 2)`` at ``angles`` (radians, ``(N,)``) and ``radii`` (``(N,)`` or one)."""
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _circle(radius: float = 1.0, points: int = 48) -> np.ndarray:
    return _polar(np.arange(points) * (2 * np.pi / points), radius)


def _disc(rng: np.random.Generator) -> list[np.ndarray]:
    return [_circle()]


def _rectangle(rng: np.random.Generator) -> list[np.ndarray]:
    height = rng.uniform(0.65, 1.0)
    return [np.array([[-1, -height], [1, -height], [1, height], [-1, height]])]


def _triangle(rng: np.random.Generator) -> list[np.ndarray]:
    return [_polar(np.arange(3) * (2 * np.pi / 3), 1.0)]


def _star(rng: np.random.Generator) -> list[np.ndarray]:
    return [_polar(np.arange(10) * (np.pi / 5), np.tile([1.0, 0.45], 5))]


def _ring(rng: np.random.Generator) -> list[np.ndarray]:
    return [_circle(), _circle(rng.uniform(0.48, 0.62))]


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    a = rng.uniform(0.28, 0.38)
    arm = np.array([[1, -a], [1, a], [a, a]])
    turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])]


def _crescent(rng: np.random.Generator) -> list[np.ndarray]:
    # A unit disc minus a disc of radius r at (d, 0); both arcs end where the circles meet.
    r, d = 0.85, rng.uniform(0.45, 0.6)
    x = (1 - r * r + d * d) / (2 * d)
    outer = np.arccos(x)
    inner = np.arctan2(np.sqrt(1 - x * x), x - d)
    back = _polar(np.linspace(outer, 2 * np.pi - outer, 40), 1.0)
    front = _polar(np.linspace(2 * np.pi - inner, inner, 40), r) + np.array([d, 0])
    return [np.concatenate([back, front])]


_SHAPES: dict[str, Callable[[np.random.Generator], list[np.ndarray]]] = {
    'disc': _disc,
    'rectangle': _rectangle,
    'triangle': _triangle,
    'star': _star,
    'ring': _ring,
    'cross': _cross,
    'crescent': _crescent,
}


def _rotation(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, s], [-s, c]])


def shape_outline(rng: np.random.Generator, label: int, size: float) -> Outline:
    """A shape of class ``label``, squeezed a little, rotated at random.

    Args:
        rng: Source of randomness.
        label: Index into :data:`CLASSES`.
        size: Longer side of the result's axis-aligned box in pixels.

    Returns:
        The outline, its box centred on the origin.
    """
    contours = _SHAPES[CLASSES[label]](rng)
    squeeze = np.array([1.0, rng.uniform(0.8, 1.0)])
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    contours = [contour * squeeze @ turn for contour in contours]
    low = np.min([contour.min(axis=0) for contour in contours], axis=0)
    high = np.max([contour.max(axis=0) for contour in contours], axis=0)
    scale = size / (high - low).max()
    return Outline([(contour - (low + high) / 2) * scale for contour in contours])


def _line(rng: np.random.Generator) -> Outline:
    half = rng.uniform(10, 45)
    return Outline([np.array([[-half, 0.0], [half, 0.0]])], stroke=rng.uniform(1.5, 3.0))


def _squiggle(rng: np.random.Generator) -> Outline:
    half = rng.uniform(12, 40)
    x = np.linspace(-half, half, 40)
    waves = rng.uniform(1.0, 2.5)
    y = rng.uniform(0.15, 0.3) * half * np.sin(x / half * np.pi * waves + rng.uniform(0, 6))
    return Outline([np.stack([x, y], axis=1)], stroke=rng.uniform(1.5, 3.0))


_LETTERS = [
    np.array(points, dtype=float)
    for points in (
        [[-0.5, -1], [-0.5, 1], [0.6, 1]],  # L
        [[-0.7, -1], [0, 1], [0.7, -1]],  # V
        [[-0.6, -1], [0.6, -1], [-0.6, 1], [0.6, 1]],  # Z
        [[-0.6, 1], [-0.6, -1], [0.6, 1], [0.6, -1]],  # N
        [[-1, -1], [-0.5, 1], [0, -0.4], [0.5, 1], [1, -1]],  # W
        [[-0.6, -1], [-0.6, 1], [0.6, 1], [0.6, -1]],  # U
    )
]


def _letter(rng: np.random.Generator) -> Outline:
    half = rng.uniform(6, 16)
    points = _LETTERS[rng.integers(len(_LETTERS))] * half
    return Outline([points], stroke=half * rng.uniform(0.2, 0.3))


def _ellipse(rng: np.random.Generator) -> Outline:
    # Far thinner than the most squeezed disc, so that it cannot pass for one.
    half = rng.uniform(8, 30)
    return Outline([_circle(half) * [1.0, rng.uniform(0.15, 0.28)]])


def _blob(rng: np.random.Generator) -> Outline:
    # Three uneven bumps make it lumpy: a rounder blob would be a disc.
    half = rng.uniform(8, 24)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = 1 + 0.32 * np.cos(2 * angles + rng.uniform(0, 6))
    radii += rng.uniform(0.2, 0.3) * np.cos(3 * angles + rng.uniform(0, 6))
    radii += 0.12 * np.cos(5 * angles + rng.uniform(0, 6))
    return Outline([_polar(angles, half * radii / 1.5)])


_DISTRACTORS = (_line, _squiggle, _letter, _ellipse, _blob)


def distractor_outline(rng: np.random.Generator) -> Outline:
    """Something that belongs to no class, rotated at random, around the origin."""
    outline = _DISTRACTORS[rng.integers(len(_DISTRACTORS))](rng)
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    return Outline([contour @ turn for contour in outline.contours], outline.stroke)


# Textures ------------------------------------------------------------------------------------


def _ramp(height: int, width: int, angle: float) -> np.ndarray:
    """Distance in pixels from the patch centre along a direction, float32 ``(H, W)``."""
    y = np.arange(height, dtype=np.float32)[:, None] - height / 2
    x = np.arange(width, dtype=np.float32)[None, :] - width / 2
    return x * math.cos(angle) + y * math.sin(angle)


def _plain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return np.zeros((height, width), np.float32)


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _ramp(height, width, rng.uniform(0, 2 * np.pi))
    return ramp / np.abs(ramp).max()


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    cells = int(rng.integers(3, 8))
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _square_wave(ramp: np.ndarray, period: float, phase: float) -> np.ndarray:
    """A wave in [-1, 1] along ``ramp`` with edges soft over about a pixel."""
    return np.clip(np.sin(ramp * (2 * math.pi / period) + phase) * (period / 4), -1, 1)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    ramp = _ramp(height, width, rng.uniform(0, 2 * np.pi))
    return _square_wave(ramp, rng.uniform(5, 20), rng.uniform(0, 6))


def _checks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(7, 20)
    along = _square_wave(_ramp(height, width, angle), period, rng.uniform(0, 6))
    across = _square_wave(_ramp(height, width, angle + np.pi / 2), period, rng.uniform(0, 6))
    return along * across


def _speckle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = rng.standard_normal((height, width), dtype=np.float32)
    sigma = rng.uniform(0.5, 1.2)
    # The factor undoes the loss of variance by the blur, so all grain sizes are as strong.
    return np.clip(cv2.GaussianBlur(noise, (0, 0), sigma) * (2 * sigma), -1, 1)


_TEXTURES = (_gradient, _clouds, _stripes, _checks, _speckle)


def texture_field(rng: np.random.Generator, height: int, width: int, plain: float) -> np.ndarray:
    """A random pattern.

    Args:
        rng: Source of randomness.
        height: Rows.
        width: Columns.
        plain: Probability that there is no pattern at all.

    Returns:
        float32 ``(height, width)``, about -1..1 with mean near 0.
    """
    kind = _plain if rng.random() < plain else _TEXTURES[rng.integers(len(_TEXTURES))]
    return kind(rng, height, width)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour, float32 ``(3,)``, away from pure black and white."""
    return rng.uniform(25, 230, 3).astype(np.float32)


def _muted_colour(rng: np.random.Generator) -> np.ndarray:
    """A random greyish RGB colour, float32 ``(3,)``, for backgrounds."""
    return (rng.uniform(50, 205) + rng.uniform(-25, 25, 3)).astype(np.float32)


def _class_colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """A random RGB colour, float32 ``(3,)``, about the hue of a class."""
    hue = (label / len(CLASSES) + rng.normal(0, 0.02)) % 1
    return np.float32(hsv_to_rgb(hue, rng.uniform(0.65, 1), rng.uniform(0.6, 0.9))) * 255


def _paint(colour: np.ndarray, pattern: np.ndarray, swing: np.ndarray) -> np.ndarray:
    """Image ``(H, W, 3)`` of ``colour`` varied by ``swing`` (RGB) along ``pattern``."""
    return colour + pattern[..., None] * swing


def _swing(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """RGB amplitude of a texture, float32 ``(3,)``: mostly brightness, with some tint."""
    tint = rng.uniform(0.4, 1.0, 3)
    return (tint / np.linalg.norm(tint) * rng.uniform(low, high)).astype(np.float32)


# Scenes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patch:
    """Pixel coverage of a placed outline, cut to the image.

    Attributes:
        rows: Rows of the image it covers.
        columns: Columns of the image it covers.
        alpha: Coverage 0..1, float32 ``(rows, columns)``.
        pixels: Pixels of the whole element, parts outside the image included.
    """

    rows: slice
    columns: slice
    alpha: np.ndarray
    pixels: int

    @property
    def mask(self) -> np.ndarray:
        return self.alpha >= 0.5


def _rasterise(outline: Outline, x: float, y: float, width: int, height: int) -> _Patch:
    """Coverage of ``outline`` centred on ``(x, y)`` in an image of ``width`` x ``height``."""
    placed = [contour + np.array([x, y]) for contour in outline.contours]
    points = np.concatenate(placed)
    margin = 1 + (outline.stroke or 0.0)
    left, top = np.floor(points.min(axis=0) - margin).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + margin).astype(int)
    canvas = np.zeros(((bottom - top) * SUPERSAMPLE, (right - left) * SUPERSAMPLE), np.uint8)
    # OpenCV puts integers on pixel centres (hence the half) and takes 4 fractional bits.
    contours = [
        np.round(((contour - np.array([left, top])) * SUPERSAMPLE - 0.5) * 16).astype(np.int32)
        for contour in placed
    ]
    if outline.stroke is None:
        cv2.fillPoly(canvas, contours, 255, shift=4)
    else:
        thickness = max(1, round(outline.stroke * SUPERSAMPLE))
        cv2.polylines(canvas, contours, False, 255, thickness, shift=4)
    shape = (int(right - left), int(bottom - top))
    alpha = cv2.resize(canvas, shape, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    inside = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return _Patch(rows, columns, inside, int((alpha >= 0.5).sum()))


class _Painter:
    """A picture being painted from back to front.

    ``owner`` holds for every pixel which element shows there: 0 is the background, ``k + 1`` the
    ``k``-th element. It tells what a new element would hide and, at the end, all visible masks.
    """

    def __init__(self, rng: np.random.Generator, spec: ShapesSpec) -> None:
        self.rng = rng
        self.spec = spec
        width, height = spec.size
        pattern = texture_field(rng, height, width, plain=0.0)
        self.image = _paint(_muted_colour(rng), pattern, _swing(rng, 20, 45) * spec.texture)
        self.owner = np.zeros((height, width), np.int32)
        self.pixels: list[int] = []
        self.visible: list[int] = []
        self.labels: list[int | None] = []
        self.sizes: list[float] = []

    def add(self, outline: Outline, label: int | None, size: float) -> None:
        """Paint an element at a random place where it fits, or leave it out.

        Only the place is tried again, never class or size, so that crowded scenes do not change
        how often each of those occurs any more than they must.

        Args:
            outline: What to paint.
            label: Index into :data:`CLASSES`, or ``None`` for a distractor.
            size: Longer side in pixels (0 for a distractor).
        """
        width, height = self.spec.size
        margin = 0.0 if label is None else (1 - self.spec.spread) / 2
        low, high = margin, 1 - margin
        for _ in range(PLACEMENT_TRIES):
            x = self.rng.uniform(low * width, high * width)
            y = self.rng.uniform(low * height, high * height)
            patch = _rasterise(outline, x, y, width, height)
            if self._fits(patch, label):
                self._paint(patch, label)
                self._own(patch)
                self.labels.append(label)
                self.sizes.append(size)
                return

    def _enough(self, visible: int, whole: int, label: int | None) -> bool:
        """Whether an element of ``whole`` pixels may show only ``visible`` of them."""
        hidden = MAX_DISTRACTOR_OCCLUSION if label is None else self.spec.max_occlusion
        return visible >= max((1 - hidden) * whole, MIN_VISIBLE_PX)

    def _fits(self, patch: _Patch, label: int | None) -> bool:
        """Whether the element and all it would cover stay visible enough."""
        mask = patch.mask
        if not self._enough(int(mask.sum()), patch.pixels, label):
            return False
        covered = np.bincount(self.owner[patch.rows, patch.columns][mask], minlength=1)
        for k in np.flatnonzero(covered[1:]):
            # Two crossing strokes could pass for a cross.
            if label is None and self.labels[k] is None:
                return False
            visible = self.visible[k] - int(covered[k + 1])
            if not self._enough(visible, self.pixels[k], self.labels[k]):
                return False
        return True

    def _paint(self, patch: _Patch, label: int | None) -> None:
        height, width = patch.alpha.shape
        below = self.image[patch.rows, patch.columns]
        pattern = texture_field(self.rng, height, width, plain=0.3)
        swing = _swing(self.rng, 20, 60) * self.spec.texture
        if label is not None and self.rng.random() < self.spec.class_colour:
            colour = _class_colour(self.rng, label)
        else:
            colour = self._contrasting_colour(below, patch.mask)
        fill = _paint(colour, pattern, swing)
        below += (fill - below) * patch.alpha[..., None]

    def _own(self, patch: _Patch) -> None:
        """Give the pixels of a new element to it."""
        mask = patch.mask
        owner = self.owner[patch.rows, patch.columns]
        covered = np.bincount(owner[mask], minlength=1)
        for k in np.flatnonzero(covered[1:]):
            self.visible[k] -= int(covered[k + 1])
        self.pixels.append(patch.pixels)
        self.visible.append(int(mask.sum()))
        owner[mask] = len(self.pixels)

    def _contrasting_colour(self, below: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """A random colour that stands out from nearly all of the pixels it borders on.

        Args:
            below: Current picture under the patch, ``(H, W, 3)``.
            mask: Pixels to be painted, bool ``(H, W)``.

        Returns:
            RGB, float32 ``(3,)``.
        """
        edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))
        around = below[edge.astype(bool)]
        best, best_share = _colour(self.rng), -1.0
        for _ in range(20):
            colour = _colour(self.rng)
            share = np.mean(((around - colour) ** 2).sum(axis=1) >= self.spec.contrast**2)
            if share >= 0.9:
                return colour
            if share > best_share:
                best, best_share = colour, share
        return best

    def finish(self) -> Scene:
        """The scene with the slight blur and noise of a camera."""
        image = self.image
        sigma = self.rng.uniform(0.0, 0.7)
        if sigma > 0.2:
            image = cv2.GaussianBlur(image, (0, 0), sigma)
        noise = self.rng.standard_normal(image.shape, dtype=np.float32)
        noise *= self.rng.uniform(2, 7)
        noise += image
        image = np.clip(noise, 0, 255, out=noise).astype(np.uint8)
        instances, distractors = [], []
        for k, label in enumerate(self.labels):
            mask = self.owner == k + 1
            if label is None:
                distractors.append(mask)
            else:
                hidden = 1 - self.visible[k] / self.pixels[k]
                instances.append(Instance(label, mask, self.sizes[k], hidden))
        return Scene(image, instances, distractors)


def _shape_side(rng: np.random.Generator, spec: ShapesSpec) -> float:
    """Longer side in pixels of a new shape, drawn from the spec's size distribution."""
    low, high = spec.shape_size
    return float(low * (high / low) ** (rng.random() ** (1 / spec.large_bias)))


def render_scene(rng: np.random.Generator, spec: ShapesSpec, label: int | None = None) -> Scene:
    """Draw one random scene.

    No shape shows less than the spec allows: one that would, or that would hide too much of
    another, is placed elsewhere or left out. So every class object to be seen is annotated.

    Args:
        rng: Source of all randomness.
        spec: What the scene looks like.
        label: Class of all its shapes. Defaults to None, each shape has one of its own.

    Returns:
        The scene, of ``spec.size``.
    """
    painter = _Painter(rng, spec)
    shapes = int(rng.integers(spec.objects[0], spec.objects[1] + 1))
    distractors = int(rng.integers(spec.distractors[0], spec.distractors[1] + 1))
    # Shuffled, so that distractors lie behind as well as in front of shapes.
    for is_shape in rng.permutation([True] * shapes + [False] * distractors):
        if is_shape:
            own, side = int(rng.integers(len(CLASSES))), _shape_side(rng, spec)
            own = own if label is None else label
            painter.add(shape_outline(rng, own, side), own, side)
        else:
            painter.add(distractor_outline(rng), None, 0.0)
    return painter.finish()


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one image of a data set.

    It depends on nothing else, so image ``index`` is the same however many images are made and in
    whatever order, and no two splits share a stream.

    Args:
        seed: Seed of the data set, >= 0.
        split: One of :data:`SPLITS`.
        index: Number of the image in its split.
    """
    key = (SPLITS.index(split), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class Scenes:
    """The first scenes of a split: a sequence, each drawn when it is asked for.

    Attributes:
        spec: What the scenes look like.
        seed: Seed of the data set, >= 0.
        split: One of :data:`SPLITS`.
        count: Number of scenes.
    """

    spec: ShapesSpec
    seed: int
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f'scene {index} of {self.count}')
        return self.draw(index)

    def draw(self, index: int) -> Scene:
        """Draw scene ``index``, whatever the count."""
        return render_scene(scene_rng(self.seed, self.split, index), self.spec)


@dataclass(frozen=True)
class SingleScenes(Scenes):
    """Scenes of one shape each; the classes take turns.

    Raises:
        ValueError: If ``spec.objects`` is not (1, 1).
    """

    def __post_init__(self) -> None:
        """Check that every image has one class."""
        objects = self.spec.objects
        if objects != (1, 1):
            raise ValueError(f'objects must be 1 1: an image has one class, not {objects} shapes')

    def draw(self, index: int) -> Scene:
        """Draw scene ``index``, whatever the count."""
        rng, label = scene_rng(self.seed, self.split, index), index % len(CLASSES)
        scene = render_scene(rng, self.spec, label)
        while not scene.instances:  # a distractor was in the way
            scene = render_scene(rng, self.spec, label)
        return scene


def tight_box(mask: np.ndarray) -> list[int]:
    """Tight box ``[x, y, width, height]`` of a mask in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


# Preview ---------------------------------------------------------------------------------------


def preview(scene_list: list[Scene], columns: int = 4, zoom: int = 2) -> np.ndarray:
    """A contact sheet of scenes with outlines and class names drawn in.

    Args:
        scene_list: Scenes of one size.
        columns: Scenes per row.
        zoom: Enlargement.

    Returns:
        RGB, uint8, ``(rows * (H * zoom + 4), columns * (W * zoom + 4), 3)``.
    """
    panels = [np.pad(_annotated(scene, zoom), ((2, 2), (2, 2), (0, 0))) for scene in scene_list]
    while len(panels) % columns:
        panels.append(np.zeros_like(panels[0]))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def _annotated(scene: Scene, zoom: int) -> np.ndarray:
    """The enlarged image with every visible mask outlined and named."""
    image = cv2.resize(scene.image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    for instance in scene.instances:
        mask = cv2.resize(instance.mask.astype(np.uint8), None, fx=zoom, fy=zoom, interpolation=0)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, (255, 255, 255), 1)
        x, y = tight_box(instance.mask)[:2]
        place = (x * zoom, max(y * zoom - 3, 10))
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(
                image, CLASSES[instance.label], place, 0, 0.4, colour, thickness, cv2.LINE_AA
            )
    return image
