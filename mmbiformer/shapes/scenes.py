"""Synthetic scenes of simple shapes with exact instance masks.

They replace a download where a small but real vision task is needed: textured shapes of several
classes on textured backgrounds. The shapes are rotated and hide one another, among strokes and
blobs that belong to no class. Each image follows from a seed and needs no external files.

:func:`render_scene` turns a random generator and a :class:`ShapesSpec` into a :class:`Scene`.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import UserError
from .outlines import Outline, Patch, distractor_outline, rasterise, shape_outline
from .spec import CLASSES, SPLITS, ShapesSpec
from .textures import class_colour, contrasting_colour, muted_colour, paint, swing, texture_field

MIN_VISIBLE_PX = 20
"""A shape that shows fewer pixels than this is left out, whatever the spec."""

MAX_DISTRACTOR_OCCLUSION = 0.3
"""Largest hidden fraction of a distractor: a single lobe of a blob could pass for a disc."""

PLACEMENT_TRIES = 30
"""Positions tried for one shape or distractor before it is left out."""


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


class _Painter:
    """A picture that is painted from back to front.

    ``owner`` says for every pixel which element shows there: 0 is the background, ``k + 1`` the
    ``k``-th element. It tells what a new element would hide and, at the end, all visible masks.
    """

    def __init__(self, rng: np.random.Generator, spec: ShapesSpec) -> None:
        self.rng = rng
        self.spec = spec
        width, height = spec.size
        pattern = texture_field(rng, height, width, plain=0.0)
        self.image = paint(muted_colour(rng), pattern, swing(rng, 20, 45) * spec.texture)
        self.owner = np.zeros((height, width), np.int32)
        self.pixels: list[int] = []
        self.visible: list[int] = []
        self.labels: list[int | None] = []
        self.sizes: list[float] = []

    def add(self, outline: Outline, label: int | None, size: float) -> None:
        """Paint an element at a random place where it fits, or leave it out.

        Only the place is tried again. Another class or size at each try would make large shapes
        rarer in crowded scenes.

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
            patch = rasterise(outline, x, y, width, height)
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

    def _fits(self, patch: Patch, label: int | None) -> bool:
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

    def _paint(self, patch: Patch, label: int | None) -> None:
        height, width = patch.alpha.shape
        below = self.image[patch.rows, patch.columns]
        pattern = texture_field(self.rng, height, width, plain=0.3)
        amplitude = swing(self.rng, 20, 60) * self.spec.texture
        if label is not None and self.rng.random() < self.spec.class_colour:
            colour = class_colour(self.rng, label)
        else:
            colour = contrasting_colour(self.rng, below, patch.mask, self.spec.contrast)
        fill = paint(colour, pattern, amplitude)
        below += (fill - below) * patch.alpha[..., None]

    def _own(self, patch: Patch) -> None:
        """Give the pixels of a new element to it."""
        mask = patch.mask
        owner = self.owner[patch.rows, patch.columns]
        covered = np.bincount(owner[mask], minlength=1)
        for k in np.flatnonzero(covered[1:]):
            self.visible[k] -= int(covered[k + 1])
        self.pixels.append(patch.pixels)
        self.visible.append(int(mask.sum()))
        owner[mask] = len(self.pixels)

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

    A shape that would show less than the spec allows, or would hide too much of another, is placed
    elsewhere or left out. So every shape that can be seen is annotated.

    Args:
        rng: Source of all randomness.
        spec: What the scene looks like.
        label: Class of all shapes. Defaults to None: each shape has its own.

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
    """The random generator of one image of a data set.

    It depends on nothing but the arguments: image ``index`` is the same in a larger set and in any
    order of drawing, and the splits share no stream.

    Args:
        seed: Seed of the data set, >= 0.
        split: One of :data:`SPLITS`.
        index: Number of the image in its split.
    """
    key = (SPLITS.index(split), index)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@dataclass(frozen=True)
class Scenes:
    """The first scenes of a split: a sequence that draws a scene when it is asked for.

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
        UserError: If ``spec.objects`` is not (1, 1).
    """

    def __post_init__(self) -> None:
        """Check that every image has one class."""
        objects = self.spec.objects
        if objects != (1, 1):
            raise UserError(f'objects must be 1 1: an image has one class; got {objects}')

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
