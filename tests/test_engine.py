"""What the recipes need beside the hosts: averages at the side, layer-wise learning rates."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from test_configs import build, in_float32, load
from torch import nn

from mmbiformer.models import BiFormer
from mmbiformer.safe_load import safe_load

MOMENTUM = 0.25


class Toy(BaseModel):
    """A weight that each step moves by -1, and a buffer that counts the steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer('count', torch.zeros(1))
        self.seen = []

    def forward(self, inputs, mode):
        if mode == 'loss':
            self.count += 1
            return dict(loss=self.weight.sum())
        self.seen.append(self.weight.item())
        return [0]


def run_toy(folder, epochs, **kwargs):
    loader = dict(
        batch_size=1,
        num_workers=0,
        dataset=[dict(inputs=0)] * 3,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    runner = Runner(
        model=Toy(),
        work_dir=str(folder),
        default_scope='mmengine',
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[],
        val_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        custom_hooks=[dict(type='mmbiformer.SideEMAHook', momentum=MOMENTUM, update_buffers=True)],
        experiment_name=f'{folder.name}_{epochs}',
        **kwargs,
    )
    runner.train()
    return runner


def test_average_is_kept_at_the_side(tmp_path):
    """Evaluated and saved are the raw weights; the average goes on after a resume."""
    model = run_toy(tmp_path / 'whole', 2).model
    assert model.seen == [-3] * 3 + [-6] * 3
    run_toy(tmp_path / 'parts', 1)
    run_toy(tmp_path / 'parts', 2, resume=True)
    # MMEngine starts the average from the weights after the first step.
    average = -1.0
    for weight in (-2, -3, -4, -5, -6):
        average += MOMENTUM * (weight - average)
    for folder in ('whole', 'parts'):
        checkpoint = safe_load(tmp_path / folder / 'epoch_2.pth')
        assert checkpoint['state_dict']['weight'].item() == -6
        assert checkpoint['ema_at_side'] is True
        assert checkpoint['ema_state_dict']['module.weight'].item() == pytest.approx(average)
        assert checkpoint['ema_state_dict']['module.count'].item() == pytest.approx(-average)


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


@pytest.mark.parametrize('config', HOSTS)
def test_layer_decay(config):
    """Stem, 14 blocks with the downsampling before them, and the rest."""
    cfg = load(config)
    cfg.merge_from_dict(dict(optim_wrapper=LAYER_DECAY))
    model = build(cfg)
    wrapper = build_optim_wrapper(model, in_float32(cfg))
    names = {id(param): name for name, param in model.named_parameters()}
    groups = {names[id(group['params'][0])]: group for group in wrapper.optimizer.param_groups}
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


def test_layer_depths_serve_mmpretrain_itself():
    cfg = load('biformer_t_in1k')
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    wrapper = build_optim_wrapper(build(cfg), in_float32(cfg))
    groups = wrapper.optimizer.param_groups
    lrs = {group['param_name']: group['lr_scale'] for group in groups}
    assert lrs['backbone.downsample_layers.0.0.weight'] == 0.5**15
    assert lrs['backbone.stages.3.1.mlp.fc1.weight'] == 0.5
    assert lrs['head.fc.weight'] == lrs['backbone.norm.weight'] == 1


def test_layer_decay_multiplies_other_settings():
    net = nn.Module()
    net.backbone = BiFormer('tiny')
    wrapper = build_optim_wrapper(
        net,
        dict(
            optimizer=dict(type='SGD', lr=1.0, weight_decay=0.1),
            constructor='mmbiformer.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5, custom_keys={'stages.3.1': dict(lr_mult=0.1)}),
        ),
    )
    lrs = {id(group['params'][0]): group['lr'] for group in wrapper.optimizer.param_groups}
    assert lrs[id(net.backbone.stages[3][1].mlp.fc1.weight)] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        ({}, 'layer_decay_rate=None must be a number in'),
        (dict(layer_decay_rate=1.5), r'layer_decay_rate=1.5 must be a number in \(0, 1\]'),
        (dict(layer_decay_rate=0.9), 'needs a backbone with get_layer_depth.*Linear has none'),
    ],
)
def test_layer_decay_refuses(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build_optim_wrapper(
            nn.Linear(1, 1),
            dict(
                optimizer=dict(type='SGD', lr=1.0),
                constructor='mmbiformer.LayerDecayOptimWrapperConstructor',
                paramwise_cfg=paramwise,
            ),
        )


def test_parts_build_under_any_scope():
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        init_default_scope(scope)
        assert isinstance(MODELS.build(dict(type='mmbiformer.BiFormer', arch='tiny')), BiFormer)
