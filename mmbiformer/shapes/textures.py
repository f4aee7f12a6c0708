"""Colours and patterns: what fills the background and the shapes.

Colours are RGB in 0..255.
"""

import math
from colorsys import hsv_to_rgb

import cv2
import numpy as np

from .spec import CLASSES


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
    """A wave in [-1, 1] along ``ramp``, with edges soft over about a pixel."""
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
    # Blurring lowers the variance; the factor makes all grain sizes equally strong.
    return np.clip(cv2.GaussianBlur(noise, (0, 0), sigma) * (2 * sigma), -1, 1)


_TEXTURES = (_gradient, _clouds, _stripes, _checks, _speckle)


def texture_field(rng: np.random.Generator, height: int, width: int, plain: float) -> np.ndarray:
    """A random pattern.

    Args:
        rng: Source of randomness.
        height: Rows.
        width: Columns.
        plain: Probability of no pattern.

    Returns:
        float32 ``(height, width)``, about -1..1 with mean near 0.
    """
    kind = _plain if rng.random() < plain else _TEXTURES[rng.integers(len(_TEXTURES))]
    return kind(rng, height, width)


def any_colour(rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour, float32 ``(3,)``, away from pure black and white."""
    return rng.uniform(25, 230, 3).astype(np.float32)


def muted_colour(rng: np.random.Generator) -> np.ndarray:
    """A random greyish RGB colour, float32 ``(3,)``, for backgrounds."""
    return (rng.uniform(50, 205) + rng.uniform(-25, 25, 3)).astype(np.float32)


def class_colour(rng: np.random.Generator, label: int) -> np.ndarray:
    """A random RGB colour, float32 ``(3,)``, about the hue of a class."""
    hue = (label / len(CLASSES) + rng.normal(0, 0.02)) % 1
    return np.float32(hsv_to_rgb(hue, rng.uniform(0.65, 1), rng.uniform(0.6, 0.9))) * 255


def contrasting_colour(
    rng: np.random.Generator, below: np.ndarray, mask: np.ndarray, contrast: float
) -> np.ndarray:
    """A random colour that stands out from nearly all of the pixels that it borders on.

    Args:
        rng: Source of randomness.
        below: Current picture under the patch, ``(H, W, 3)``.
        mask: Pixels to be painted, bool ``(H, W)``.
        contrast: Smallest RGB distance to the pixels of the border.

    Returns:
        RGB, float32 ``(3,)``.
    """
    edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))
    around = below[edge.astype(bool)]
    best, best_share = any_colour(rng), -1.0
    for _ in range(20):
        colour = any_colour(rng)
        share = np.mean(((around - colour) ** 2).sum(axis=1) >= contrast**2)
        if share >= 0.9:
            return colour
        if share > best_share:
            best, best_share = colour, share
    return best


def swing(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """RGB amplitude of a texture, float32 ``(3,)``: mostly brightness, with some tint."""
    tint = rng.uniform(0.4, 1.0, 3)
    return (tint / np.linalg.norm(tint) * rng.uniform(low, high)).astype(np.float32)


def paint(colour: np.ndarray, pattern: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """Image ``(H, W, 3)`` of ``colour``, varied by ``amplitude`` (RGB) along ``pattern``."""
    return colour + pattern[..., None] * amplitude
