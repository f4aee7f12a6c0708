"""The files of the three formats, read by COCO's tools and by the hosts."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmbiformer.shapes import (
    CLASSES,
    FORMATS,
    SEGMENTATION_CLASSES,
    Scenes,
    ShapesSpec,
    SingleScenes,
    make_shapes,
    summarise,
)
from mmbiformer.shapes.coco import coco_segmentation

SPEC = ShapesSpec()
COUNTS = {'train': 24, 'val': 8}
SEED = 3


@pytest.fixture(scope='module')
def coco_set(tmp_path_factory):
    """A small complete data set; tests only read it."""
    out = tmp_path_factory.mktemp('shapes') / 'set'
    make_shapes(out, *COUNTS.values(), SEED, progress=False)
    return out


def load(out, split):
    return COCO(out / 'annotations' / f'instances_{split}.json')


def assert_shows(path, scene):
    """But for JPEG's losses."""
    picture = cv2.imread(str(path))[..., ::-1]
    assert np.abs(picture.astype(float) - scene.image).mean() < 10


@pytest.mark.parametrize('split', COUNTS)
def test_coco(split, coco_set):
    """Masks, boxes, areas and classes are those of the scenes; distractors are not annotated."""
    coco = load(coco_set, split)
    assert [coco.cats[key]['name'] for key in sorted(coco.cats)] == list(CLASSES)
    assert len(coco.imgs) == COUNTS[split]
    for image_id, scene in enumerate(Scenes(SPEC, SEED, split, COUNTS[split])):
        info = coco.imgs[image_id]
        assert (info['width'], info['height']) == SPEC.size
        assert_shows(coco_set / split / info['file_name'], scene)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        for annotation, instance in zip(annotations, scene.instances, strict=True):
            drawn = coco.annToMask(annotation).astype(bool)
            overlap = (drawn & instance.mask).sum() / (drawn | instance.mask).sum()
            exact = isinstance(annotation['segmentation'], dict)
            assert overlap == 1 if exact else overlap >= 0.9
            assert annotation['category_id'] == instance.label + 1
            assert annotation['area'] == instance.mask.sum()
            assert annotation['iscrowd'] == 0
            x, y, width, height = annotation['bbox']
            assert instance.mask[y : y + height, x : x + width].sum() == annotation['area']


def test_polygons_and_run_lengths(coco_set):
    """Polygons are the rule; a mask with a hole or of two parts cannot be one polygon."""
    annotations = list(load(coco_set, 'train').anns.values())
    runs = [one for one in annotations if isinstance(one['segmentation'], dict)]
    assert 0 < len(runs) < len(annotations) / 2
    ring = CLASSES.index('ring') + 1
    rings = [one for one in annotations if one['category_id'] == ring and one['occlusion'] == 0]
    assert rings and all(one in runs for one in rings)
    mask = np.zeros((40, 40), bool)
    mask[5:20, 5:35] = True
    assert isinstance(coco_segmentation(mask), list)
    mask[:, 18:22] = False
    assert isinstance(coco_segmentation(mask), dict)


def test_ade20k(coco_set, tmp_path):
    """A plain MMSegmentation data set reads every pixel; the pictures are those of COCO."""
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import TRANSFORMS

    make_shapes(tmp_path, *COUNTS.values(), SEED, progress=False, format='ade20k')
    read = TRANSFORMS.build(dict(type='mmseg.LoadAnnotations', reduce_zero_label=True))
    for split, folder in (('train', 'training'), ('val', 'validation')):
        loaded = BaseSegDataset(
            data_root=str(tmp_path),
            data_prefix=dict(img_path=f'images/{folder}', seg_map_path=f'annotations/{folder}'),
            metainfo=dict(classes=SEGMENTATION_CLASSES),
            reduce_zero_label=True,
        )
        assert len(loaded) == COUNTS[split]
        for index, scene in enumerate(Scenes(SPEC, SEED, split, COUNTS[split])):
            expected = np.zeros(scene.image.shape[:2], np.uint8)
            for instance in scene.instances:
                expected[instance.mask] = 1 + instance.label
            info = loaded.get_data_info(index)
            assert np.array_equal(read(info)['gt_seg_map'], expected)
            path = Path(info['img_path'])
            assert path.read_bytes() == (coco_set / split / path.name).read_bytes()
    row = summarise(tmp_path)['train']
    shares = [row[f'{name} pixels (%)'] for name in SEGMENTATION_CLASSES]
    assert row['images'] == COUNTS['train']
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert min(shares) > 0 and max(shares) == shares[0]


def test_imagenet(tmp_path):
    """A plain MMPretrain data set reads it; all classes are equally frequent, near the middle."""
    from mmpretrain.datasets import CustomDataset

    make_shapes(tmp_path, 14, 7, SEED, progress=False, format='imagenet')
    spec = FORMATS['imagenet'].spec
    for split, count in (('train', 14), ('val', 7)):
        loaded = CustomDataset(data_root=str(tmp_path), data_prefix=split, with_label=True)
        assert list(loaded.CLASSES) == sorted(CLASSES)
        assert np.bincount(loaded.get_gt_labels()).tolist() == [count // 7] * 7
        found = {Path(info['img_path']).name: info for info in loaded}
        for index, scene in enumerate(SingleScenes(spec, SEED, split, count)):
            info = found[f'{index:06d}.jpg']
            (instance,) = scene.instances
            assert loaded.CLASSES[info['gt_label']] == CLASSES[instance.label]
            assert_shows(info['img_path'], scene)
            middle = np.argwhere(instance.mask).mean(axis=0) / scene.image.shape[:2]
            assert np.abs(middle - 0.5).max() < spec.spread / 2 + 0.2
    assert summarise(tmp_path)['val'] == {'images': 7, **dict.fromkeys(CLASSES, 1)}
