"""Configs whose parts do not fit together: one message before anything is written."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import train
from mmengine.config import Config

from mmbiformer.datasets import ShapesSpec, make_shapes
from mmbiformer.engine.checks import CommandError, check_parts
from mmbiformer.engine.command_line import drop_amp_without_gpu

ROOT = Path(__file__).parent.parent
CONFIG = """
_base_ = '{root}/configs/demo/{name}.py'
toy = dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)
model = dict(backbone=dict(arch=dict(toy, _delete_=True)))
"""
CONFIGS = [path.stem for path in ROOT.glob('configs/demo/*.py')]
# Which config, settings, and what must be said.
WIDTHS = {
    'neck': (
        'maskrcnn_toy.py', ['model.neck.in_channels=[64,128,256,256]'],
        'model.neck with in_channels=[64, 128, 256, 256] does not fit', 'to have 256 channels, but',
        'got 512 channels', '4 maps, of 64, 128, 256, 512 channels',
    ),
    'neck of fewer': (
        'retinanet_toy.py', ['model.neck.in_channels=[64,128,256]'],
        'model.neck with in_channels=[64, 128, 256] does not fit', '4 maps, of 64, 128, 256, 512',
    ),
    'neck of more': (
        'maskrcnn_toy.py', ['model.backbone.out_indices=(0,1,3)'],
        'model.neck with in_channels=[64, 128, 256, 512] does', '3 maps, of 64, 128, 512 channels',
    ),
    'out_channels': (
        'maskrcnn_toy.py', ['model.neck.out_channels=32'],
        'model.rpn_head with in_channels=96 does not', 'got 32 channels instead',
    ),
    'box head': (
        'maskrcnn_toy.py', ['model.roi_head.bbox_head.in_channels=16'],
        'model.roi_head.bbox_head with in_channels=16 does not', 'cannot be multiplied',
    ),
    'mask head': (
        'maskrcnn_toy.py', ['model.roi_head.mask_head.in_channels=16'],
        'model.roi_head.mask_head with in_channels=16 does not', 'to have 16 channels',
    ),
    'dense head': (
        'retinanet_toy.py', ['model.bbox_head.in_channels=16'],
        'model.bbox_head with in_channels=16 does not', 'to have 16 channels',
    ),
    'decode_head': (
        'upernet_toy.py', ['model.decode_head.in_channels=[64,128,256,128]'],
        'model.decode_head with in_channels=[64, 128, 256, 128] and in_index=[0, 1, 2, 3] does',
        'got 512 channels', 'of 64, 128, 256, 512 channels',
    ),
    'auxiliary_head': (
        'upernet_toy.py', ['model.auxiliary_head.in_channels=128'],
        'model.auxiliary_head with in_channels=128 and in_index=2 does', 'got 256 channels',
    ),
    'in_index': (
        'upernet_toy.py', ['model.auxiliary_head.in_index=4'],
        'model.auxiliary_head with in_channels=256 and in_index=4 does', '4 maps, of 64, 128, 256',
    ),
    'head of FPN': (
        'sfpn_toy.py', ['model.neck.out_channels=16'],
        'model.decode_head with in_channels=[', 'got 16 channels',
    ),
    'classifier': (
        'toy.py', ['model.head.in_channels=256'],
        'model.head with in_channels=256 does not', '(1x512 and 256x7)', 'maps, of 512 channels',
    ),
}  # fmt: skip

PARTS = {
    'metric': (
        'maskrcnn_toy.py', ['val_evaluator.metric=foo'], 'val_evaluator of', 'got foo',
    ),
    'masks': (
        'retinanet_toy.py', ["val_evaluator.metric=['bbox','segm']"],
        'val_evaluator of', "metric='segm' needs masks",
    ),
    'metrics': (
        'upernet_toy.py', ['val_evaluator.iou_metrics=[mIou]'],
        'val_evaluator of', "metrics ['mIou'] is not supported",
    ),
    'topk': (
        'toy.py', ['val_evaluator.topk=(1,100)'],
        'val_evaluator of', 'Top-100 accuracy is unavailable', 'categories is 7',
    ),
    'items': (
        'maskrcnn_toy.py', ['val_evaluator.metric_items=[mAP,mAP_90]'],
        'val_evaluator of', "metric_items has 'mAP_90', but there are ['mAP', ",
    ),
    'best of detection': (
        'maskrcnn_toy.py', ['default_hooks.checkpoint.save_best=bbox_mAP'],
        'default_hooks.checkpoint of', "save_best='bbox_mAP', but", "'coco/bbox_mAP'",
    ),
    'best of segmentation': (
        'upernet_toy.py', ['default_hooks.checkpoint.save_best=mIou',
                           'default_hooks.checkpoint.rule=greater'],
        'default_hooks.checkpoint of', "save_best='mIou', but", "['aAcc', 'mAcc', 'mIoU']",
    ),
    'best of classification': (
        'toy.py', ['default_hooks.checkpoint.save_best=accuracy/top5'],
        'default_hooks.checkpoint of', "save_best='accuracy/top5', but", "['accuracy/top1']",
    ),
    'metric of another': (
        'toy.py', ['val_evaluator.type=mmseg.IoUMetric'],
        'val_evaluator of', 'IoUMetric is a metric of mmseg', 'results of mmpretrain',
    ),
    'no evaluator': (
        'toy.py', ['val_evaluator=None'],
        'toy.py has val_dataloader and val_cfg, but no val_evaluator; set all of',
    ),
    'no loop': ('toy.py', ['test_cfg=None'], 'but no test_cfg; set all of'),
    'collate_fn': (
        'toy.py', ['train_dataloader.collate_fn.type=colate'],
        'train_dataloader of', 'colate is not in the function registry',
    ),
    'argument of collate_fn': (
        'toy.py', ['val_dataloader.collate_fn.size=3'], "default_collate takes no argument 'size'",
    ),
    'sampler': (
        'toy.py', ['train_dataloader.sampler.type=Samplr'], 'Samplr is not in the data sampler',
    ),
    'argument of sampler': (
        'toy.py', ['train_dataloader.sampler.shufle=True'],
        'train_dataloader of', "DefaultSampler takes no argument 'shufle'",
    ),
    'batch_sampler': (
        'retinanet_toy.py', ['train_dataloader.batch_sampler.type=Batches'],
        'train_dataloader of', 'Batches is not in the data sampler registry',
    ),
    'batch_size': ('toy.py', ['val_dataloader.batch_size=0'], 'val_dataloader of', 'batch_size=0'),
    'persistent_workers': (
        'toy.py', ['val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=True'],
        'val_dataloader of', 'persistent_workers option needs num_workers > 0',
    ),
    'argument of loader': (
        'toy.py', ['train_dataloader.bach_size=3'], 'train_dataloader of', "argument 'bach_size'",
    ),
    'loop': ('toy.py', ['train_cfg.max_epoch=3'], 'train_cfg of', "argument 'max_epoch'"),
    'loop of validation': ('toy.py', ['val_cfg.type=Val'], 'val_cfg of', 'Val is not in the loop'),
    'two loops': (
        'toy.py', ['train_cfg.type=EpochBasedTrainLoop'], 'one of by_epoch=True, by_epoch=False',
    ),
    'no end': ('toy.py', ['train_cfg.by_epoch=False'], 'by_epoch=False needs max_iters'),
    'hook': ('toy.py', ['default_hooks.timer.type=Tmer'], 'default_hooks.timer of', 'Tmer is not'),
    'optimizer': ('toy.py', ['optim_wrapper.optimizer.type=Adm'], 'optim_wrapper of', 'Adm is not'),
    'arch': ('toy.py', ['model.backbone.arch.topks=(1,17,16,-1)'], 'topk=17', 'a finer region_gr'),
    'grid': ('toy.py', ['model.backbone.region_grid=abc'], "region_grid='abc' must be a positive"),
}  # fmt: skip


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A folder whose data/ is as the demo's configs expect it, with two images a split."""
    folder = tmp_path_factory.mktemp('misfits')
    spec = ShapesSpec(size=(64, 64), shape_size=(20, 50), objects=(1, 1))
    for suffix, kind in (('', 'coco'), ('_ade20k', 'ade20k'), ('_imagenet', 'imagenet')):
        make_shapes(folder / f'data/shapes{suffix}', 2, 2, spec=spec, progress=False, format=kind)
    for name in CONFIGS:
        path = folder / f'{name.partition("biformer")[0]}toy.py'
        path.write_text(CONFIG.format(root=ROOT, name=name))
    return folder


@pytest.fixture
def message(data, monkeypatch):
    """What a training says that ends before anything is written."""

    def run(config, options, *args):
        monkeypatch.chdir(data)
        before = sorted(data.rglob('*'))
        found = train(config, 'work', *args, '--cfg-options', *options, status=2)
        assert 'error: ' in found and config in found
        assert 'Traceback' not in found
        assert sorted(data.rglob('*')) == before
        return found

    return run


@pytest.mark.parametrize('name', [*WIDTHS, *PARTS])
def test_one_message(name, message):
    config, options, *parts = {**WIDTHS, **PARTS}[name]
    found = message(config, options)
    for part in parts:
        assert part in found, found


def test_nothing_is_drawn_or_learnt(data, monkeypatch):
    """The run must not notice that an image went through the model."""
    monkeypatch.chdir(data)
    cfg = Config.fromfile('maskrcnn_toy.py')
    drop_amp_without_gpu(cfg)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    check_parts(cfg)
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())


def test_what_the_image_may_be_too_small_for(data, monkeypatch):
    """Or lacks; the data of the run have it."""
    monkeypatch.chdir(data)
    cfg = Config.fromfile('upernet_toy.py')
    cfg.model.backbone.update(padding='projected', region_grid=16)  # takes 256 pixels
    check_parts(cfg)
    cfg = Config.fromfile('upernet_toy.py')
    cfg.model.auxiliary_head.loss_decode.class_weight = [1.0]
    check_parts(cfg)


@pytest.mark.parametrize(
    ('config', 'best'),
    [
        ('maskrcnn_toy.py', ['coco/bbox_mAP', 'coco/segm_mAP_s']),
        ('upernet_toy.py', 'mIoU'),
        ('toy.py', 'accuracy/top1'),
        ('toy.py', 'auto'),
    ],
)
def test_what_is_best(config, best, data, monkeypatch):
    monkeypatch.chdir(data)
    cfg = Config.fromfile(config)
    drop_amp_without_gpu(cfg)
    cfg.default_hooks.checkpoint.save_best = best
    check_parts(cfg)
    cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='mAP')]
    with pytest.raises(CommandError, match=r"custom_hooks of .* monitor='mAP', but val_evaluator"):
        check_parts(cfg)
    cfg.custom_hooks = []
    cfg.default_hooks.checkpoint.update(save_best='abc', rule='less')
    with pytest.raises(CommandError, match="save_best='abc', but val_evaluator gives"):
        check_parts(cfg)
    if config == 'toy.py':
        cfg.val_evaluator = dict(type='MultiLabelMetric')  # of which nothing is known
        check_parts(cfg)


def test_no_sampler(data, monkeypatch):
    """None would do."""
    monkeypatch.chdir(data)
    cfg = Config.fromfile('toy.py')
    cfg.train_dataloader.sampler = None
    check_parts(cfg)
    del cfg.train_dataloader['sampler']
    with pytest.raises(CommandError, match=r'train_dataloader of .* has no sampler = dict'):
        check_parts(cfg)
