"""Label maps: what is read, and that a map stays where its image's content is."""

import io
import re

import cv2
import numpy as np
import pytest
import torch

from mmbiformer.datasets.label_maps import LabelMap, crop, flip, parse_label_map, unpack, warp
from mmbiformer.errors import UserError


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def example(height=18, width=18, classes=1000):
    scores = torch.rand(5, height, width) * 10
    numbers = torch.rand(classes, height, width).topk(5, dim=0).indices
    return torch.stack([scores, numbers.float()]).half()


def dense(labels, classes=1000):
    full = torch.zeros(classes, *labels.scores.shape[1:])
    full[labels.classes] = labels.scores
    return full


@pytest.mark.parametrize('options', [{}, dict(_use_new_zipfile_serialization=False)])
def test_reads_scores_of_classes(options):
    packed = example()
    found = dense(parse_label_map(saved(packed, **options), 'a.pt'))
    scores, numbers = packed.float()
    expected = torch.zeros(1000, 18, 18)
    for k in range(5):
        for y in range(18):
            for x in range(18):
                expected[int(numbers[k, y, x]), y, x] = scores[k, y, x]
    assert torch.equal(found, expected)


class Evil:
    def __reduce__(self):
        return print, ('run',)


# Made in the test: bytes as parameters would name the tests, otherwise in each process.
DAMAGED = {
    'empty': (lambda: b'', 'cannot be read'),
    'text': (lambda: b'not a file of torch', 'cannot be read'),
    'truncated': (lambda: saved(example())[:-700], 'cannot be read'),
    'code': (lambda: saved(Evil()), 'cannot be read'),
    'one plane': (lambda: saved(torch.zeros(5, 18, 18)), r'\(5, 18, 18\); needed is'),
    'integers': (
        lambda: saved(torch.zeros(2, 5, 18, 18, dtype=torch.int64)),
        'needed is a floating-point',
    ),
    'list': (lambda: saved([1, 2]), r'is \[1, 2\]; needed is'),
    'not finite': (lambda: saved(torch.full((2, 5, 18, 18), torch.nan)), 'not finite'),
    'negative class': (lambda: saved(torch.full((2, 5, 18, 18), -1.0)), 'class numbers'),
    'half a class': (lambda: saved(torch.full((2, 5, 18, 18), 0.5)), 'class numbers'),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_maps_are_named(kind, capsys):
    make, reason = DAMAGED[kind]
    with pytest.raises(UserError, match=reason) as error:
        parse_label_map(make(), 'n01/a.pt')
    assert 'n01/a.pt' in str(error.value)
    assert not capsys.readouterr().out


def test_a_changed_byte_is_found():
    packed = example()
    content = bytearray(saved(packed))
    place = content.find(packed.numpy().tobytes())
    content[place + 100] ^= 1
    with pytest.raises(UserError, match=re.escape('cannot be read (BadZipFile)')):
        parse_label_map(bytes(content), 'a.pt')


def ramp(height=18, width=18):
    """Two classes: the score of class 3 is the column, that of class 7 the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return LabelMap(torch.stack([columns, rows]).float(), torch.tensor([3, 7]))


def test_crop_that_is_not_square_and_off_centre():
    """Worked out by hand: a crop 200 wide and 60 high at (100, 20) of an image 400 wide, 200 high.

    It begins at 1/4 of 18 columns and 1/10 of 18 rows and has 9 columns and 5.4 rows; a cell's
    number is half a cell left of its middle. Each of three tokens has the score at its middle.
    """
    target = crop(ramp(), (100 / 400, 20 / 200, 300 / 400, 80 / 200), (3, 3))
    assert target.classes.tolist() == [3, 7]
    columns, rows = [5.5, 8.5, 11.5], [2.2, 4.0, 5.8]
    assert target.tokens[0] == pytest.approx(np.array([columns] * 3), abs=1e-5)
    assert target.tokens[1] == pytest.approx(np.array([rows] * 3).T, abs=1e-5)
    assert target.pooled == pytest.approx([8.5, 4.0], abs=1e-5)


def test_crop_is_roi_align_of_all_classes():
    from torchvision.ops import roi_align

    labels = unpack(*(part for part in (example()[0].float(), example()[1].long())))
    box = (0.13, 0.4, 0.71, 0.93)
    place = torch.tensor([[0.0, *box]])
    place[:, 1:] = place[:, 1:] * 18 - 0.5
    expected = roi_align(dense(labels)[None], place, (7, 5), aligned=False)[0]
    target = crop(labels, box, (7, 5))
    torch.testing.assert_close(torch.from_numpy(target.tokens), expected[labels.classes])
    pooled = roi_align(dense(labels)[None], place, (1, 1), aligned=False)[0, :, 0, 0]
    torch.testing.assert_close(torch.from_numpy(target.pooled), pooled[labels.classes])


@pytest.mark.parametrize('box', [(0, 0, 1, 1), (0.3, 0.1, 0.5, 0.9), (0.9, 0.9, 1, 1)])
def test_constant_map_gives_the_constant(box):
    labels = LabelMap(torch.full((2, 18, 18), 4.0), torch.tensor([1, 5]))
    target = crop(labels, box, (7, 7))
    assert (target.tokens == pytest.approx(4.0)) and (target.pooled == pytest.approx(4.0))


def test_flips():
    labels = ramp(2, 3)
    assert flip(labels, 'horizontal').scores[0].tolist() == [[2, 1, 0]] * 2
    assert flip(labels, 'vertical').scores[1].tolist() == [[1] * 3, [0] * 3]
    assert torch.equal(flip(labels, 'diagonal').scores, labels.scores.flip(1, 2))


@pytest.mark.parametrize(
    'matrix',
    [
        [[1, 0, 0], [0, 1, 0]],
        [[1, 0, 60], [0, 1, -20]],
        [[1, 0.3, 0], [0, 1, 0]],
        [[1, 0, 0], [-0.2, 1, 10]],
        cv2.getRotationMatrix2D((179.5, 89.5), -25, 1),
    ],
)
def test_warp_moves_the_map_as_opencv_moves_the_image(matrix):
    """An image twice as wide as high, whose brightness is the map's score."""
    height, width, cell = 180, 360, 10
    y, x = np.mgrid[:height, :width]
    blob = np.exp(-(((x - 150) / 45) ** 2) - ((y - 80) / 25) ** 2).astype(np.float32)

    def shrunk(image):  # to 18 x 18, each cell the mean of its pixels
        return image.reshape(18, cell, 18, 2 * cell).mean((1, 3))

    matrix = np.asarray(matrix, dtype=np.float64)
    moved = shrunk(cv2.warpAffine(blob, matrix, (width, height)))
    labels = LabelMap(torch.from_numpy(shrunk(blob))[None], torch.tensor([0]))
    found = warp(labels, matrix, height, width).scores[0].numpy()
    assert np.abs(found - moved).max() < 0.08
    assert np.corrcoef(found.ravel(), moved.ravel())[0, 1] > 0.99


def test_what_comes_from_outside_has_no_score():
    labels = LabelMap(torch.ones(1, 18, 18), torch.tensor([0]))
    found = warp(labels, np.array([[1.0, 0, 180], [0, 1, 0]]), 180, 360).scores[0]
    assert found[:, :9].eq(0).all() and found[:, 9:].eq(1).all()
