"""Broken annotations end a run with the name of their file, in the host's own pipelines."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from PIL import Image
from pycocotools.mask import encode
from test_faults import message_of
from test_training import CONFIG

from mmbiformer.datasets import make_shapes
from mmbiformer.engine import AnnotationError, CheckAnnotationsHook
from mmbiformer.engine.check_annotations_hook import ORIENTATION, CheckedAnnotations
from mmbiformer.engine.check_coco import _decoded, check_coco
from mmbiformer.engine.check_pairs import MissingFileError, check_pairs
from mmbiformer.engine.checks import CommandError, check_data
from mmbiformer.engine.faults import faults_explained

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


def twice(content):
    content['images'].append(dict(content['images'][0], file_name='other.jpg'))


FILES = {  # whole files that are looked into before a run, by what MMDetection makes of them
    'other images': (each('image_id', 99), 'annotations name no entry by image_id', '99'),
    'texts for numbers': (
        each('category_id', '1'),
        'annotations name no entry by category_id',
        "'1'",
    ),
    'two images of one id': (twice, 'several of its image entries have the id 0'),
    'no categories': (lambda c: c.pop('categories'), 'images, annotations, categories'),
    'nothing to evaluate': (lambda c: c['annotations'].clear(), 'nothing to evaluate'),
    'no crowds': (lambda c: [a.pop('iscrowd') for a in c['annotations']], 'lack iscrowd'),
    'crowds as text': (each('iscrowd', '0'), 'its annotation 1 needs 0 or 1 as iscrowd', "'0'"),
    'one id for all': (each('id', 7), 'several of its annotation entries have the id 7'),
    'no ids': (lambda c: [a.pop('id') for a in c['annotations']], 'annotation entries have no id'),
    'no names': (lambda c: c['categories'][1].pop('name'), 'its categories 2 have no name'),
    'no size': (lambda c: c['images'][0].update(height=None), 'its image 0 needs height and'),
    'no file': (lambda c: c['images'][0].update(file_name='a\0b'), 'its image 0 needs the name'),
    'box of three': (each('bbox', [1, 2, 3]), 'needs a bbox of 4 finite', '[1, 2, 3]'),
    'box of nothing': (each('bbox', [1, 2, float('nan'), 3]), 'needs a bbox of 4 finite', 'nan'),
    'no area': (lambda c: [a.pop('area') for a in c['annotations']], 'needs its area', 'None'),
    'polygon at the moon': (each('segmentation', [[1e12, 0, 1e12, 1, 0, 1]]), 'far outside of its'),
    'polygon of nothing': (each('segmentation', [[float('nan'), 0, 9, 1, 0, 1]]), 'not finite, or'),
    'mask of another size': (each('segmentation', ODD_RLE), 'a mask of the size [3, 3] for an'),
    'mask of too few runs': (
        each('segmentation', dict(size=[160, 192], counts=[5, 5])),
        'do not fill 160x192 pixels',
    ),
    'mask of a damaged text': (
        each('segmentation', dict(size=[160, 192], counts='11')),
        'has a damaged mask',
    ),
    'mask of nonsense': (
        each('segmentation', dict(size=[160, 192], counts='\x7f ä')),
        'has a damaged mask',
    ),
}


@pytest.mark.parametrize('kind', ['empty', 'full', 'noise', 'square'])
def test_run_lengths(kind):
    """What pycocotools writes is read alike, and not taken for damaged."""
    mask = np.zeros((37, 53), np.uint8, order='F')
    mask[:] = dict(empty=0, full=1, noise=np.random.rand(37, 53) < 0.5, square=0)[kind]
    mask[9:30, 40:] |= kind == 'square'
    runs = encode(mask)
    counts = _decoded(runs['counts'].decode())
    starts = np.flatnonzero(np.diff(mask.flatten('F'), prepend=0))
    assert counts == np.diff([0, *starts, mask.size]).tolist()


def test_deep_annotations(tmp_path):
    path = tmp_path / 'deep.json'
    path.write_text('[' * 100_000)
    assert 'nested too deeply' in check_coco(str(path), False)


def test_annotation_of_id_0(whole, tmp_path):
    """pycocotools counts it as missed."""
    write_config(whole, tmp_path, 'coco')
    path = tmp_path / 'data/annotations/instances_val.json'
    rewrite(path, lambda content: content['annotations'][0].update(id=0))
    with pytest.warns(UserWarning, match=f'{path}: the evaluation counts the annotation of the id'):
        assert check_coco(str(path), True) is None
    assert check_coco(str(path), False) is None


def test_files_without_annotations(whole, tmp_path):
    """Such as COCO's test images have, of which results are only written."""
    config = write_config(whole, tmp_path, 'coco')
    rewrite(tmp_path / 'data/annotations/instances_val.json', lambda c: c.pop('annotations'))
    cfg = Config.fromfile(config)
    with pytest.raises(CommandError, match='must be an object with the lists'):
        check_data(cfg, ('val',))
    cfg.val_evaluator.format_only = True
    check_data(cfg, ('val',))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_categories_in_another_order(whole, tmp_path, split):
    """MMDetection numbers classes as the file lists them, whatever the config says."""
    config = write_config(whole, tmp_path, 'coco')
    path = tmp_path / f'data/annotations/instances_{split}.json'
    rewrite(path, lambda content: content['categories'].reverse())
    found = message_of(config, tmp_path / 'work', {})
    assert f'{path} lists its categories in another order than metainfo.classes' in found
    assert not [*tmp_path.rglob('*.pth')]


@pytest.mark.parametrize('name', FILES)
def test_coco_files(whole, tmp_path, name):
    change, *parts = FILES[name]
    config = write_config(whole, tmp_path, 'coco')
    cfg = Config.fromfile(config)
    check_data(cfg, ('train', 'val'))
    for split in ('train', 'val'):
        path = tmp_path / f'data/annotations/instances_{split}.json'
        before = path.read_text()
        rewrite(path, change)
        if split == 'train' and name in ('nothing to evaluate', 'no crowds'):
            check_data(cfg, ('train', 'val'))  # trains all the same
        else:
            with pytest.raises(CommandError) as info:
                check_data(cfg, ('train', 'val'))
            for part in [f'{path} cannot be used: ', *parts]:
                assert part in str(info.value)
        path.write_text(before)


def test_image_of_another_size(whole, tmp_path):
    config = write_config(whole, tmp_path, 'coco')

    def turn(content):
        for image in content['images']:
            image['height'], image['width'] = image['width'], image['height']

    rewrite(tmp_path / 'data/annotations/instances_train.json', turn)
    found = message_of(config, tmp_path / 'work', {})
    assert 'its annotation says 192x160 pixels, height and width, but it has 160x192' in found
    assert str(tmp_path / 'data/train') in found


@pytest.mark.parametrize(
    ('orientation', 'side', 'said'), [(1, 6, 0), (3, 6, 1), (6, 6, 0), (6, 4, 1), (None, 4, 0)]
)
def test_images_that_are_turned_in_their_size(orientation, side, said, tmp_path, recwarn):
    """Upside down, say, which boxes do not show."""
    exif = Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    Image.new('RGB', (side, 4)).save(tmp_path / 'a.jpg', exif=exif)
    results = LoadImageFromFile()(dict(img_path=str(tmp_path / 'a.jpg')))
    height, width = results['ori_shape']  # as it is loaded
    CheckedAnnotations(lambda x: x, 8, {255}, False)(dict(results, height=height, width=width))
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == said
    assert all(
        f'a.jpg: its EXIF data turn or mirror it (orientation {orientation})' in x for x in found
    )


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
    assert 'the evaluation fails: ' in found
    assert str(path) in found and 'polygons' in found


def rgb(mask):
    return np.repeat(mask[:, :, None], 3, -1)


MASKS = {
    'of colours': (rgb, '3), but one label a pixel (H, W) is needed', 'grey or palette'),
    'of 16 bits': (lambda mask: mask.astype(np.uint16) + 256, 'a mask of 16 bits'),
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


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize('suffix', ['.tif', '.tiff', '.png'])
def test_masks_of_more_bits(tmp_path, kind, suffix):
    """MMSegmentation cuts them to 8 bits, whatever the format: 257 would be class 1."""
    from mmseg.datasets.transforms import LoadAnnotations

    if suffix == '.png' and kind in (np.int32, np.float32):
        return
    path = str(tmp_path / f'mask{suffix}')
    cv2.imwrite(path, np.ones((4, 4), kind))
    load = CheckedAnnotations(LoadAnnotations(), 8, {255}, False)
    results = dict(seg_map_path=path, reduce_zero_label=False, seg_fields=[], ori_shape=(4, 4))
    if kind is np.uint8:
        assert load(results)['gt_seg_map'].dtype == np.uint8
    else:
        with pytest.raises(AnnotationError, match=r'16 bits a pixel or more \(mode [IF]'):
            load(results)


def test_masks_in_which_all_is_ignored(whole, tmp_path):
    """As those of 0 and 255 are under reduce_zero_label: the loss would be 0, and look perfect."""
    config = write_config(whole, tmp_path, 'ade20k')
    for path in (tmp_path / 'data').rglob('annotations/*train*/*.png'):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), (mask > 1) * np.uint8(255))
    with (
        pytest.warns(UserWarning, match=r'\.png: every pixel is to be ignored, which 0 is too'),
        pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'),
    ):
        message_of(config, tmp_path / 'work', {})


def test_labels_that_models_and_data_ignore():
    """255, and what a head or the data set names, are allowed; so is 1 for one class."""
    head = SimpleNamespace(modules=lambda: [SimpleNamespace(ignore_index=100)])

    def load(results):
        return results

    LoadAnnotations = type('LoadAnnotations', (), {'__call__': lambda self, x: load(x)})
    for classes, label, fine in (
        (8, 7, True), (8, 8, False), (8, 100, True), (8, 255, True), (8, 50, True), (1, 1, True),
    ):  # fmt: skip
        pipeline = SimpleNamespace(transforms=[LoadAnnotations()])
        names = dict(classes=tuple(map(str, range(classes))))
        data = SimpleNamespace(pipeline=pipeline, metainfo=names, ignore_index=50)
        loader = SimpleNamespace(dataset=data)
        runner = SimpleNamespace(model=head, train_dataloader=loader, val_loop=None, cfg=Config())
        CheckAnnotationsHook().before_train(runner)
        mask = np.array([[0, label]], np.uint8)
        results = dict(gt_seg_map=mask, reduce_zero_label=False, ori_shape=(1, 2))
        if fine:
            assert pipeline.transforms[0](results) is results
        else:
            with pytest.raises(AnnotationError, match='the label 8, but there are 8 classes'):
                pipeline.transforms[0](results)
    pipeline.transforms[0].load = lambda results: None  # MMEngine takes another image
    assert pipeline.transforms[0](results) is None


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
    assert 'holds no files' in found and 'classes' not in found


def test_images_of_a_suffix_that_is_not_read(whole, tmp_path):
    config = write_config(whole, tmp_path, 'ade20k')
    for path in files(tmp_path / 'data', 'images'):
        path.rename(path.with_suffix('.webp'))
    found = message_of(config, tmp_path / 'work', {})
    assert found.startswith(f'train_dataloader of {config} is empty: no image was found. Sought')
    assert 'files in .jpg (img_suffix of the data set); ' in found and 'holds 2 of .webp' in found


def test_classes_without_images(tmp_path):
    """MMPretrain's own message names the folder in a dictionary, and no setting."""
    from mmpretrain.datasets import CustomDataset

    for name in ('a', 'b'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / '1.webp').write_bytes(b'')
    data = dict(data_root=str(tmp_path / 'data'))
    cfg = Config(dict(val_dataloader=dict(dataset=dict(data, type='CustomDataset'))))
    with pytest.raises(CommandError) as info, faults_explained(cfg):
        CustomDataset(**data)
    assert 'is empty: no image was found. Sought are files in .bmp, .jpeg' in str(info.value)
    for part in ('(extensions of the data set) in a folder for each class', 'holds 2 of .webp'):
        assert part in str(info.value)


def test_classes_of_which_images_are_left_out(tmp_path, log):
    """MMPretrain says nothing unless a folder has no others."""
    from mmpretrain.datasets import CustomDataset

    (tmp_path / 'data/a').mkdir(parents=True)
    for name in ('1.jpg', '2.PNG', '3.webp', '4.TIFF', 'note.txt', '.5.webp'):
        (tmp_path / 'data/a' / name).write_bytes(b'')
    dataset = CustomDataset(data_root=str(tmp_path / 'data'))
    listed = CustomDataset(data_root=str(tmp_path / 'data'), ann_file='x', lazy_init=True)
    loader = SimpleNamespace(dataset=SimpleNamespace(datasets=[dataset, listed]))
    model = SimpleNamespace(modules=lambda: [])
    runner = SimpleNamespace(model=model, test_dataloader=loader, cfg=Config())
    with log() as said:
        CheckAnnotationsHook().before_test(runner)
    (text,) = said
    assert f'2 images of the test data are left out, such as {tmp_path}/data/a/3.webp: ' in text
    assert "'.tif'] of the data set" in text
    for name in ('3.webp', '4.TIFF'):
        (tmp_path / 'data/a' / name).unlink()
    (tmp_path / 'data/a/6.jpg').symlink_to('nothing')
    with log() as said:
        CheckAnnotationsHook().before_test(runner)
    (text,) = said
    assert f'1 links in the test data are left out, such as {tmp_path}/data/a/6.jpg: ' in text


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    """Not as root, who runs tests, but as anybody else."""
    from mmpretrain.datasets import CustomDataset

    (tmp_path / 'data/a').mkdir(parents=True)
    (tmp_path / 'data/a/1.jpg').write_bytes(b'')
    data = dict(data_root=str(tmp_path / 'data'))
    cfg = Config(dict(train_dataloader=dict(dataset=dict(data, type='CustomDataset'))))

    def refuse(path, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    with monkeypatch.context() as patch:
        patch.setattr('os.scandir', refuse)
        with pytest.raises(CommandError) as info, faults_explained(cfg):
            CustomDataset(**data)
    assert str(info.value).startswith(f'{tmp_path}/data/: Permission denied; it must be there, of')
    with monkeypatch.context() as patch:
        patch.setattr('os.stat', refuse)
        with pytest.raises(PermissionError):  # nothing is missing
            check_data(cfg, ('train',))


LINES = {  # lists of MMPretrain
    'no label': (b'a.jpg 0\nb.jpg\n', "line 2 is 'b.jpg', but must be a name, a blank and a label"),
    'no int': (b'a.jpg 0\nb c.jpg 1.5', "line 2 is 'b c.jpg 1.5', but"),
    'tab': (b'a.jpg\t0\n', r"line 1 is 'a.jpg\t0', but"),
    'blank': (b'a.jpg 0\n\nb.jpg 1\n', "line 2 is '', but"),
    'Latin-1': (b'a.jpg 0\n\xe9.jpg 1\n', 'line 2 is no UTF-8; save'),
    'mark': (b'\xef\xbb\xbfa.jpg 0\n', 'begins with a byte order mark; save'),
    'whole': ('b \xe9.jpg 0\r\na.jpg  1\n'.encode(), None),
}


@pytest.mark.parametrize('name', LINES)
def test_lists(tmp_path, name):
    from mmpretrain.datasets import ImageNet

    content, message = LINES[name]
    (tmp_path / 'meta').mkdir()
    path = tmp_path / 'meta/train.txt'
    path.write_bytes(content)
    dataset = dict(type='ImageNet', data_root=str(tmp_path), ann_file='meta/train.txt')
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset)))
    if message is None:
        check_data(cfg, ('train',))
        return
    with pytest.raises(CommandError) as info:
        check_data(cfg, ('train',))
    assert f'{path} cannot be used: ' in str(info.value) and message in str(info.value)
    dataset['with_label'] = False
    check_data(Config(dict(cfg, train_dataloader=dict(dataset=dataset))), ('train',))
    if name != 'mark':
        with pytest.raises(CommandError) as info, faults_explained(cfg):
            ImageNet(data_root=str(tmp_path), split='train')  # which finds its list by itself
        assert f'{path} cannot be used: ' in str(info.value) and message in str(info.value)


def test_files_in_the_place_of_folders(tmp_path):
    """And the other way round, or pipes, at which a run would wait for ever."""
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    for kind, settings, message in (
        (
            'ImageNet',
            dict(data_prefix='file'),
            'file is a file; data_root and data_prefix in train',
        ),
        ('CocoDataset', dict(ann_file='folder'), 'folder is a folder; ann_file in train_dataload'),
        ('CocoDataset', dict(ann_file='pipe'), 'pipe is neither a file nor a folder; put the'),
        ('Other', dict(ann_file='pipe'), 'pipe is neither a file nor a folder; put the'),
        ('Other', dict(ann_file='folder', data_prefix='file'), None),
    ):
        dataset = dict(type=kind, data_root=str(tmp_path), **settings)
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        if message is None:
            check_data(cfg, ('train',))
            continue
        with pytest.raises(CommandError) as info:
            check_data(cfg, ('train',))
        assert str(info.value).startswith(f'{tmp_path}/{message}')


def test_links_that_lead_back(whole, tmp_path):
    config = write_config(whole, tmp_path, 'ade20k')
    for kind in ('annotations', 'images'):  # of which only the second is walked through
        folder = files(tmp_path / 'data', kind)[0].parent
        (folder / 'again').symlink_to(folder)
        if kind == 'annotations':
            check_pairs([segmentation_data(tmp_path / 'data')], 'train', [])
    found = message_of(config, tmp_path / 'work', {})
    assert found.startswith(f'{folder}/again is a link that leads back to where it is')
    assert found.endswith('remove it')


def test_links_that_lead_back_to_each_other(tmp_path):
    """Two at every level: MMEngine would follow them through 2**40 folders."""
    for name in ('a', 'b', 'shared'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / '1.jpg').write_bytes(b'')
    dataset = dict(type='CustomDataset', data_root=str(tmp_path / 'data'))
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset)))
    for name in ('a', 'b'):
        (tmp_path / 'data' / name / 'more').symlink_to('../shared')
    check_data(cfg, ('train',))
    for one, other in ('ab', 'ba'):
        (tmp_path / 'data' / one / 'other').symlink_to(f'../{other}')
    with pytest.raises(CommandError, match=r'data/(a|b)/\S*other is a link that leads back to'):
        check_data(cfg, ('train',))


def files(data, kind, split='train'):
    return sorted(data.rglob(f'{kind}/*{split}*/*.*'))


def no_mask(data):
    files(data, 'annotations')[1].unlink()
    return files(data, 'images')[1].with_suffix('.png')


def no_mask_of_validation(data):
    (mask,) = files(data, 'annotations', 'val')
    mask.unlink()


def other_masks(data):
    for mask in files(data, 'annotations'):
        mask.rename(mask.with_suffix('.bmp'))


def link_to_nothing(data):
    mask = files(data, 'annotations')[0]
    mask.unlink()
    mask.symlink_to('nothing')


def pipe(data):
    """At which a run would wait for ever."""
    image = files(data, 'images')[0]
    (data / 'list.txt').write_text(f'{image.stem}\n')
    image.unlink()
    os.mkfifo(image)


FILES_OF_MASKS = {
    'link to nothing': (link_to_nothing, '1 of 2 masks of the train data are not there'),
    'pipe': (pipe, '1 of 1 images of the train data are not there, or no files, such as'),
    'no mask': (no_mask, '1 of 2 masks of the train data are not there', 'for the image'),
    'no mask of validation': (no_mask_of_validation, '1 of 1 masks of the val data are not'),
    'other suffix': (other_masks, '2 of 2 masks', "with seg_map_suffix='.png' in the place of"),
}


@pytest.mark.parametrize('name', FILES_OF_MASKS)
def test_masks_that_are_not_there(whole, tmp_path, name):
    change, *parts = FILES_OF_MASKS[name]
    config = write_config(whole, tmp_path, 'ade20k')
    change(tmp_path / 'data')
    listed = (tmp_path / 'data/list.txt').exists()
    options = {'train_dataloader.dataset.ann_file': 'list.txt'} if listed else {}
    found = message_of(config, tmp_path / 'work', options)
    for part in [*parts, f'such as {tmp_path}/data/', 'img_suffix', 'mend these settings']:
        assert part in found, found


@pytest.mark.parametrize('split', ['train', 'val'])
def test_images_that_are_not_there(whole, tmp_path, split):
    """Which MMDetection would notice when their turn comes, after hours perhaps."""
    config = write_config(whole, tmp_path, 'coco')
    image = min((tmp_path / 'data' / split).iterdir())
    image.unlink()
    found = message_of(config, tmp_path / 'work', {})
    assert f'1 of {2 if split == "train" else 1} images of the {split} data are not' in found
    for part in (f'such as {image}. Mend', 'data_prefix', f'annotations/instances_{split}.json'):
        assert part in found, found
    assert not [*tmp_path.rglob('*.pth')]


def test_images_that_a_list_of_labels_names(tmp_path):
    from mmpretrain.datasets import CustomDataset

    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/1.jpg').write_bytes(b'')
    (tmp_path / 'list.txt').write_text(''.join(f'a/{i}.jpg 0\n' for i in range(1, 6)))
    options = dict(data_root=str(tmp_path), pipeline=[dict(type='LoadImageFromFile')])
    listed = CustomDataset(**options, ann_file='list.txt')
    message = f'4 of 5 images of the test data .*such as {tmp_path}/a/2.jpg, .*/a/4.jpg. Mend data'
    with pytest.raises(MissingFileError, match=message):
        check_pairs([listed], 'test', [])
    for i in range(2, 6):
        (tmp_path / f'a/{i}.jpg').symlink_to('1.jpg')
    check_pairs([listed, CustomDataset(**options)], 'test', [])


def test_images_that_a_list_names(whole, tmp_path):
    """With their suffixes, which MMSegmentation adds once more."""
    config = write_config(whole, tmp_path, 'ade20k')
    (tmp_path / 'list.txt').write_text(
        ''.join(f'{path.name}\n' for path in files(tmp_path / 'data', 'images'))
    )
    options = {'train_dataloader.dataset.ann_file': str(tmp_path / 'list.txt')}
    found = message_of(config, tmp_path / 'work', options)
    assert '2 of 2 images of the train data are not there' in found and '.jpg.jpg' in found
    assert f'The lines of {tmp_path}/list.txt are names without suffixes' in found


def segmentation_data(folder, img='images/training', ann='annotations/training', **kwargs):
    from mmseg.datasets import BaseSegDataset

    prefix = dict(img_path=img, seg_map_path=ann)
    pipeline = [dict(type='LoadAnnotations', _scope_='mmseg')]
    return BaseSegDataset(data_root=str(folder), data_prefix=prefix, pipeline=pipeline, **kwargs)


def pairs_of(folder, images, masks, log, other=(), masks_in='ann', **kwargs):
    """What is said of files of these names."""
    for name in images:
        (folder / 'img').mkdir(exist_ok=True)
        (folder / 'img' / name).write_bytes(b'')
    for name in masks:
        (folder / 'ann').mkdir(exist_ok=True)
        (folder / 'ann' / name).write_bytes(b'')
    with log() as said:
        check_pairs(
            [segmentation_data(folder, 'img', masks_in, **kwargs)],
            'train',
            [f'{folder}/{name}/' for name in other],
        )
    return said


@pytest.fixture
def log(monkeypatch):
    @contextlib.contextmanager
    def said():
        texts = []
        with monkeypatch.context() as patch:
            patch.setattr(
                'mmbiformer.engine.check_pairs.print_log', lambda text, **kw: texts.append(text)
            )
            yield texts

    return said


def test_images_of_another_suffix(tmp_path, log):
    """Which MMSegmentation leaves out without a word."""
    (text,) = pairs_of(tmp_path, ['a.jpg', 'b.JPG', 'c.jpeg'], ['a.png', 'b.png', 'c.png'], log)
    assert f'2 images of the train data are left out, such as {tmp_path}/img/b.JPG' in text
    assert "do not end in img_suffix='.jpg'" in text


def test_masks_without_an_image(tmp_path, log):
    (text,) = pairs_of(tmp_path, ['a.jpg', 'b1.jpg'], ['a.png', 'b1.png', 'b12.png'], log)
    assert f'1 masks of the train data are left out, such as {tmp_path}/ann/b12.png' in text
    assert f'{tmp_path}/img has no images of their names' in text


def test_files_that_need_no_partner(tmp_path, log):
    """Masks of other data in one folder, pictures of masks, files of other kinds, subsets."""
    files = ['a.jpg', 'b.jpg', 'b.txt'], ['a.png', 'a_colour.png', 'b.png', '._c.png', 'note.txt']
    assert pairs_of(tmp_path, *files, log) == []
    assert pairs_of(tmp_path, *files, log, indices=1) == []
    assert pairs_of(tmp_path, [], ['c.png'], log, other=['ann']) == []
    (tmp_path / 'list.txt').write_text('a\n')
    assert pairs_of(tmp_path, [], [], log, ann_file='list.txt') == []


def test_masks_beside_their_images(tmp_path, log):
    for i, (names, suffixes) in enumerate(
        [
            (['a_image.png', 'a.png'], dict(img_suffix='_image.png')),
            (['a.jpg', 'a.png'], dict()),
            (['a.png', 'a_mask.png'], dict(img_suffix='a.png', seg_map_suffix='a_mask.png')),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        assert pairs_of(tmp_path / str(i), names, [], log, masks_in='img', **suffixes) == []


def test_remote_masks(tmp_path, log):
    """Are not sought."""
    backend = dict(backend='local')
    assert pairs_of(tmp_path, ['a.jpg'], [], log, backend_args=backend) == []


def test_files_that_only_the_data_set_knows(tmp_path):
    """Where paths or items are not what is listed, nothing is sought."""
    from mmseg.datasets import BaseSegDataset

    class Twice(BaseSegDataset):
        def __len__(self):
            return 2 * super().__len__()

    class Folders(BaseSegDataset):
        def load_data_list(self):
            folders = self.data_prefix['img_path'], self.data_prefix['seg_map_path']
            paths = (f'{folder[0]}/a' for folder in folders)
            return [dict(zip(('img_path', 'seg_map_path'), paths, strict=True))]

    class Elsewhere:
        def __call__(self, results):
            return dict(results, seg_map_path='elsewhere')

    load = dict(type='LoadAnnotations', _scope_='mmseg')
    (tmp_path / 'img').mkdir()
    for name in ('a', 'b'):
        (tmp_path / f'img/{name}.jpg').write_bytes(b'')
    options = dict(data_root=f'{tmp_path}', data_prefix=dict(img_path='img', seg_map_path='ann'))
    remote = dict(load, backend_args=dict(backend='local'))
    there = dict(data_prefix=dict(img_path=[f'{tmp_path}/img'], seg_map_path=[f'{tmp_path}/img']))
    (tmp_path / 'img/a').write_bytes(b'')
    for dataset in (
        Twice(**options, pipeline=[load]),
        Folders(**there, pipeline=[load]),
        BaseSegDataset(**options, pipeline=[Elsewhere(), load]),
        BaseSegDataset(**options, pipeline=[remote]),
    ):
        check_pairs([dataset], 'train', [])
    with pytest.raises(ValueError, match='2 of 2 masks'):
        check_pairs([BaseSegDataset(**options, pipeline=[load])], 'train', [])


@pytest.mark.parametrize('form', ['coco', 'ade20k'])
def test_whole_data_train(whole, tmp_path, form):
    """Nothing is said of them: the run ends by itself."""
    config = write_config(whole, tmp_path, form)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        message_of(config, tmp_path / 'work', {})
