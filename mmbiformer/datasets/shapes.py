"""Synthetic scenes of simple shapes with exact instance masks, and a COCO writer for them.

The set replaces a download wherever a small but real detection task is needed: textured shapes of
several classes over textured backgrounds, rotated, hiding one another, among strokes and blobs
that belong to no class. It needs no external files and every image follows from a seed.

The module has two halves. :func:`render_scene` turns a random generator and a :class:`ShapesSpec`
into a :class:`Scene` and knows nothing of file formats. :func:`write_coco` and :func:`make_shapes`
turn scenes into a COCO instances data set on disk.

Throughout, continuous coordinates put the centre of pixel ``(row i, column j)`` at
``(x, y) = (j + 0.5, i + 0.5)``, lengths are in pixels and colours are RGB in 0..255.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

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
        default=3.0,
        metadata={'help': 'size distribution: 1 is log-uniform, above 1 favours large shapes'},
    )
    max_occlusion: float = field(
        default=0.65,
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
        if self.large_bias <= 0:
            raise ValueError('large_bias must be positive')
        if not 0 <= self.max_occlusion < 1:
            raise ValueError('max_occlusion must be in [0, 1)')


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
        for _ in range(PLACEMENT_TRIES):
            x, y = self.rng.uniform(0, width), self.rng.uniform(0, height)
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


def render_scene(rng: np.random.Generator, spec: ShapesSpec) -> Scene:
    """Draw one random scene.

    No shape shows less than the spec allows: one that would, or that would hide too much of
    another, is placed elsewhere or left out. So every class object to be seen is annotated.

    Args:
        rng: Source of all randomness.
        spec: What the scene looks like.

    Returns:
        The scene, of ``spec.size``.
    """
    painter = _Painter(rng, spec)
    shapes = int(rng.integers(spec.objects[0], spec.objects[1] + 1))
    distractors = int(rng.integers(spec.distractors[0], spec.distractors[1] + 1))
    # Shuffled, so that distractors lie behind as well as in front of shapes.
    for is_shape in rng.permutation([True] * shapes + [False] * distractors):
        if is_shape:
            label, side = int(rng.integers(len(CLASSES))), _shape_side(rng, spec)
            painter.add(shape_outline(rng, label, side), label, side)
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


def scenes(spec: ShapesSpec, seed: int, split: str, count: int) -> Iterator[Scene]:
    """The first ``count`` scenes of a split."""
    for index in range(count):
        yield render_scene(scene_rng(seed, split, index), spec)


# COCO ----------------------------------------------------------------------------------------

MIN_POLYGON_IOU = 0.9
"""A polygon that gives back the mask less well than this is replaced by run lengths."""

POLYGON_TOLERANCE = 0.5
"""How far in pixels a polygon may leave the mask's outline to have fewer points."""


def _outline_polygon(mask: np.ndarray) -> list[float] | None:
    """Outline of a mask as ``[x0, y0, x1, y1, ...]``, ``None`` if it is not a single loop."""
    x, y, width, height = _box(mask)
    crop = mask[y : y + height, x : x + width].astype(np.uint8)
    # Enlarged, because OpenCV's contours run through pixel centres, which would lose a margin of
    # half a pixel all around.
    zoom = 4
    large = cv2.resize(crop, (width * zoom, height * zoom), interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) != 1:
        return None
    contour = cv2.approxPolyDP(contours[0], POLYGON_TOLERANCE * zoom, True)
    if len(contour) < 3:
        return None
    points = (contour.reshape(-1, 2) + 0.5) / zoom + np.array([x, y])
    return [round(value, 2) for value in points.ravel().tolist()]


def coco_segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """COCO ``segmentation`` of a mask.

    Args:
        mask: Visible pixels, bool, ``(H, W)``.

    Returns:
        One polygon where that is faithful; for masks with holes, of several parts or too small
        for a polygon, compressed run lengths, which are exact.
    """
    # Imported here: drawing scenes must not need the COCO tools.
    from pycocotools import mask as coco_mask

    exact = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    polygon = _outline_polygon(mask)
    if polygon is not None:
        drawn = coco_mask.frPyObjects([polygon], *mask.shape)
        if coco_mask.iou(drawn, [exact], [0])[0, 0] >= MIN_POLYGON_IOU:
            return [polygon]
    return {'size': list(mask.shape), 'counts': exact['counts'].decode('ascii')}


def _box(mask: np.ndarray) -> list[int]:
    """Tight box ``[x, y, width, height]`` of a mask in pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def coco_annotation(instance: Instance, image_id: int, annotation_id: int) -> dict:
    """COCO annotation of an instance.

    Besides the standard keys it has the instance's ``size`` and ``occlusion``, which readers of
    COCO files ignore.
    """
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': instance.label + 1,
        'bbox': _box(instance.mask),
        'area': int(instance.mask.sum()),
        'iscrowd': 0,
        'segmentation': coco_segmentation(instance.mask),
        'size': round(instance.size, 2),
        'occlusion': round(instance.occlusion, 4),
    }


def write_coco(split_scenes: Iterable[Scene], out: Path, split: str) -> None:
    """Write scenes as one split of a COCO instances data set.

    Images go to ``OUT/SPLIT/000000.jpg`` and on, annotations to
    ``OUT/annotations/instances_SPLIT.json``.

    Args:
        split_scenes: Scenes of the split; taken one at a time, so an iterator will do.
        out: Folder of the data set.
        split: Name of the split.
    """
    images, annotations = [], []
    (out / split).mkdir(parents=True, exist_ok=True)
    (out / 'annotations').mkdir(exist_ok=True)
    for image_id, scene in enumerate(split_scenes):
        name = f'{image_id:06d}.jpg'
        _write_image(out / split / name, scene.image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        height, width = scene.image.shape[:2]
        images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
        for instance in scene.instances:
            # Ids start at 1: COCOeval takes 0 for "no match".
            annotations.append(coco_annotation(instance, image_id, len(annotations) + 1))
    coco = {
        'info': {'description': f'{GENERATOR} {split}', 'version': str(VERSION)},
        'images': images,
        'annotations': annotations,
        'categories': [
            {'id': label + 1, 'name': name, 'supercategory': 'shape'}
            for label, name in enumerate(CLASSES)
        ],
    }
    path = out / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(coco), encoding='utf-8')


def _write_image(path: Path, image: np.ndarray, options: Iterable[int] = ()) -> None:
    """Write an RGB image; OpenCV itself only returns false when the disk is full."""
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), list(options)):
        raise OSError(f'could not write {path}')


# Data set folders ----------------------------------------------------------------------------

META = 'meta.json'
PARTIAL_META = 'meta.partial.json'
"""Name of the meta file until the set is complete."""


def _parameters(train: int, val: int, seed: int, spec: ShapesSpec) -> dict:
    """All that determines a data set, as it reads back from JSON."""
    if min(train, val, seed) < 0:
        raise ValueError('train, val and seed must not be negative')
    counts = {'train': train, 'val': val}
    meta = {'generator': GENERATOR, 'version': VERSION, 'seed': seed, **counts}
    return json.loads(json.dumps(meta | {'spec': asdict(spec)}))


def _own_meta(path: Path) -> dict | None:
    """Content of a meta file of this generator, ``None`` for anything else."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get('generator') == GENERATOR else None


def _has_all_files(out: Path, meta: dict) -> bool:
    """Whether the files that a complete set's meta file speaks of are still there."""
    return all(
        (out / 'annotations' / f'instances_{split}.json').is_file()
        and len(list((out / split).glob('*.jpg'))) == meta.get(split)
        for split in SPLITS
    )


def _needs_making(out: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether the set must be made; raises where a folder must not be touched.

    Args:
        out: Folder of the data set.
        wanted: Parameters of the set.
        overwrite: Whether a complete set of other parameters may be replaced.

    Raises:
        FileExistsError: The folder is not this generator's, or holds a complete set of other
            parameters and ``overwrite`` is false.
    """
    if not out.exists():
        return True
    if not out.is_dir():
        raise FileExistsError(f'{out} is not a folder')
    meta = _own_meta(out / META)
    if meta is not None and _has_all_files(out, meta):
        if meta == wanted:
            return False
        if not overwrite:
            raise FileExistsError(
                f'{out} holds a shapes data set made with other parameters or another version; '
                'choose another folder, or overwrite it (--overwrite)'
            )
    elif meta is None and _own_meta(out / PARTIAL_META) is None and any(out.iterdir()):
        raise FileExistsError(
            f'{out} is not empty and was not made by this generator: left as it is, '
            'choose another folder'
        )
    return True


def _clear(out: Path) -> None:
    """Remove what this generator made in a folder of its own, and nothing else."""
    for name in (*SPLITS, 'annotations'):
        if (out / name).exists():
            shutil.rmtree(out / name)


def make_shapes(
    out: str | os.PathLike,
    train: int = 400,
    val: int = 100,
    seed: int = 0,
    spec: ShapesSpec | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> bool:
    """Make a COCO instances data set of shapes, unless it is there already.

    A set that was left incomplete is made anew.

    Args:
        out: Folder of the data set.
        train: Number of training images.
        val: Number of validation images.
        seed: Seed of all images, >= 0.
        spec: What the images look like; the defaults if not given.
        overwrite: Replace a complete set made with other parameters.
        progress: Show a progress bar.

    Returns:
        Whether the set was made; false if the very same set was there already.

    Raises:
        ValueError: A number of images or the seed is negative.
        FileExistsError: The folder was not made by this generator, or holds a set made with other
            parameters and ``overwrite`` is false.
    """
    out, spec = Path(out), spec or ShapesSpec()
    wanted = _parameters(train, val, seed, spec)
    if not _needs_making(out, wanted, overwrite):
        return False
    out.mkdir(parents=True, exist_ok=True)
    # There is one meta file at any time, and it is the final one only while the set is complete:
    # that is how an interrupted run is recognised.
    if (out / META).exists():
        os.replace(out / META, out / PARTIAL_META)
    (out / PARTIAL_META).write_text(json.dumps(wanted, indent=2) + '\n', encoding='utf-8')
    _clear(out)
    for split, count in (('train', train), ('val', val)):
        made = scenes(spec, seed, split, count)
        bar = track(made, f'{split} images', total=count, disable=not progress)
        write_coco(bar, out, split)
    os.replace(out / PARTIAL_META, out / META)
    return True


# Summary and preview -------------------------------------------------------------------------

SIZE_BINS = (16, 32)
"""Edges in pixels between the small, medium and large shapes of the summary."""


def summarise(out: str | os.PathLike) -> dict[str, dict[str, float]]:
    """Numbers that describe a data set.

    Args:
        out: Folder of a complete data set.

    Returns:
        For each split a table row: numbers by name.
    """
    return {split: _summarise_split(Path(out), split) for split in SPLITS}


def _summarise_split(out: Path, split: str) -> dict[str, float]:
    path = out / 'annotations' / f'instances_{split}.json'
    coco = json.loads(path.read_text(encoding='utf-8'))
    annotations = coco['annotations']
    labels = Counter(annotation['category_id'] for annotation in annotations)
    sizes = np.array([annotation['size'] for annotation in annotations])
    occlusions = np.array([annotation['occlusion'] for annotation in annotations])
    bins = np.bincount(np.digitize(sizes, SIZE_BINS), minlength=3)
    images = max(len(coco['images']), 1)
    runs = sum(isinstance(annotation['segmentation'], dict) for annotation in annotations)

    def percent(part: float) -> float:
        return round(100 * float(part) / max(len(annotations), 1), 1)

    return {
        'images': len(coco['images']),
        'instances': len(annotations),
        'instances per image': round(len(annotations) / images, 1),
        **{category['name']: labels[category['id']] for category in coco['categories']},
        f'under {SIZE_BINS[0]} px (%)': percent(bins[0]),
        f'{SIZE_BINS[0]} to {SIZE_BINS[1]} px (%)': percent(bins[1]),
        f'over {SIZE_BINS[1]} px (%)': percent(bins[2]),
        'over 5 % hidden (%)': percent(np.count_nonzero(occlusions > 0.05)),
        'mean hidden part (%)': percent(occlusions.sum()),
        'run-length masks (%)': percent(runs),
    }


def format_summary(summary: dict[str, dict[str, float]]) -> str:
    """The summary as a text table: one row per number, one column per split."""
    splits = list(summary)
    lines = [f'{"":26}' + ''.join(f'{split:>10}' for split in splits)]
    for name in summary[splits[0]]:
        lines.append(f'{name:26}' + ''.join(f'{summary[split][name]:>10}' for split in splits))
    return '\n'.join(lines)


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
        x, y = _box(instance.mask)[:2]
        place = (x * zoom, max(y * zoom - 3, 10))
        for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
            cv2.putText(
                image, CLASSES[instance.label], place, 0, 0.4, colour, thickness, cv2.LINE_AA
            )
    return image


def write_preview(path: str | os.PathLike, spec: ShapesSpec, seed: int, count: int = 12) -> None:
    """Write a contact sheet of the first training scenes of a data set."""
    _write_image(Path(path), preview(list(scenes(spec, seed, 'train', count))))
