"""Tests of the synthetic shapes data set: the scenes, the COCO files and the folder rules."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from mmbiformer.datasets import CLASSES, Scene, ShapesSpec, make_shapes, render_scene
from mmbiformer.datasets import shapes as shapes_module
from mmbiformer.datasets.shapes import (
    SPLITS,
    coco_segmentation,
    format_summary,
    preview,
    scene_rng,
    scenes,
    summarise,
)

SPEC = ShapesSpec()
TRAIN, VAL, SEED = 24, 8, 3


@pytest.fixture(scope='module')
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete data set; tests only read it."""
    out = tmp_path_factory.mktemp('shapes') / 'set'
    assert make_shapes(out, TRAIN, VAL, SEED, progress=False)
    return out


@pytest.fixture(scope='module')
def train_scenes() -> list[Scene]:
    """The scenes of that set's training split, and some more."""
    return list(scenes(SPEC, SEED, 'train', 60))


def _load(out: Path, split: str) -> COCO:
    return COCO(out / 'annotations' / f'instances_{split}.json')


def _contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob('*') if path.is_file()
    }


def _tool():
    path = Path(__file__).parents[1] / 'tools' / 'make_shapes.py'
    module_spec = importlib.util.spec_from_file_location('make_shapes_tool', path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


# Scenes


def test_scene_follows_from_seed():
    """The same generator state gives the same scene, another index, split or seed another."""
    first = render_scene(scene_rng(0, 'train', 5), SPEC)
    again = render_scene(scene_rng(0, 'train', 5), SPEC)
    assert np.array_equal(first.image, again.image)
    for one, other in zip(first.instances, again.instances, strict=True):
        assert one.label == other.label
        assert np.array_equal(one.mask, other.mask)
    for rng in (scene_rng(0, 'train', 6), scene_rng(0, 'val', 5), scene_rng(1, 'train', 5)):
        assert not np.array_equal(first.image, render_scene(rng, SPEC).image)


def test_scene_layout(train_scenes: list[Scene]):
    """Images and masks have the documented types, and masks do not overlap."""
    width, height = SPEC.size
    for scene in train_scenes:
        assert scene.image.shape == (height, width, 3)
        assert scene.image.dtype == np.uint8
        masks = [instance.mask for instance in scene.instances] + scene.distractors
        assert all(mask.shape == (height, width) and mask.dtype == bool for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1
        assert len(scene.instances) <= SPEC.objects[1]
        assert len(scene.distractors) <= SPEC.distractors[1]


def test_sizes_in_range(train_scenes: list[Scene]):
    """Sizes stay within the spec, spread over it, and no visible part is larger than its shape."""
    sizes = []
    for scene in train_scenes:
        for instance in scene.instances:
            rows, columns = np.nonzero(instance.mask)
            assert max(np.ptp(rows), np.ptp(columns)) + 1 <= instance.size + 2
            sizes.append(instance.size)
    low, high = SPEC.shape_size
    assert low <= min(sizes) < 2 * low
    assert high / 2 < max(sizes) <= high


def test_visible_part(train_scenes: list[Scene]):
    """Shapes hide one another, but none more than the spec allows."""
    instances = [instance for scene in train_scenes for instance in scene.instances]
    hidden = np.array([instance.occlusion for instance in instances])
    assert hidden.min() >= 0
    assert hidden.max() <= SPEC.max_occlusion
    assert 0.2 < np.mean(hidden > 0.05) < 0.8
    assert min(instance.mask.sum() for instance in instances) >= shapes_module.MIN_VISIBLE_PX


def test_no_occlusion():
    """With no occlusion allowed, every mask is as large as its shape: nothing is hidden."""
    spec = replace(SPEC, max_occlusion=0.0)
    for scene in scenes(spec, SEED, 'train', 10):
        for instance in scene.instances:
            rows, columns = np.nonzero(instance.mask)
            side = max(np.ptp(rows), np.ptp(columns)) + 1
            assert instance.occlusion == 0
            assert abs(side - instance.size) <= 2


def test_every_class_occurs(train_scenes: list[Scene]):
    """All classes occur, none far more often than the others."""
    labels = [instance.label for scene in train_scenes for instance in scene.instances]
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert len(counts) == len(CLASSES)
    assert counts.min() > 0.5 * counts.mean()


@pytest.mark.parametrize('label', range(len(CLASSES)))
def test_shape_outline(label: int):
    """Outlines have the size asked for, and only rings have a hole."""
    rng = np.random.default_rng(label)
    for size in (8.0, 30.0, 80.0):
        outline = shapes_module.shape_outline(rng, label, size)
        points = np.concatenate(outline.contours)
        assert np.ptp(points, axis=0).max() == pytest.approx(size)
        assert (len(outline.contours) == 2) == (CLASSES[label] == 'ring')


def test_distractors_are_not_instances():
    """Distractors are painted, but a scene of nothing else has no instances."""
    spec = replace(SPEC, objects=(0, 0), distractors=(4, 4))
    for scene in scenes(spec, SEED, 'train', 5):
        assert scene.instances == []
        assert len(scene.distractors) >= 3
        assert all(mask.any() for mask in scene.distractors)


def test_shapes_stand_out():
    """Without textures a shape's colour differs from its surroundings by the contrast asked."""
    spec = replace(SPEC, texture=0.0, objects=(1, 1), distractors=(0, 0), contrast=80.0)
    for scene in scenes(spec, SEED, 'train', 10):
        (instance,) = scene.instances
        inside = scene.image[instance.mask].astype(float)
        outside = scene.image[~instance.mask].astype(float)
        difference = np.median(inside, axis=0) - np.median(outside, axis=0)
        assert np.linalg.norm(difference) > 70


@pytest.mark.parametrize(
    'wrong',
    [
        {'objects': (5, 2)},
        {'shape_size': (2, 40)},
        {'shape_size': (8, 400)},
        {'max_occlusion': 1.0},
        {'large_bias': 0.0},
    ],
)
def test_wrong_spec(wrong: dict):
    """Values without meaning are refused with the name of the parameter."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShapesSpec(**wrong)


# COCO files


@pytest.mark.parametrize(('split', 'count'), [('train', TRAIN), ('val', VAL)])
def test_coco_masks(data_set: Path, split: str, count: int):
    """COCO tools read the files and give back the masks, boxes, areas and classes."""
    coco = _load(data_set, split)
    assert [coco.cats[key]['name'] for key in sorted(coco.cats)] == list(CLASSES)
    assert len(coco.imgs) == count
    for image_id, scene in enumerate(scenes(SPEC, SEED, split, count)):
        info = coco.imgs[image_id]
        assert (info['width'], info['height']) == SPEC.size
        picture = cv2.imread(str(data_set / split / info['file_name']))[..., ::-1]
        assert np.abs(picture.astype(float) - scene.image).mean() < 10
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


def test_distractors_are_not_annotated(data_set: Path):
    """No exact annotation touches a distractor, and there are no annotations besides shapes."""
    coco = _load(data_set, 'train')
    for image_id, scene in enumerate(scenes(SPEC, SEED, 'train', TRAIN)):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert len(annotations) == len(scene.instances)
        exact = [one for one in annotations if isinstance(one['segmentation'], dict)]
        for annotation in exact:
            drawn = coco.annToMask(annotation).astype(bool)
            assert not any((drawn & distractor).any() for distractor in scene.distractors)


def test_both_segmentation_forms(data_set: Path):
    """Polygons are the rule; run lengths occur, and always for masks with a hole."""
    annotations = list(_load(data_set, 'train').anns.values())
    runs = [one for one in annotations if isinstance(one['segmentation'], dict)]
    assert 0 < len(runs) < len(annotations) / 2
    ring = CLASSES.index('ring') + 1
    whole_rings = [
        one for one in annotations if one['category_id'] == ring and one['occlusion'] == 0
    ]
    assert whole_rings and all(isinstance(one['segmentation'], dict) for one in whole_rings)


def test_split_mask_is_run_lengths():
    """A mask of two parts cannot be one polygon."""
    mask = np.zeros((40, 40), bool)
    mask[5:20, 5:35] = True
    assert isinstance(coco_segmentation(mask), list)
    mask[:, 18:22] = False
    assert isinstance(coco_segmentation(mask), dict)


def test_images_do_not_depend_on_count(data_set: Path, tmp_path: Path):
    """A smaller set is the beginning of a larger one, and the same set is the same bytes."""
    make_shapes(tmp_path / 'same', TRAIN, VAL, SEED, progress=False)
    assert _contents(tmp_path / 'same') == _contents(data_set)
    make_shapes(tmp_path / 'less', 4, 2, SEED, progress=False)
    for split, count in (('train', 4), ('val', 2)):
        for index in range(count):
            name = f'{split}/{index:06d}.jpg'
            assert (tmp_path / 'less' / name).read_bytes() == (data_set / name).read_bytes()


def test_splits_are_disjoint(data_set: Path):
    """No validation image is also a training image."""
    train, val = ({p.read_bytes() for p in (data_set / s).glob('*.jpg')} for s in SPLITS)
    assert (len(train), len(val)) == (TRAIN, VAL)
    assert not train & val


# Folder rules


def test_complete_set_is_kept(data_set: Path):
    """Asking again for the same set changes nothing."""
    stamp = (data_set / 'meta.json').stat().st_mtime_ns
    assert not make_shapes(data_set, TRAIN, VAL, SEED, progress=False)
    assert (data_set / 'meta.json').stat().st_mtime_ns == stamp


def test_other_parameters_need_overwrite(tmp_path: Path):
    """A set made with other parameters is replaced only on request, and then wholly."""
    make_shapes(tmp_path, 3, 2, 0, progress=False)
    with pytest.raises(FileExistsError, match='overwrite'):
        make_shapes(tmp_path, 2, 2, 1, progress=False)
    assert make_shapes(tmp_path, 2, 2, 1, overwrite=True, progress=False)
    assert len(list((tmp_path / 'train').iterdir())) == 2


@pytest.mark.parametrize('overwrite', [False, True])
def test_foreign_folder_is_refused(tmp_path: Path, overwrite: bool):
    """Folders of other origin are never written to, not even on request."""
    (tmp_path / 'meta.json').write_text('{"generator": "other"}')
    (tmp_path / 'train').mkdir()
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(FileExistsError, match='not made by this generator'):
        make_shapes(tmp_path, 2, 2, overwrite=overwrite, progress=False)
    assert sorted(tmp_path.rglob('*')) == before


def test_interrupted_run_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A set whose making broke off is not taken for complete, and is made anew."""
    write = shapes_module._write_image

    def break_off(path: Path, *rest) -> None:
        if path.name == '000002.jpg':
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shapes_module, '_write_image', break_off)
        with pytest.raises(KeyboardInterrupt):
            make_shapes(tmp_path, 4, 2, progress=False)
    assert not (tmp_path / 'meta.json').exists()
    assert make_shapes(tmp_path, 4, 2, progress=False)
    assert (tmp_path / 'meta.json').exists()
    assert not (tmp_path / 'meta.partial.json').exists()
    assert len(_load(tmp_path, 'train').imgs) == 4


def test_damaged_set_is_redone(tmp_path: Path):
    """A set that has lost a file is made anew."""
    make_shapes(tmp_path, 2, 2, progress=False)
    (tmp_path / 'val' / '000001.jpg').unlink()
    assert make_shapes(tmp_path, 2, 2, progress=False)
    assert (tmp_path / 'val' / '000001.jpg').exists()


# Summary, preview, command


def test_summary(data_set: Path):
    """The table's numbers agree with the annotation files."""
    summary = summarise(data_set)
    annotations = json.loads((data_set / 'annotations/instances_train.json').read_text())
    row = summary['train']
    assert row['images'] == TRAIN
    assert row['instances'] == len(annotations['annotations'])
    assert sum(row[name] for name in CLASSES) == row['instances']
    assert sum(value for name, value in row.items() if 'px' in name) == pytest.approx(100, abs=0.2)
    assert len(format_summary(summary).splitlines()) == len(row) + 1


def test_preview(train_scenes: list[Scene]):
    """The contact sheet has room for all scenes and leaves them as they are."""
    before = train_scenes[0].image.copy()
    width, height = SPEC.size
    sheet = preview(train_scenes[:5], columns=2, zoom=2)
    assert sheet.shape == (3 * (2 * height + 4), 2 * (2 * width + 4), 3)
    assert np.array_equal(train_scenes[0].image, before)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The command makes the set with the options given, then says that it is there."""
    out, sheet = tmp_path / 'set', tmp_path / 'sheet.png'
    options = f'--out {out} --train 3 --val 2 --size 96 128 --shape-size 10 40 --preview {sheet}'
    monkeypatch.setattr('sys.argv', ['make_shapes.py', *options.split()])
    tool = _tool()
    tool.main()
    assert sheet.exists()
    assert cv2.imread(str(out / 'train' / '000002.jpg')).shape == (128, 96, 3)
    assert 'instances' in capsys.readouterr().out
    tool.main()
    assert 'nothing to do' in capsys.readouterr().out
    monkeypatch.setattr('sys.argv', ['make_shapes.py', '--out', str(out), '--train', '4'])
    with pytest.raises(SystemExit, match='other parameters'):
        tool.main()


def test_speed():
    """Rendering stays far from slow: a bound ten times what an ordinary core needs."""
    start = time.perf_counter()
    for _ in scenes(SPEC, 0, 'val', 20):
        pass
    assert time.perf_counter() - start < 2.5
