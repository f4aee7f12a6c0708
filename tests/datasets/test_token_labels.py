"""The transforms of token labeling, in the pipeline of the recipe."""

import numpy as np
import pytest
import torch

from mmbiformer.errors import UserError
from tests.helpers.configs import load

pytest.importorskip('mmpretrain')
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)


def build(transform):
    from mmpretrain.registry import TRANSFORMS

    load('biformer_s_tokenlabel_in1k')  # sets the scope
    return TRANSFORMS.build(transform)


@pytest.fixture
def quarters(tmp_path):
    """An image of four colours, 300 wide and 160 high, whose label map says which is where."""
    from PIL import Image

    classes = np.array([[0, 1], [2, 3]])
    image = COLOURS[classes].repeat(80, 0).repeat(150, 1)
    (tmp_path / 'train/n01').mkdir(parents=True)
    (tmp_path / 'labels/n01').mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / 'train/n01/a.png')
    numbers = torch.from_numpy(classes.repeat(9, 0).repeat(9, 1))[None]
    packed = torch.stack([torch.full_like(numbers, 10), numbers]).half()
    torch.save(packed, tmp_path / 'labels/n01/a.pt')
    return tmp_path


def pipeline(root):
    steps = load('biformer_s_tokenlabel_in1k').train_dataloader.dataset.pipeline
    assert [step.type.split('.')[-1] for step in steps] == [
        'LoadImageWithPillow',
        'LoadLabelMap',
        'MoveLabelMap',
        'MoveLabelMap',
        'CropLabelMap',
        'RandomErasing',
        'PackInputs',
    ]
    steps[1].root = str(root / 'labels')
    return steps


def test_tokens_have_the_class_of_their_pixels(quarters):
    """Flips, rotations, shears, translations and crops together, and no colours are changed."""
    steps = pipeline(quarters)
    policies = [
        dict(type='Rotate', magnitude_range=(0, 30)),
        dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal'),
        dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical'),
        dict(type='Translate', magnitude_range=(0, 0.45), direction='horizontal'),
        dict(type='Translate', magnitude_range=(0, 0.45), direction='vertical'),
    ]
    steps[2].transform.update(prob=[0.3, 0.3], direction=['horizontal', 'vertical'])
    steps[3].transform.update(policies=policies)
    steps[4].transform.update(crop_ratio_range=(0.3, 1.0))
    transforms = [build(step) for step in steps[:5]]
    np.random.seed(0)
    checked, grey = 0, 0
    for _ in range(60):
        results = dict(img_path=str(quarters / 'train/n01/a.png'))
        for transform in transforms:
            results = transform(results)
        target = results['token_target']
        best = target.classes[target.tokens.argmax(0)]
        # The middle of each token, whose surroundings are of one colour.
        tokens = results['img'][..., ::-1].reshape(7, 32, 7, 32, 3).transpose(0, 2, 1, 3, 4)
        for i, j in np.ndindex(7, 7):
            pixels = tokens[i, j].reshape(-1, 3).astype(int)
            if np.ptp(pixels, axis=0).max() > 40:
                continue  # an edge
            distance = np.abs(COLOURS.astype(int) - pixels.mean(0)).sum(1)
            if distance.min() > 60:  # padding
                grey += 1
                assert target.tokens[:, i, j].max() < 6
                continue
            checked += 1
            assert best[i, j] == distance.argmin()
    assert checked > 1000 and grey > 50


def test_one_draw_moves_both(quarters):
    """The image is as without a map, and the random numbers after it too."""
    steps = pipeline(quarters)
    plain = [steps[0], *(step.transform for step in steps[2:5])]
    results, states = [], []
    for chosen in (steps[:5], plain):
        transforms = [build(step) for step in chosen]
        np.random.seed(3)
        for _ in range(5):
            result = dict(img_path=str(quarters / 'train/n01/a.png'))
            for transform in transforms:
                result = transform(result)
            results.append(result['img'])
        states.append(np.random.rand())
    assert all(map(np.array_equal, results[:5], results[5:]))
    assert states[0] == states[1]


def test_missing_map_is_named(quarters):
    (quarters / 'labels/n01/a.pt').unlink()
    transform = build(pipeline(quarters)[1])
    with pytest.raises(UserError, match=r'train/n01/a\.png has no label map .*labels/n01/a\.pt'):
        transform(dict(img_path=str(quarters / 'train/n01/a.png')))


def test_other_transforms_are_refused():
    with pytest.raises(UserError, match='cannot move label maps by ColorJitter'):
        build(dict(type='mmbiformer.MoveLabelMap', transform=dict(type='ColorJitter')))
    with pytest.raises(UserError, match='knows RandomResizedCrop'):
        build(
            dict(
                type='mmbiformer.CropLabelMap',
                transform=dict(type='RandomFlip', prob=0.5),
                tokens=7,
            )
        )
