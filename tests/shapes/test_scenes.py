"""The scenes: what they show follows from the seed and keeps to the spec."""

from dataclasses import replace

import numpy as np
import pytest

from mmbiformer.errors import UserError
from mmbiformer.shapes import CLASSES, FORMATS, Scenes, ShapesSpec, SingleScenes, render_scene
from mmbiformer.shapes.outlines import shape_outline
from mmbiformer.shapes.scenes import MIN_VISIBLE_PX, scene_rng

SPEC = ShapesSpec()


@pytest.fixture(scope='module')
def scenes():
    """Enough scenes for statistics."""
    return list(Scenes(SPEC, 3, 'train', 60))


def side(mask):
    rows, columns = np.nonzero(mask)
    return max(np.ptp(rows), np.ptp(columns)) + 1


def test_scene_follows_from_seed():
    """The same random generator gives the same scene; another index, split or seed another."""
    first, again = (render_scene(scene_rng(0, 'train', 5), SPEC) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    for one, other in zip(first.instances, again.instances, strict=True):
        assert one.label == other.label
        assert np.array_equal(one.mask, other.mask)
    for rng in (scene_rng(0, 'train', 6), scene_rng(0, 'val', 5), scene_rng(1, 'train', 5)):
        assert not np.array_equal(first.image, render_scene(rng, SPEC).image)


def test_scene_layout(scenes):
    """Images and masks have the documented types, and masks do not overlap."""
    width, height = SPEC.size
    for scene in scenes:
        assert (scene.image.shape, scene.image.dtype) == ((height, width, 3), np.uint8)
        masks = [instance.mask for instance in scene.instances] + scene.distractors
        assert all((mask.shape, mask.dtype) == ((height, width), bool) for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1
        assert len(scene.instances) <= SPEC.objects[1]
        assert len(scene.distractors) <= SPEC.distractors[1]


def test_instances(scenes):
    """Sizes spread over the spec's range, occlusion keeps to it, classes are equally frequent."""
    instances = [instance for scene in scenes for instance in scene.instances]
    assert all(side(instance.mask) <= instance.size + 2 for instance in instances)
    low, high = SPEC.shape_size
    sizes = [instance.size for instance in instances]
    assert low <= min(sizes) < 2 * low and high / 2 < max(sizes) <= high
    hidden = np.array([instance.occlusion for instance in instances])
    assert hidden.min() >= 0 and hidden.max() <= SPEC.max_occlusion
    assert 0.2 < np.mean(hidden > 0.05) < 0.8
    assert min(instance.mask.sum() for instance in instances) >= MIN_VISIBLE_PX
    counts = np.bincount([instance.label for instance in instances])
    assert len(counts) == len(CLASSES) and counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize('label', range(len(CLASSES)))
def test_shape_outline(label):
    """Outlines have the size asked for, and only rings have a hole."""
    for size in (8.0, 30.0, 80.0):
        outline = shape_outline(np.random.default_rng(label), label, size)
        assert np.ptp(np.concatenate(outline.contours), axis=0).max() == pytest.approx(size)
        assert (len(outline.contours) == 2) == (CLASSES[label] == 'ring')


def test_shapes_stand_out():
    """Without textures a shape differs from its surroundings by the contrast asked for."""
    spec = replace(SPEC, texture=0.0, objects=(1, 1), distractors=(0, 0), contrast=80.0)
    for scene in Scenes(spec, 3, 'train', 10):
        mask = scene.instances[0].mask
        inside, outside = (np.median(scene.image[part], axis=0) for part in (mask, ~mask))
        assert np.linalg.norm(inside - outside) > 70


def test_single_scenes_have_their_shape():
    """Whatever is in the way, every image shows one shape, and the classes take turns."""
    spec = replace(FORMATS['imagenet'].spec, spread=0.0, distractors=(4, 8))
    labels = [[one.label for one in scene.instances] for scene in SingleScenes(spec, 0, 'val', 8)]
    assert labels == [[k % 7] for k in range(8)]


@pytest.mark.parametrize(
    'wrong',
    [
        {'objects': (5, 2)},
        {'shape_size': (2, 40)},
        {'texture': float('nan')},
    ],
)
def test_wrong_spec(wrong):
    with pytest.raises(UserError, match=f'{next(iter(wrong))} must be'):
        ShapesSpec(**wrong)
