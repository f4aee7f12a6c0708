"""The hosts' inferencers on our configs, with the Runner's checkpoints and the authors'."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope

from mmbiformer.registry import MODELS
from tests.helpers.goldens import Golden

CONFIGS = Path(__file__).parents[2] / 'configs'
RESIZE = dict(type='Resize', scale=(96, 64), keep_ratio=True)


@pytest.fixture(autouse=True)
def no_default_scope():
    """MMEngine's default scope is global: an earlier test's would be the inferencers' too."""
    DefaultScope._instance_dict.clear()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


@pytest.fixture
def small(tmp_path):
    """Write a config with small images, and random weights; give their paths and the weights."""

    def write(name, pipeline, **options):
        config, weights = tmp_path / f'{name}.py', tmp_path / 'weights.pth'
        options['test_dataloader'] = dict(dataset=dict(pipeline=pipeline))
        lines = [f'_base_ = {str(CONFIGS / f"{name}.py")!r}']
        config.write_text('\n'.join([*lines, *(f'{k} = {v!r}' for k, v in options.items())]))
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        state_dict = MODELS.build(cfg.model).state_dict()
        torch.save(dict(meta={}, state_dict=state_dict), weights)
        return str(config), str(weights), state_dict

    return write


@pytest.mark.parametrize(
    ('golden', 'config', 'key'),
    [
        ('biformer_tiny_cls', 'biformer_t_in1k', 'model'),
        ('bixt_ti_l64_p16', 'bixt_ti_l64_p16_in1k', 'state_dict'),
        ('bixt_ti_l64_p16', 'bixt_ti_l64_p16_ft384_in1k', 'state_dict'),
    ],
)
def test_classification(golden, config, key, picture, tmp_path):
    apis = pytest.importorskip('mmpretrain.apis')
    path = tmp_path / 'best.pth'
    theirs = Golden(golden).released()
    torch.save({key: theirs, 'epoch': 299}, path)
    config = str(CONFIGS / f'{config}.py')
    inferencer = apis.ImageClassificationInferencer(config, pretrained=str(path), device='cpu')
    (result,) = inferencer(picture)
    assert result['pred_scores'].shape == (1000,)
    assert isinstance(result['pred_class'], str)  # the authors' order of classes is ImageNet's
    assert torch.equal(inferencer.model.head.fc.bias, theirs['head.bias'])


def test_detection(picture, small):
    apis = pytest.importorskip('mmdet.apis')
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pipeline = [dict(type='LoadImageFromFile'), RESIZE, dict(type='PackDetInputs', meta_keys=keys)]
    config, weights, state_dict = small(
        'retinanet_biformer_t_coco', pipeline, model=dict(test_cfg=dict(score_thr=0.0))
    )
    inferencer = apis.DetInferencer(config, weights, device='cpu', show_progress=False)
    (result,) = inferencer(picture, pred_score_thr=0.0)['predictions']
    assert len(result['bboxes']) == len(result['labels']) == 100
    name = 'bbox_head.retina_cls.bias'
    assert torch.equal(inferencer.model.state_dict()[name], state_dict[name])


def test_segmentation(picture, small):
    apis = pytest.importorskip('mmseg.apis')
    pipeline = [
        dict(type='LoadImageFromFile'),
        RESIZE,
        dict(type='ResizeToMultiple', size_divisor=32),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs'),
    ]
    config, weights, _ = small('sfpn_biformer_t_ade20k', pipeline)
    result = apis.MMSegInferencer(config, weights, device='cpu')(picture, show=False)
    assert np.asarray(result['predictions']).shape == (64, 96)
