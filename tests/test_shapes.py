"""Tests of the synthetic shapes data set: the scenes, the three formats and the folder rules."""

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from mmbiformer.datasets import (
    CLASSES,
    FORMATS,
    SEGMENTATION_CLASSES,
    Scene,
    ShapesSpec,
    make_shapes,
    render_scene,
    shapes_folder,
    shapes_formats,
)
from mmbiformer.datasets import shapes as shapes_module
from mmbiformer.datasets.shapes import SPLITS, Scenes, SingleScenes, preview, scene_rng
from mmbiformer.datasets.shapes_folder import format_summary, summarise
from mmbiformer.datasets.shapes_formats import coco_segmentation
from mmbiformer.engine.command_line import run_command

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
    return list(Scenes(SPEC, SEED, 'train', 60))


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
    for scene in Scenes(spec, SEED, 'train', 10):
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
    for scene in Scenes(spec, SEED, 'train', 5):
        assert scene.instances == []
        assert len(scene.distractors) >= 3
        assert all(mask.any() for mask in scene.distractors)


def test_shapes_stand_out():
    """Without textures a shape's colour differs from its surroundings by the contrast asked."""
    spec = replace(SPEC, texture=0.0, objects=(1, 1), distractors=(0, 0), contrast=80.0)
    for scene in Scenes(spec, SEED, 'train', 10):
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
        {'spread': 1.5},
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
    for image_id, scene in enumerate(Scenes(SPEC, SEED, split, count)):
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
    for image_id, scene in enumerate(Scenes(SPEC, SEED, 'train', TRAIN)):
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


def test_images_do_not_depend_on_processes(data_set: Path, tmp_path: Path, monkeypatch):
    """Several processes draw the same scenes, in the same order."""
    monkeypatch.setattr(shapes_folder, 'SCENES_PER_WORKER', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    make_shapes(tmp_path, TRAIN, VAL, SEED, progress=False)
    assert _contents(tmp_path) == _contents(data_set)


def test_splits_are_disjoint(data_set: Path):
    """No validation image is also a training image."""
    train, val = ({p.read_bytes() for p in (data_set / s).glob('*.jpg')} for s in SPLITS)
    assert (len(train), len(val)) == (TRAIN, VAL)
    assert not train & val


# The other formats


def test_ade20k(data_set: Path, tmp_path: Path):
    """A plain MMSegmentation data set reads every pixel; the pictures are those of COCO."""
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import TRANSFORMS

    make_shapes(tmp_path, TRAIN, VAL, SEED, progress=False, format='ade20k')
    load = TRANSFORMS.build(dict(type='mmseg.LoadAnnotations', reduce_zero_label=True))
    for split, folder, count in (('train', 'training', TRAIN), ('val', 'validation', VAL)):
        loaded = BaseSegDataset(
            data_root=str(tmp_path),
            data_prefix=dict(img_path=f'images/{folder}', seg_map_path=f'annotations/{folder}'),
            metainfo=dict(classes=SEGMENTATION_CLASSES),
            reduce_zero_label=True,
        )
        assert len(loaded) == count
        for index, scene in enumerate(Scenes(SPEC, SEED, split, count)):
            expected = np.zeros(scene.image.shape[:2], np.uint8)
            for instance in scene.instances:
                expected[instance.mask] = 1 + instance.label
            info = loaded.get_data_info(index)
            assert np.array_equal(load(info)['gt_seg_map'], expected)
            same = data_set / split / Path(info['img_path']).name
            assert Path(info['img_path']).read_bytes() == same.read_bytes()
    row = summarise(tmp_path)['train']
    assert row['images'] == TRAIN
    shares = [row[f'{name} pixels (%)'] for name in SEGMENTATION_CLASSES]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert min(shares) > 0 and max(shares) == shares[0]


def test_imagenet(tmp_path: Path):
    """A plain MMPretrain data set reads it; every class is as frequent, and about the middle."""
    from mmpretrain.datasets import CustomDataset

    make_shapes(tmp_path, 28, 7, SEED, progress=False, format='imagenet')
    for split, count in (('train', 28), ('val', 7)):
        loaded = CustomDataset(data_root=str(tmp_path), data_prefix=split, with_label=True)
        assert list(loaded.CLASSES) == sorted(CLASSES)
        assert len(loaded) == count
        assert np.bincount(loaded.get_gt_labels()).tolist() == [count // 7] * 7
        spec = FORMATS['imagenet'].spec
        wanted = enumerate(SingleScenes(spec, SEED, split, count))
        paths = {Path(info['img_path']).name: info for info in loaded}
        for index, scene in wanted:
            info = paths[f'{index:06d}.jpg']
            (instance,) = scene.instances
            assert loaded.CLASSES[info['gt_label']] == CLASSES[instance.label]
            picture = cv2.imread(info['img_path'])[..., ::-1]
            assert np.abs(picture.astype(float) - scene.image).mean() < 10
            middle = np.argwhere(instance.mask).mean(axis=0) / scene.image.shape[:2]
            assert np.abs(middle - 0.5).max() < spec.spread / 2 + 0.2
    assert summarise(tmp_path)['val'] == {'images': 7, **dict.fromkeys(CLASSES, 1)}


def test_single_scenes_have_their_shape():
    """Whatever is in the way, every image shows one shape, and its class takes turns."""
    spec = replace(FORMATS['imagenet'].spec, size=(64, 64), shape_size=(40, 60), spread=0.0)
    spec = replace(spec, distractors=(4, 8))
    labels = [[one.label for one in s.instances] for s in SingleScenes(spec, 0, 'val', 21)]
    assert labels == [[k] for k in range(7)] * 3


def test_classes_need_single_shapes(tmp_path: Path):
    """Several shapes have no one class; what is there stays."""
    make_shapes(tmp_path / 'set', 2, 1, progress=False, format='imagenet')
    before = _contents(tmp_path / 'set')
    with pytest.raises(ValueError, match='objects must be 1 1'):
        make_shapes(tmp_path / 'set', 2, 1, 0, SPEC, True, progress=False, format='imagenet')
    assert _contents(tmp_path / 'set') == before
    with pytest.raises(ValueError, match="format='voc' is unknown"):
        make_shapes(tmp_path / 'other', 2, 1, progress=False, format='voc')
    assert not (tmp_path / 'other').exists()


# Folder rules


def test_formats_replace_one_another(tmp_path: Path):
    """Only on request, and then nothing of the other is left."""
    listed = {}
    for name in FORMATS:
        make_shapes(tmp_path / name, 3, 2, progress=False, format=name)
        listed[name] = sorted(_contents(tmp_path / name))
    one = tmp_path / 'coco'
    with pytest.raises(FileExistsError, match='overwrite'):
        make_shapes(one, 3, 2, progress=False, format='ade20k')
    for name in ('ade20k', 'imagenet', 'coco'):
        assert make_shapes(one, 3, 2, 0, None, True, False, name)
        assert sorted(_contents(one)) == listed[name]


@pytest.mark.parametrize(
    ('name', 'lost'),
    [
        ('ade20k', 'annotations/training/000001.png'),
        ('ade20k', 'images/validation/000000.jpg'),
        ('imagenet', 'train/rectangle/000001.jpg'),
    ],
)
def test_damaged_set_of_other_format_is_redone(tmp_path: Path, name: str, lost: str):
    make_shapes(tmp_path, 3, 2, progress=False, format=name)
    assert not make_shapes(tmp_path, 3, 2, progress=False, format=name)
    (tmp_path / lost).unlink()
    assert make_shapes(tmp_path, 3, 2, progress=False, format=name)
    assert (tmp_path / lost).exists()


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
    write = shapes_formats.write_image

    def break_off(path: Path, *rest) -> None:
        if path.name == '000002.jpg':
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shapes_formats, 'write_image', break_off)
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
    with pytest.raises(SystemExit) as stopped:
        run_command(tool.main)
    assert stopped.value.code == 2
    assert 'other parameters' in capsys.readouterr().err


def test_speed():
    """Rendering stays far from slow: a bound ten times what an ordinary core needs."""
    start = time.perf_counter()
    for _ in Scenes(SPEC, 0, 'val', 20):
        pass
    assert time.perf_counter() - start < 2.5
