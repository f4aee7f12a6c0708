"""Doors for users of other libraries: timm, mmpretrain's hub, and the hosts' inferencers."""

import argparse
from functools import partial
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, init_default_scope
from test_checkpoint import Canary, official

import mmbiformer.hub.mmpretrain
import mmbiformer.hub.timm  # noqa: F401
from mmbiformer.checkpoint import convert_official_state_dict
from mmbiformer.models import BiFormer, hierarchical
from mmbiformer.registry import MODELS

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_default_scope():
    """MMEngine's default scope is global: one set by an earlier test would be the doors' too."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    """A file as the authors release them; its classes are in the order of ImageNet."""
    path = tmp_path_factory.mktemp('released') / 'biformer_tiny_best.pth'
    args = argparse.Namespace(hook=Canary())
    torch.save(dict(model=official(), epoch=299, args=args), path)
    return str(path)


# timm


def test_timm_lists_the_models():
    names = ['biformer_base', 'biformer_small', 'biformer_stl', 'biformer_stl_nchw']
    assert timm.list_models('biformer*') == [*names, 'biformer_tiny']
    with torch.device('meta'):
        counts = {name: timm.create_model(name) for name in timm.list_models('biformer*')}
    assert {k: sum(p.numel() for p in v.parameters()) for k, v in counts.items()} == {
        'biformer_tiny': 13_142_760,
        'biformer_small': 25_536_232,
        'biformer_base': 56_804_968,
        'biformer_stl': 28_372_552,
        'biformer_stl_nchw': 28_372_552,
    }


def test_timm_features():
    net = timm.create_model('biformer_tiny', features_only=True, out_indices=(1, 3)).eval()
    assert net.feature_info.channels() == [128, 512]
    assert net.feature_info.reduction() == [8, 32]
    with torch.no_grad():
        shapes = [tuple(out.shape) for out in net(torch.zeros(1, 3, 64, 96))]
    assert shapes == [(1, 128, 8, 12), (1, 512, 2, 3)]
    assert timm.create_model('biformer_tiny', features_only=True).feature_info.channels() == [
        64,
        128,
        256,
        512,
    ]


def test_timm_classifier(released):
    overlay = dict(file=released)
    net = timm.create_model('biformer_tiny', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    state_dict = convert_official_state_dict(official())
    assert net.state_dict().keys() == state_dict.keys()
    assert all(torch.equal(value, state_dict[name]) for name, value in net.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        map_ = net.forward_features(images)
        logits = map_.mean((2, 3)) @ state_dict['head.fc.weight'].T + state_dict['head.fc.bias']
        torch.testing.assert_close(net(images), logits)
    assert (tuple(map_.shape), net.num_features) == ((1, 512, 2, 2), 512)
    net.reset_classifier(7)
    assert net(images).shape == (1, 7)
    assert net.get_classifier().out_features == net.num_classes == 7
    assert Canary.marks == []


@pytest.mark.parametrize('options', [dict(num_classes=7), dict(features_only=True)])
def test_timm_fine_tuning(released, options):
    net = timm.create_model(
        'biformer_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=released), **options
    )
    name = 'stages.3.1.mlp.fc2.weight'
    backbone = net if options.get('features_only') else net.backbone
    expected = convert_official_state_dict(official())[f'backbone.{name}']
    assert torch.equal(backbone.state_dict()[name], expected)


def test_timm_sources_of_weights(released, tmp_path):
    create = partial(timm.create_model, 'biformer_tiny', pretrained=True)
    bias = official()['head.bias']
    for source in (dict(file=released), dict(url=released)):
        for option in ('pretrained_cfg', 'pretrained_cfg_overlay'):
            assert torch.equal(create(**{option: source}).head.fc.bias, bias)
    with pytest.raises(ValueError, match=r"there are no weights 'foo'; leave '\.foo' out"):
        timm.create_model('biformer_tiny.foo')
    with pytest.raises(ValueError, match='set TORCH_HOME'):
        create(cache_dir=str(tmp_path))
    for unknown in ('hf_hub_id', 'state_dict'):
        with pytest.raises(ValueError, match=f'{unknown}.* give file or url'):
            create(pretrained_cfg={unknown: 'somewhere'})


def test_timm_layer_decay():
    from timm.optim import param_groups_layer_decay

    net = timm.create_model('biformer_tiny')
    names = {param: name for name, param in net.named_parameters()}
    for group in param_groups_layer_decay(net, layer_decay=0.5):
        for param in group['params']:
            depth, count = net.backbone.get_layer_depth(names[param], 'backbone.')
            assert group['lr_scale'] == 0.5 ** (count - 1 - depth)


@pytest.mark.parametrize('features_only', [False, True])
def test_timm_gradient_checkpointing(features_only, monkeypatch):
    calls = []
    plain = hierarchical.checkpoint

    def checkpoint(*args, **kwargs):
        calls.append(args[0])
        return plain(*args, **kwargs)

    monkeypatch.setattr(hierarchical, 'checkpoint', checkpoint)
    net = timm.create_model('biformer_tiny', features_only=features_only)
    net.set_grad_checkpointing()
    net(torch.randn(1, 3, 64, 64))
    assert len(calls) == 14
    net.set_grad_checkpointing(False)
    net(torch.randn(1, 3, 64, 64))
    assert len(calls) == 14


def test_timm_takes_backbones_and_nothing_else(tmp_path):
    path = str(tmp_path / 'FILE')
    create = partial(
        timm.create_model,
        'biformer_tiny',
        pretrained=True,
        pretrained_cfg_overlay=dict(file=path),
    )
    own = timm.create_model('biformer_tiny').backbone.state_dict()
    for saved in (own, {'model': own}, {f'module.{name}': value for name, value in own.items()}):
        torch.save(saved, path)
        found = create().backbone.state_dict()
        assert all(torch.equal(found[name], value) for name, value in own.items())
    torch.save({'conv1.weight': torch.ones(2)}, path)
    with pytest.raises(ValueError, match='FILE holds no weights of a BiFormer'):
        create()


@pytest.mark.parametrize('part', ['whole', 'backbone'])
def test_timm_tells_stl_and_stl_nchw_apart(part, tmp_path):
    """By the mark in our state dicts: names and shapes are the same."""
    own = timm.create_model('biformer_stl')
    path = str(tmp_path / 'stl.pth')
    torch.save((own if part == 'whole' else own.backbone).state_dict(), path)
    create = partial(
        timm.create_model, pretrained=True, pretrained_cfg_overlay=dict(file=path), num_classes=7
    )
    create('biformer_stl')
    for options in ({}, dict(features_only=True)):
        with pytest.raises(ValueError, match="lepe_source='input', the model has 'value'"):
            create('biformer_stl_nchw', **options)


def test_timm_runs_nothing_of_a_file(released):
    """Its own option, which does not come by our reader: older ones ran what a file says."""
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        timm.create_model('biformer_tiny', checkpoint_path=released)
    assert Canary.marks == []


# mmpretrain


def test_mmpretrain_get_model(released):
    assert set(mmpretrain.list_models('biformer*')) == {
        f'biformer-{arch}_3rdparty_in1k' for arch in ('base', 'small', 'stl', 'stl-nchw', 'tiny')
    }
    net = mmpretrain.get_model('biformer-tiny_3rdparty_in1k', pretrained=released)
    assert isinstance(net.backbone, BiFormer)
    assert torch.equal(net.head.fc.bias, official()['head.bias'])
    assert Canary.marks == []


def test_mmpretrain_has_debiformer():
    assert set(mmpretrain.list_models('*debiformer*')) == {
        f'debiformer-{arch}_3rdparty_in1k' for arch in ('base', 'small', 'tiny')
    }
    net = mmpretrain.get_model('debiformer-tiny_3rdparty_in1k', head=dict(num_classes=7))
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


# Inferencers


def small_checkpoint(config, path):
    """A checkpoint as MMEngine's Runner saves them, from random weights."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(meta=dict(hook=Canary()), state_dict=model.state_dict()), path)
    return model.state_dict()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)


def test_classification_inferencer(released, picture):
    config = str(ROOT / 'configs/biformer_t_in1k.py')
    inferencer = mmpretrain.ImageClassificationInferencer(config, pretrained=released, device='cpu')
    (result,) = inferencer(picture)
    assert result['pred_scores'].shape == (1000,)
    assert isinstance(result['pred_class'], str)
    assert torch.equal(inferencer.model.head.fc.bias, official()['head.bias'])
    assert Canary.marks == []


def write_small(tmp_path, base, **options):
    """A config beside the shipped one, with small images."""
    path = tmp_path / f'{base}.py'
    lines = [f'_base_ = {str(ROOT / "configs" / f"{base}.py")!r}']
    path.write_text('\n'.join([*lines, *(f'{k} = {v!r}' for k, v in options.items())]) + '\n')
    return str(path)


def test_det_inferencer(tmp_path, picture):
    from mmdet.apis import DetInferencer

    loading = dict(type='LoadImageFromFile')
    resize = dict(type='Resize', scale=(96, 64), keep_ratio=True)
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pipeline = [loading, resize, dict(type='PackDetInputs', meta_keys=keys)]
    config = write_small(
        tmp_path,
        'retinanet_biformer_t_coco',
        test_dataloader=dict(dataset=dict(pipeline=pipeline)),
        model=dict(test_cfg=dict(score_thr=0.0)),
    )
    weights = str(tmp_path / 'weights.pth')
    state_dict = small_checkpoint(config, weights)
    inferencer = DetInferencer(config, weights, device='cpu', show_progress=False)
    (result,) = inferencer(picture, pred_score_thr=0.0)['predictions']
    assert len(result['bboxes']) == len(result['labels']) == 100
    name = 'bbox_head.retina_cls.bias'
    assert torch.equal(inferencer.model.state_dict()[name], state_dict[name])
    assert Canary.marks == []


def test_seg_inferencer(tmp_path, picture):
    from mmseg.apis import MMSegInferencer

    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 64), keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
        dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='PackSegInputs'),
    ]
    config = write_small(
        tmp_path,
        'sfpn_biformer_t_ade20k',
        test_dataloader=dict(dataset=dict(pipeline=pipeline)),
    )
    weights = str(tmp_path / 'weights.pth')
    small_checkpoint(config, weights)
    inferencer = MMSegInferencer(config, weights, device='cpu')
    result = inferencer(picture, show=False)
    assert np.asarray(result['predictions']).shape == (64, 96)
    assert Canary.marks == []
