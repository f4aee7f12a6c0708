"""Broken annotations end a run with the name of their file, in the host's own pipelines."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_faults import message_of
from test_training import CONFIG

from mmbiformer.datasets import make_shapes

ROOT = Path(__file__).parent.parent
SEGMENTATION = """
_base_ = '{root}/configs/demo/sfpn_biformer_t_shapes.py'
model = dict(backbone=dict(
    _delete_=True, type='mmbiformer.BiFormer',
    arch=dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root='{data}'))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}'))
train_cfg = dict(max_iters=2, val_interval=2)
"""


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    for form in ('coco', 'ade20k'):
        make_shapes(folder / form, train=2, val=1, format=form, progress=False)
    return folder


def write_config(whole, folder, form):
    shutil.copytree(whole / form, folder / 'data')
    config = folder / 'broken.py'
    text = CONFIG if form == 'coco' else SEGMENTATION
    config.write_text(text.format(root=ROOT, data=folder / 'data'))
    return config


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def each(name, value):
    def change(content):
        for annotation in content['annotations']:
            annotation[name] = value

    return change


def rename(content):
    content['categories'][2]['name'] = 'square'


def boxes_only(content):
    for annotation in content['annotations']:
        del annotation['segmentation']


ODD_RLE = dict(size=[3, 3], counts=[4, 5])
COCO = {  # what is done to the annotations, and what is said
    'endless boxes': (each('bbox', [1, 1, float('inf'), 9]), 'the box [1.0, ', 'is not finite'),
    'boxes only': (boxes_only, "its annotation has no 'mask'", 'Mend it'),
    'masks of another size': (each('segmentation', ODD_RLE), '.jpg: ', 'size 27', 'Mend it'),
}


@pytest.mark.parametrize('name', COCO)
def test_coco(whole, tmp_path, name):
    change, *parts = COCO[name]
    config = write_config(whole, tmp_path, 'coco')
    rewrite(tmp_path / 'data/annotations/instances_train.json', change)
    found = message_of(config, tmp_path / 'work', {})
    for part in [*parts, str(tmp_path / 'data/train')]:
        assert part in found, found


def test_boxes_that_are_left_out(whole, tmp_path):
    """MMDetection drops boxes without area silently; an image that has no others is named."""
    config = write_config(whole, tmp_path, 'coco')
    rewrite(
        tmp_path / 'data/annotations/instances_train.json', each('bbox', [1, 1, float('nan'), 9])
    )
    image = tmp_path / 'data/train/000000.jpg'
    with (
        pytest.warns(UserWarning, match=f'{image}: none of its boxes can be used'),
        pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'),
    ):
        message_of(config, tmp_path / 'work', {})


@pytest.mark.parametrize('split', ['train', 'val'])
def test_category_of_another_name(whole, tmp_path, split):
    """MMDetection would number the classes behind it wrongly, or fail after an epoch."""
    config = write_config(whole, tmp_path, 'coco')
    path = tmp_path / f'data/annotations/instances_{split}.json'
    rewrite(path, rename)
    found = message_of(config, tmp_path / 'work', {})
    for part in [f'{path} lacks triangle;', 'metainfo.classes', f'the {split} data have 7']:
        assert part in found, found
    assert not [*tmp_path.rglob('*.pth')]


def test_polygons_that_cannot_be_evaluated(whole, tmp_path):
    config = write_config(whole, tmp_path, 'coco')
    path = tmp_path / 'data/annotations/instances_val.json'
    rewrite(path, each('segmentation', [[1, 2]]))
    found = message_of(config, tmp_path / 'work', {}, test=True)
    assert 'the evaluation cannot read an annotation' in found
    assert str(path) in found and 'polygons' in found


def rgb(mask):
    return np.repeat(mask[:, :, None], 3, -1)


MASKS = {
    'of colours': (rgb, '3), but one label a pixel (H, W) is needed', 'grey or palette'),
    'of another size': (lambda mask: mask[:-1], 'a mask of ', ' for an image of '),
    'with a label too many': (lambda mask: mask * 0 + 12, 'the label 11, but there are 8 classes'),
}


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('name', MASKS)
def test_masks(whole, tmp_path, name, split):
    change, *parts = MASKS[name]
    config = write_config(whole, tmp_path, 'ade20k')
    paths = sorted((tmp_path / 'data').rglob(f'annotations/*{split}*/*.png'))
    assert paths
    for path in paths:
        cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
    found = message_of(config, tmp_path / 'work', {}, test=split == 'val')
    for part in [*parts, 'an image or its annotation cannot be read', 'Mend it']:
        assert part in found, found
    assert any(str(path) in found for path in paths)


def test_mask_that_is_none(whole, tmp_path):
    config = write_config(whole, tmp_path, 'ade20k')
    paths = sorted((tmp_path / 'data').rglob('annotations/*train*/*.png'))
    for path in paths:
        path.write_bytes(b'no image')
    found = message_of(config, tmp_path / 'work', {})
    assert any(str(path) in found for path in paths)


def test_no_masks(whole, tmp_path):
    config = write_config(whole, tmp_path, 'ade20k')
    for path in (tmp_path / 'data').rglob('*train*/*'):
        path.unlink()
    found = message_of(config, tmp_path / 'work', {})
    assert 'is empty: no image was found' in found and 'img_suffix' in found
    assert 'classes' not in found


@pytest.mark.parametrize('form', ['coco', 'ade20k'])
def test_whole_data_train(whole, tmp_path, form):
    """Nothing is said of them: the run ends by itself."""
    config = write_config(whole, tmp_path, form)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        message_of(config, tmp_path / 'work', {})
