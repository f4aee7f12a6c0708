"""Corruptions made on the fly: all fifteen work, and repeat themselves."""

import numpy as np
import pytest

from mmbiformer.datasets import Corrupt
from mmbiformer.errors import UserError
from mmbiformer.evaluation.robustness import CORRUPTIONS

pytest.importorskip('imagecorruptions')
Y, X = np.mgrid[:64, :80]
IMAGE = np.stack([X * 3, Y * 3, 120 + 80 * np.sin(X / 5) * np.cos(Y / 7)], -1).astype(np.uint8)


def corrupted(name, severity=3, path='n01/a.JPEG', seed=0):
    return Corrupt(name, severity, seed).transform(dict(img=IMAGE.copy(), img_path=path))['img']


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_each_is_seeded_by_its_image(name):
    np.random.seed(0)
    first = corrupted(name)
    after = np.random.rand()
    np.random.seed(5)
    assert np.array_equal(corrupted(name, path='/elsewhere/n01/a.JPEG'), first)
    np.random.seed(0)
    assert np.random.rand() == after  # the random numbers of others are as they were
    assert first.shape == IMAGE.shape and first.dtype == np.uint8
    assert not np.array_equal(first, IMAGE)
    drawn = name not in (
        *('defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression'),
    )
    assert drawn == (not np.array_equal(corrupted(name, path='n01/b.JPEG'), first))
    assert drawn == (not np.array_equal(corrupted(name, seed=1), first))


# Which picture of frost is laid over an image matters more than how much of it.
@pytest.mark.parametrize('name', [name for name in CORRUPTIONS if name != 'frost'])
def test_severity_grows(name):
    def distance(severity):
        return np.abs(corrupted(name, severity).astype(int) - IMAGE).mean()

    assert 0 < distance(1) < distance(5)


def test_colours_are_in_the_order_of_the_hosts():
    """Frost is bluish: the blue channel, BGR's first, rises most in a black image."""
    black = dict(img=np.zeros((224, 224, 3), np.uint8), img_path='a')
    frost = Corrupt('frost', 5).transform(black)['img'].mean((0, 1))
    assert frost[0] > frost[2]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="corruption='rain', severity=1: known are gaussian_noise"):
        Corrupt('rain', 1)
    with pytest.raises(UserError, match='severity=6'):
        Corrupt('fog', 6)
    with pytest.raises(UserError, match='need 32 a side'):
        Corrupt('fog', 1).transform(dict(img=IMAGE[:20]))
