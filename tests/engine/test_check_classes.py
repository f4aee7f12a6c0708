"""Data, model and checkpoint must number classes alike, in every host."""

import json
from types import SimpleNamespace

import pytest
from mmdet.datasets import CocoDataset, ConcatDataset
from mmengine.dataset import RepeatDataset
from mmpretrain.datasets import CustomDataset
from torch import nn

from mmbiformer.engine import CheckClassesHook
from mmbiformer.engine.hooks import ClassCountError
from tests.helpers.configs import build_without_memory, load

RECIPES = {  # the number of classes, and all that must be changed for another
    'maskrcnn_biformer_t_coco': (80, ['roi_head.bbox_head', 'roi_head.mask_head']),
    'retinanet_biformer_t_coco': (80, ['bbox_head']),
    'upernet_biformer_t_ade20k': (150, ['decode_head', 'auxiliary_head']),
    'biformer_t_in1k': (1000, ['head', 'data_preprocessor']),
}


def names(count):
    return tuple(f'class {i}' for i in range(count))


def data(classes, **kwargs):
    return SimpleNamespace(metainfo=dict(classes=classes, **kwargs))


def runner_of(model, train, val=None, resume=False):
    loaders = {
        f'{split}_dataloader': SimpleNamespace(dataset=dataset)
        for split, dataset in (('train', train), ('val', val), ('test', val or train))
    }
    return SimpleNamespace(model=model, val_loop=val, _resume=resume, **loaders)


def model_of(**counts):
    """A model with parts of these numbers of classes; a double underscore stands for a dot."""
    model = nn.Module()
    for path, count in counts.items():
        part = model
        for name in path.split('__'):
            if not hasattr(part, name):
                part.add_module(name, nn.Module())
            part = getattr(part, name)
        part.num_classes = count
    return model


def check(model, train, val=None, checkpoint=None):
    """What a training, and the test of a checkpoint if there is one, are checked for."""
    hook = CheckClassesHook()
    if checkpoint is not None:
        hook.after_load_checkpoint(None, checkpoint)
        hook.before_test(runner_of(model, train, val))
    hook.before_train(runner_of(model, train, val, resume=checkpoint is not None))


@pytest.mark.parametrize('recipe', RECIPES)
def test_number_of_classes(recipe):
    cfg = load(recipe)
    if 'data_preprocessor' in cfg:  # as the Runner does
        cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build_without_memory(cfg)
    count, parts = RECIPES[recipe]
    check(model, data(names(count)), data(names(count)))
    for other in (count - 1, count + 1):
        with pytest.raises(ClassCountError) as info:
            check(model, data(names(other)))
        found = str(info.value)
        assert f'train data have {other} classes (class 0, class 1, class 2, …)' in found
        assert f'Set num_classes of each to {other}' in found
        listed = found.partition('the model has ')[2].partition('. Set')[0].split(', ')
        assert sorted(listed) == sorted(f'{part}.num_classes={count}' for part in parts)
    with pytest.raises(ClassCountError, match='the val data have 3 classes'):
        check(model, data(names(count)), data(names(3)))


@pytest.mark.parametrize('forgotten', ['bbox_head', 'mask_head'])
def test_one_of_two_places_is_forgotten(forgotten):
    counts = dict(roi_head__bbox_head=2, roi_head__mask_head=2)
    model = model_of(**{**counts, f'roi_head__{forgotten}': 80})
    with pytest.raises(ClassCountError, match=f'the model has roi_head.{forgotten}.num_classes=80'):
        check(model, data(names(2)))


ACCEPTED = {
    'RPN': (dict(bbox_head=1), names(80)),
    'boundary head of STDC': (
        dict(decode_head=19, auxiliary_head__0=19, auxiliary_head__1=2),
        names(19),
    ),
    'binary segmentation': (dict(decode_head=1, auxiliary_head=2), names(2)),
    'two detectors': (dict(student__bbox_head=80, teacher__bbox_head=80), names(80)),
    'cascade': (dict(roi_head__bbox_head__0=8, roi_head__bbox_head__1=8), names(8)),
    'other parts': (dict(rpn_head=1, reid__head=380, backbone__head=1000, semantic=183), names(8)),
    'no one-hot labels': (dict(head=7, data_preprocessor=1000), names(7)),
    'no names of classes': (dict(head=7), ()),
    'read names': (dict(bbox_head=256, language_model=0), names(80)),
}


@pytest.mark.parametrize('case', ACCEPTED)
def test_what_hosts_take(case):
    counts, classes = ACCEPTED[case]
    check(model_of(**counts), data(classes), data(classes), dict(meta={}))


def test_panoptic_data_and_masks_without_classes():
    check(model_of(bbox_head=80), data(names(133), thing_classes=names(80)))
    model = model_of(roi_head__mask_head=80)
    model.roi_head.mask_head.class_agnostic = True
    check(model, data(names(8)))


@pytest.mark.parametrize(
    ('train', 'other', 'wrong'),
    [
        ('abc', 'abc', None),
        ('abc', 'abx', None),  # renamed
        ('abc', 'ab', None),
        ('abca', 'acba', '[bc] is class'),
        ('ab', 'aba', None),  # two of one name
        ('abc', 'xab', 'a is class'),
    ],
)
def test_order_of_classes(train, other, wrong):
    """Of training and validation data, and of data and a checkpoint."""
    model = nn.Module()
    checkpoint = dict(meta=dict(dataset_meta=dict(classes=[*other])))
    several = dict(meta=dict(dataset_meta=[dict(classes=[*other])]))
    for more in (dict(val=data(tuple(other))), dict(checkpoint=checkpoint)):
        if wrong is None:
            check(model, data(tuple(train)), **more)
        else:
            with pytest.raises(ClassCountError, match=f'{wrong}.*the same order'):
                check(model, data(tuple(train)), **more)
    for odd in ({}, dict(meta={}), dict(meta=dict(dataset_meta=None))):
        check(model, data(tuple(train)), checkpoint=odd)
    if wrong:
        with pytest.raises(ClassCountError, match='of the checkpoint'):
            check(model, data(tuple(train)), checkpoint=several)


def folder_of(path, classes, **kwargs):
    """MMPretrain's data set of folders of classes."""
    for name in classes:
        (path / name).mkdir(parents=True)
        (path / name / 'image.jpg').touch()
    return CustomDataset(data_prefix=str(path), **kwargs)


def test_folders_of_classes(tmp_path):
    """They are numbered by their names, whatever metainfo calls the classes."""
    metainfo = dict(classes=('one', 'two'))
    model = model_of(head=2)
    train = folder_of(tmp_path / 'a', ['cat', 'dog'], metainfo=metainfo)
    same = folder_of(tmp_path / 'b', ['dog', 'cat'], metainfo=metainfo)
    other = folder_of(tmp_path / 'c', ['.old', 'cat'], metainfo=metainfo)
    check(model, train, same)
    with pytest.raises(ClassCountError, match=r'cat is class 1 of the val data \(.*/c\) .*remove'):
        check(model, train, other)
    checkpoint = dict(meta={})
    CheckClassesHook().before_save_checkpoint(runner_of(model, train), checkpoint)
    check(model, same, checkpoint=checkpoint)
    with pytest.raises(ClassCountError, match='but class 0 of the checkpoint'):
        check(model, other, checkpoint=checkpoint)
    swapped = folder_of(tmp_path / 'd', ['cat', 'dog'], metainfo=dict(classes=('dog', 'cat')))
    with pytest.raises(ClassCountError, match=r'cat is class 0 .*, but class 1 of the'):
        check(model, swapped)


def coco(path, categories, classes, palette=None):
    """MMDetection's data set of an annotation file with an image a category."""
    content = dict(
        info=dict(categories='none'),
        categories=[dict(id=3 + i, name=name) for i, name in enumerate(categories)],
        images=[dict(id=1, file_name='1.jpg', height=9, width=9)],
        annotations=[],
    )
    path.write_text(json.dumps(content))
    metainfo = dict(classes=tuple(classes), palette=palette)
    return CocoDataset(ann_file=str(path), metainfo=metainfo, data_prefix=dict(img=''))


def test_order_of_a_coco_file(tmp_path):
    """MMDetection numbers classes as the file lists its categories; the ids tell nothing."""
    model = model_of(bbox_head=3)
    good = coco(tmp_path / 'a.json', 'abc', 'abc')
    check(model, good, coco(tmp_path / 'b.json', 'xabc', 'abc'))
    bad = coco(tmp_path / 'c.json', 'acb', 'abc')
    assert bad.cat_ids == good.cat_ids
    for train, val in ((bad, None), (good, bad)):
        with pytest.raises(ClassCountError, match=r'c\.json\) list the category c where .* has b'):
            check(model, train, val)


def test_classes_that_a_coco_file_lacks(tmp_path):
    bad = coco(tmp_path / 'a.json', ['cat', 'dog'], ['cat', 'Dog'])
    message = r'the train data \(.*a\.json\) lack classes: Dog. The categories .* are cat, dog'
    with pytest.raises(ClassCountError, match=message):
        check(model_of(bbox_head=2), RepeatDataset(bad, 2))


def test_several_data_sets(tmp_path):
    """With other palettes their metainfo is a list."""
    first = coco(tmp_path / 'a.json', 'ab', 'ab', palette=[(0, 0, 0), (1, 1, 1)])
    second = coco(tmp_path / 'b.json', 'ab', 'ab', palette=[(2, 2, 2), (3, 3, 3)])
    both = ConcatDataset([first, second])
    assert isinstance(both.metainfo, list)
    checkpoint = dict(meta=dict(dataset_meta=both.metainfo))
    check(model_of(bbox_head=2), both, both, checkpoint)
    with pytest.raises(ClassCountError, match='have 2 classes'):
        check(model_of(bbox_head=3), both)
    other = ConcatDataset([first, coco(tmp_path / 'c.json', 'ba', 'ba')])
    with pytest.raises(ClassCountError, match='b is class 0 of the train data'):
        check(model_of(bbox_head=2), other)
