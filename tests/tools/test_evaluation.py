"""What tools/test.py writes, host by host, and the configs that it must take."""

import pickle

import pytest
import torch
from mmengine.config import Config

from mmbiformer.commands.runner import build_model
from mmbiformer.shapes import CLASSES, SEGMENTATION_CLASSES, ShapesSpec, make_shapes
from tests.helpers.configs import write_toy, write_toy_maskrcnn
from tests.helpers.in_process import NUMBERS, run_tool, train
from tests.helpers.toy_training import config_text

# For each host: a recipe, the layout of its data, and what is changed for a few small images.
EVALUATED = {
    'mmpretrain': (
        'biformer_t_in1k',
        'imagenet',
        f"""
model['head'] = dict(num_classes=7)
data_preprocessor = dict(num_classes=7)
test_dataloader = dict(**no_workers, batch_size=2, dataset=dict(
    data_root=data_root, metainfo=dict(classes={sorted(CLASSES)})))
""",
    ),
    'mmdet': (
        'retinanet_biformer_t_coco',
        'coco',
        f"""
model['bbox_head'] = dict(num_classes=7)
model['test_cfg'] = dict(score_thr=0.0, max_per_img=5)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (96, 96)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0][0].scale = (96, 96)
test_dataloader = dict(**no_workers, batch_size=1, dataset=dict(
    pipeline=test_pipeline, data_root=data_root,
    ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
    metainfo=dict(classes={CLASSES})))
test_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
""",
    ),
    'mmseg': (
        'sfpn_biformer_t_ade20k',
        'ade20k',
        f"""
model['decode_head'] = dict(num_classes=8)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (96, 96)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [dict(type='Resize', scale=(n, n)) for n in (64, 96)]
test_dataloader = dict(**no_workers, dataset=dict(
    type='BaseSegDataset', data_root=data_root, pipeline=test_pipeline, reduce_zero_label=True,
    metainfo=dict(classes={SEGMENTATION_CLASSES}, palette={[[i] * 3 for i in range(8)]})))
""",
    ),
}


@pytest.fixture(scope='module', params=EVALUATED)
def evaluated(request, tmp_path_factory):
    """A host, a config and a checkpoint of random weights."""
    base, layout, changes = EVALUATED[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    objects = (1, 1) if layout == 'imagenet' else (2, 4)
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50), objects=objects)
    make_shapes(folder / 'data', 1, 2, spec=spec, progress=False, format=layout)
    config = write_toy(folder, base, f"data_root = '{folder}/data'\n{changes}")
    model = build_model(Config.fromfile(config))
    torch.save(dict(meta={}, state_dict=model.state_dict()), folder / 'model.pth')
    return request.param, config, folder / 'model.pth'


def evaluate(config, checkpoint, work, *options, **kwargs):
    """Run tools/test.py. MMEngine keeps one log and one visualizer of a name for the process."""
    name = f'test{next(NUMBERS)}'
    names = ['--cfg-options', f'experiment_name={name}']
    if 'visualizer' in Config.fromfile(config):
        names.append(f'visualizer.name={name}')
    return run_tool('test', config, checkpoint, '--work-dir', work, *options, *names, **kwargs)


@pytest.mark.parametrize('augment', [False, True])
def test_predictions_and_pictures(evaluated, augment, tmp_path):
    """Each host has its own way of writing them, and of augmenting."""
    host, config, checkpoint = evaluated
    options = ['--out', tmp_path / 'out.pkl']
    options += ['--tta'] if augment else []
    # MMPretrain cannot paint augmented images.
    paints = not augment or host != 'mmpretrain'
    options += ['--show-dir', tmp_path / 'show'] if paints else []
    evaluate(config, checkpoint, tmp_path / 'work', *options)
    with (tmp_path / 'out.pkl').open('rb') as file:
        samples = pickle.load(file)
    assert len(samples) == 2
    dense = 'seg_logits', 'gt_sem_seg', 'gt_instances'
    assert not [name for sample in samples for name in dense if name in sample]
    pictures = [p for p in (tmp_path / 'show').rglob('*') if p.suffix in ('.png', '.jpg')]
    assert len(pictures) == (2 if paints else 0)


@pytest.mark.parametrize('evaluated', ['mmseg'], indirect=True)
def test_label_maps_in_a_folder(evaluated, tmp_path):
    """As MMSegmentation's own tools/test.py writes them; with two evaluators."""
    _, config, checkpoint = evaluated
    two = config.with_name('two.py')
    two.write_text(
        f"_base_ = './{config.name}'\n"
        "test_evaluator = [_base_.test_evaluator, dict(_base_.test_evaluator, prefix='again')]\n"
    )
    evaluate(two, checkpoint, tmp_path / 'work', '--out', tmp_path / 'maps')
    assert len([*(tmp_path / 'maps').glob('*.png')]) == 2


def test_masks_are_kept_as_run_lengths(tmp_path):
    """As mmdet's own tools/test.py writes them, without the ground truth."""
    spec = ShapesSpec(size=(64, 64), shape_size=(16, 50))
    make_shapes(tmp_path / 'data', 1, 1, spec=spec, progress=False)
    config = write_toy_maskrcnn(tmp_path, "model['test_cfg'] = dict(rcnn=dict(score_thr=0.0))")
    model = build_model(Config.fromfile(config))
    torch.save(dict(meta={}, state_dict=model.state_dict()), tmp_path / 'model.pth')
    evaluate(config, tmp_path / 'model.pth', tmp_path / 'work', '--out', tmp_path / 'out.pkl')
    with (tmp_path / 'out.pkl').open('rb') as file:
        (sample,) = pickle.load(file)
    assert 'gt_instances' not in sample
    masks = sample['pred_instances']['masks']
    assert len(masks) == len(sample['pred_instances']['scores']) > 0
    assert all(mask['size'] == [64, 64] and isinstance(mask['counts'], bytes) for mask in masks)
    out = evaluate(config, tmp_path / 'model.pth', tmp_path / 'work', '--tta', status=2)
    assert 'MMDetection cannot merge masks of augmented images' in out


# Configs of trainings

TEST = """
test_dataloader = val_dataloader
test_evaluator = val_evaluator
test_cfg = dict()
"""
STOPS = """
custom_hooks = [dict(type='EarlyStoppingHook', monitor='toy', rule='greater')]
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A toy training of one epoch."""
    folder = tmp_path_factory.mktemp('trained')
    config = folder / 'toy.py'
    config.write_text(config_text() + TEST)
    train(config, folder / 'work', '--cfg-options', 'train_cfg.max_epochs=1')
    return config, folder / 'work'


def test_early_stopping(trained, tmp_path):
    """Its hook is in the config, and has nothing to do."""
    config, work = trained
    stops = tmp_path / 'stops.py'
    stops.write_text(config.read_text() + STOPS)
    assert 'toy: ' in evaluate(stops, work / 'epoch_1.pth', tmp_path / 'work')


def test_config_of_a_resumed_training(trained, tmp_path):
    """The one that it leaves in its work folder says resume=True."""
    config, work = trained
    options = ('--resume', work / 'epoch_1.pth', '--cfg-options', 'train_cfg.max_epochs=2')
    train(config, tmp_path / 'resumed', *options)
    (left,) = (tmp_path / 'resumed').glob('*.py')
    assert Config.fromfile(left).resume is True
    assert 'toy: ' in evaluate(left, work / 'epoch_1.pth', tmp_path / 'work')


def test_flexible_runner(trained, tmp_path):
    config, work = trained
    options = '--cfg-options', 'runner_type=FlexibleRunner'
    assert 'toy: ' in evaluate(config, work / 'epoch_1.pth', tmp_path / 'work', *options)
