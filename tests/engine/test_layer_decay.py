"""Layer-wise learning rate decay in every host."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmbiformer.models import BiFormer
from tests.helpers.configs import build_without_memory, load

LAYER_DECAY = dict(
    constructor='mmbiformer.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.5),
)
HOSTS = (
    'biformer_t_in1k',
    'maskrcnn_biformer_t_coco',
    'retinanet_biformer_t_coco',
    'sfpn_biformer_t_ade20k',
    'upernet_biformer_t_ade20k',
)


def wrapper_of(cfg, model):
    settings = dict(cfg.optim_wrapper, type='OptimWrapper')  # mixed precision needs a GPU
    settings.pop('loss_scale', None)
    return build_optim_wrapper(model, settings)


@pytest.mark.parametrize('config', HOSTS)
def test_layer_decay(config):
    """Stem, 14 blocks with the downsampling before them, and the rest."""
    cfg = load(config)
    cfg.merge_from_dict(dict(optim_wrapper=LAYER_DECAY))
    model = build_without_memory(cfg)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = wrapper_of(cfg, model).optimizer.param_groups
    groups = {names[id(group['params'][0])]: group for group in groups}
    assert groups.keys() == {*names.values()}
    lr = cfg.optim_wrapper.optimizer.lr
    depths = (2, 2, 8, 2)
    for name, group in groups.items():
        layer = 15
        if name.startswith('backbone.downsample_layers.'):
            stage = int(name.split('.')[2])
            layer = sum(depths[:stage]) + 1 if stage else 0
        elif name.startswith('backbone.stages.'):
            stage, block = map(int, name.split('.')[2:4])
            layer = sum(depths[:stage]) + block + 1
        assert group['lr'] == pytest.approx(lr * 0.5 ** (15 - layer)), name
    # The recipe's weight decay is as before.
    if config.startswith(('biformer', 'maskrcnn', 'upernet')):
        assert groups['backbone.stages.0.0.norm1.weight']['weight_decay'] == 0


@pytest.mark.parametrize('config', ['bixt_ti_l64_p16_in1k', 'sfpn_bixt_ti_p16s8_ade20k'])
def test_layer_decay_of_bixt(config):
    """Stem with the latents, 12 blocks, and the rest."""
    cfg = load(config)
    cfg.merge_from_dict(dict(optim_wrapper=LAYER_DECAY))
    model = build_without_memory(cfg)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = wrapper_of(cfg, model).optimizer.param_groups
    lr = cfg.optim_wrapper.optimizer.lr
    seen = set()
    for group in groups:
        (param,) = group['params']
        name, layer = names[id(param)], 13
        if name.startswith(('backbone.tokenizer.', 'backbone.latents')):
            layer = 0
        elif name.startswith('backbone.blocks.'):
            layer = int(name.split('.')[2]) + 1
        assert group['lr'] == pytest.approx(lr * 0.5 ** (13 - layer)), name
        seen.add(layer)
    assert seen == {*range(14)}


def test_layer_depths_serve_mmpretrain_itself():
    cfg = load('biformer_t_in1k')
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    groups = wrapper_of(cfg, build_without_memory(cfg)).optimizer.param_groups
    lrs = {group['param_name']: group['lr_scale'] for group in groups}
    assert lrs['backbone.downsample_layers.0.0.weight'] == 0.5**15
    assert lrs['backbone.stages.3.1.mlp.fc1.weight'] == 0.5
    assert lrs['head.fc.weight'] == lrs['backbone.norm.weight'] == 1


@pytest.mark.parametrize('place', ['backbone', 'student.backbone', 'image_encoder.0'])
def test_wherever_the_backbone_is(place):
    """It multiplies what other settings give."""
    net = nn.Sequential()
    arch = dict(depths=(1, 2), embed_dims=(32, 32), mlp_ratio=1, topks=(1, 2))
    backbone = BiFormer(arch, region_grid=2)
    part = net
    *parents, name = place.split('.')
    for parent in parents:
        part.add_module(parent, nn.Sequential())
        part = part.get_submodule(parent)
    part.add_module(name, backbone)
    net.add_module('head', nn.Linear(1, 1))
    paramwise = dict(layer_decay_rate=0.5, custom_keys={'stages.1.1': dict(lr_mult=0.1)})
    settings = dict(
        optimizer=dict(type='SGD', lr=1.0), **{**LAYER_DECAY, 'paramwise_cfg': paramwise}
    )
    groups = build_optim_wrapper(net, settings).optimizer.param_groups
    lrs = {id(group['params'][0]): group['lr'] for group in groups}
    assert lrs[id(backbone.downsample_layers[0][0].weight)] == 0.5**4
    assert lrs[id(backbone.stages[1][0].mlp.fc1.weight)] == 0.5**2
    assert lrs[id(backbone.stages[1][1].mlp.fc1.weight)] == pytest.approx(0.05)
    assert lrs[id(net.head.weight)] == 1


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        ({}, 'layer_decay_rate=None must be a number in'),
        (dict(layer_decay_rate=1.5), r'layer_decay_rate=1.5 must be a number in \(0, 1\]'),
        (dict(layer_decay_rate=0.9), 'needs a backbone with get_layer_depth.*Linear has none'),
    ],
)
def test_what_is_refused(paramwise, message):
    settings = dict(
        optimizer=dict(type='SGD', lr=1.0), **{**LAYER_DECAY, 'paramwise_cfg': paramwise}
    )
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(nn.Linear(1, 1), settings)
