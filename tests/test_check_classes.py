"""Data and model must have the same classes, in every host."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from torch import nn

from mmbiformer.engine import CheckClassesHook, ClassCountError
from mmbiformer.engine.check_lists import LabelError
from mmbiformer.engine.checks import build_model

ROOT = Path(__file__).parent.parent
ALL = 'train', 'val', 'test'
TOY = dict(_delete_=True, depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)
RECIPES = {  # classes of the recipe, and all that must be changed for others
    'maskrcnn_biformer_t_coco': (80, ['roi_head.bbox_head', 'roi_head.mask_head']),
    'retinanet_biformer_t_coco': (80, ['bbox_head']),
    'upernet_biformer_t_ade20k': (150, ['decode_head', 'auxiliary_head']),
    'biformer_t_in1k': (1000, ['head', 'data_preprocessor']),
}


@pytest.fixture(scope='module', params=RECIPES)
def recipe(request):
    cfg = Config.fromfile(ROOT / 'configs' / f'{request.param}.py')
    cfg.merge_from_dict({'model.backbone.arch': TOY})
    return build_model(cfg), *RECIPES[request.param]


def runner_of(model, classes, val_classes=None, **metainfo):
    """What the hook sees of a runner."""

    def loader(count):
        names = tuple(f'class {i}' for i in range(count))
        return SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=names, **metainfo)))

    loaders = {f'{name}_dataloader': loader(classes) for name in ('train', 'test')}
    val = loader(val_classes or classes)
    return SimpleNamespace(model=model, val_loop=val, val_dataloader=val, **loaders)


def test_as_many(recipe):
    model, classes, _ = recipe
    for when in ('before_train', 'before_val', 'before_test'):
        getattr(CheckClassesHook(), when)(runner_of(model, classes))


@pytest.mark.parametrize('more', [-1, 1])
def test_more_or_fewer(recipe, more):
    model, classes, heads = recipe
    for when in ('before_train', 'before_val', 'before_test'):
        with pytest.raises(ClassCountError) as info:
            getattr(CheckClassesHook(), when)(runner_of(model, classes + more))
        found = str(info.value)
        assert f'have {classes + more} classes (class 0, class 1, class 2, …)' in found
        assert f'Set num_classes of each to {classes + more}' in found
        names = found.partition('the model has ')[2].partition('. Set')[0].split(', ')
        assert sorted(names) == sorted(f'{head}.num_classes={classes}' for head in heads)


def test_validation_data_are_looked_at_before_training(recipe):
    model, classes, _ = recipe
    with pytest.raises(ClassCountError, match='the val data have 3 classes'):
        CheckClassesHook().before_train(runner_of(model, classes, val_classes=3))


def test_what_does_not_say_its_classes(recipe):
    """Or divides them among its heads, as panoptic data do."""
    model = recipe[0]
    CheckClassesHook().before_test(runner_of(model, 0))
    CheckClassesHook().before_test(runner_of(model, 3, thing_classes=('class 0',)))


def test_order_of_classes(recipe):
    """Of two data sets, and of data and the checkpoint that is tested or resumed."""
    model, count, _ = recipe
    names = [f'class {i}' for i in range(count)]
    moved = [*names[:-2], 'class -1', names[-2]]
    for kind, expected in (
        ('the same', None),
        ('renamed', [*names[:-1], 'other']),
        ('moved', moved),
        ('two of one name', [names[1], *names[1:]]),
    ):
        runner = runner_of(model, count)
        hook = CheckClassesHook()
        if expected is not None:
            runner.val_dataloader.dataset.metainfo['classes'] = tuple(expected)
            checkpoint = dict(meta=dict(dataset_meta=dict(classes=expected)))
            hook.after_load_checkpoint(runner, checkpoint)
        calls = [hook.before_train, hook.before_test]
        for call in calls:
            if kind == 'moved':
                with pytest.raises(ClassCountError, match='same classes in the same order') as info:
                    call(runner)
                assert f'class {count - 2} is class ' in str(info.value)
            else:
                call(runner)
    for odd in ({}, dict(meta=3), dict(meta=dict(dataset_meta=dict(classes=5)))):
        hook.after_load_checkpoint(runner, odd)
        assert hook.trained == ()


def test_folders_of_classes():
    """Are numbered by their names, whatever metainfo calls the classes."""

    def runner_of_folders(train, val):
        classes = dict(classes=('cat', 'dog'))
        loaders = {}
        for split, names in (('train', train), ('val', val), ('test', val)):
            found = {} if names is None else {name: i for i, name in enumerate(sorted(names))}
            data = SimpleNamespace(metainfo=classes, img_prefix=f'data/{split}')
            if found:
                data.folder_to_idx = found
            loaders[f'{split}_dataloader'] = SimpleNamespace(dataset=data)
        return SimpleNamespace(model=nn.Module(), val_loop=1, **loaders)

    for val in (['a', 'b'], ['b', 'a'], None, ['a']):
        CheckClassesHook().before_train(runner_of_folders(['a', 'b'], val))
    CheckClassesHook().before_train(runner_of_folders(None, ['a', 'b']))
    runner = runner_of_folders(['a', 'b'], ['a', 'x', '.cache'])
    message = r'class 0 is the folder .cache in data/val \(val data\), but a in data/train \(train'
    with pytest.raises(ClassCountError, match=message):
        CheckClassesHook().before_train(runner)
    hook, checkpoint = CheckClassesHook(), dict(meta={})
    hook.before_save_checkpoint(runner, checkpoint)
    hook.before_test(runner)
    hook.after_load_checkpoint(runner, checkpoint)
    with pytest.raises(ClassCountError, match=r'\.cache in data/test .*, but a in the checkpoint'):
        hook.before_test(runner)


def test_data_sets_of_one_split():
    """Also without validation, and where ConcatDataset is told to ignore their classes."""

    def runner_of_sets(**kwargs):
        sets = [
            SimpleNamespace(
                img_prefix=f'data/{i}', **{name: values[i] for name, values in kwargs.items()}
            )
            for i in range(2)
        ]
        data = SimpleNamespace(datasets=sets, metainfo={})
        return SimpleNamespace(
            model=nn.Module(), val_loop=None, train_dataloader=SimpleNamespace(dataset=data)
        )

    same = runner_of_sets(folder_to_idx=[dict(a=0, b=1)] * 2, metainfo=[dict(classes='ab')] * 2)
    CheckClassesHook().before_train(same)
    folders = runner_of_sets(folder_to_idx=[dict(a=0, b=1), dict(b=0, c=1)])
    message = r'class 0 is the folder b in data/1 \(train data\), but a in data/0 \(train data\)'
    with pytest.raises(ClassCountError, match=message):
        CheckClassesHook().before_train(folders)
    classes = runner_of_sets(metainfo=[dict(classes=('a', 'b')), dict(classes=('b', 'a'))])
    message = (
        r'b is class 0 of one of the train data sets \(b, a\), but class 1 of another \(a, b\)'
    )
    with pytest.raises(ClassCountError, match=message):
        CheckClassesHook().before_train(classes)


@pytest.mark.parametrize('label', [-100, -1, 2, 1])
@pytest.mark.parametrize('classes', [None, ('a', 'b')])
def test_labels_of_lists(tmp_path, label, classes):
    """Losses and metrics say nothing of some. Without names of classes, the heads' number holds."""
    from mmpretrain.datasets import CustomDataset

    (tmp_path / 'list.txt').write_text(f'x.jpg 0\ny.jpg {label}\n')
    dataset = CustomDataset(
        ann_file='list.txt', data_root=str(tmp_path), metainfo=classes and dict(classes=classes)
    )
    model = nn.Sequential(nn.Identity())
    model[0].num_classes = 2
    loaders = {f'{split}_dataloader': SimpleNamespace(dataset=dataset) for split in ALL}
    runner = SimpleNamespace(model=model, val_loop=None, **loaders)
    for call in (CheckClassesHook().before_train, CheckClassesHook().before_test):
        if label == 1:
            call(runner)
        else:
            with pytest.raises(LabelError) as info:
                call(runner)
            for part in [
                f'{tmp_path}/list.txt: entry 2 of 2',
                'y.jpg, has',
                f'{label}, but',
                '0 t',
            ]:
                assert part in str(info.value)
