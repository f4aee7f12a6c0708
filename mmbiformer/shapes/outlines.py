"""Outlines of the shapes, and of the distractors that belong to no class.

Continuous coordinates put the centre of pixel ``(row i, column j)`` at ``(x, y) = (j + 0.5,
i + 0.5)``. Lengths are in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from .spec import CLASSES

SUPERSAMPLE = 4
"""Subpixels per pixel side when an outline becomes pixel coverage."""


@dataclass(frozen=True)
class Outline:
    """Geometry of one element before it has a place.

    Attributes:
        contours: Point lists ``(N, 2)`` as ``(x, y)`` around the origin. Closed contours are
            filled by the even-odd rule, so a contour within another is a hole.
        stroke: Line width in pixels for open lines, or ``None`` for closed contours.
    """

    contours: list[np.ndarray]
    stroke: float | None = None


@dataclass(frozen=True)
class Patch:
    """Pixel coverage of a placed outline, cut to the image.

    Attributes:
        rows: Rows of the image that it covers.
        columns: Columns of the image that it covers.
        alpha: Coverage 0..1, float32 ``(rows, columns)``.
        pixels: Pixels of the whole element, parts outside the image included.
    """

    rows: slice
    columns: slice
    alpha: np.ndarray
    pixels: int

    @property
    def mask(self) -> np.ndarray:
        """Pixels that are covered by half or more, bool ``(rows, columns)``."""
        return self.alpha >= 0.5


def rasterise(outline: Outline, x: float, y: float, width: int, height: int) -> Patch:
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
    return Patch(rows, columns, inside, int((alpha >= 0.5).sum()))


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
    """A shape of class ``label``, squeezed a little and rotated at random.

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
    # It is far thinner than the most squeezed disc, so that it cannot pass for one.
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
    """An element that belongs to no class, rotated at random around the origin."""
    outline = _DISTRACTORS[rng.integers(len(_DISTRACTORS))](rng)
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    return Outline([contour @ turn for contour in outline.contours], outline.stroke)
