"""The recipes: the model, batch and optimizer of each, as published."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from torch import nn

from mmbiformer.layers import BiLevelRoutingAttention
from tests.helpers.configs import DEMOS, ENTRIES, RECIPES, load, model_of

ARCHS = {'t': 'tiny', 's': 'small', 'b': 'base'}
# Grid, drop path | GPUs, images each | learning rate, weight decay | loss scale of fp16.
SETTINGS = {
    'biformer_t_in1k': (7, 0.1, 8, 128, 1e-3, 0.05, 'dynamic'),
    'biformer_s_in1k': (7, 0.15, 8, 128, 1e-3, 0.05, 'dynamic'),
    'biformer_b_in1k': (7, 0.4, 8, 128, 1e-3, 0.05, 'dynamic'),
    'biformer_s_tokenlabel_in1k': (7, 0.15, 8, 128, 1.6e-3, 0.05, 'dynamic'),
    'biformer_b_tokenlabel_in1k': (7, 0.4, 8, 128, 1.6e-3, 0.05, 'dynamic'),
    'biformer_stl_in1k': (7, 0.1, 8, 128, 1e-3, 0.05, 'dynamic'),
    'biformer_stl_nchw_in1k': (7, 0.1, 8, 128, 1e-3, 0.05, 'dynamic'),
    'maskrcnn_biformer_t_coco': (16, 0.2, 8, 2, 1e-4, 0.05, 512.0),
    'maskrcnn_biformer_s_coco': (16, 0.2, 8, 2, 1e-4, 0.05, 512.0),
    'maskrcnn_biformer_b_coco': (16, 0.3, 8, 2, 1e-4, 0.05, 512.0),
    'retinanet_biformer_t_coco': (16, 0.2, 8, 2, 1e-4, 1e-4, 512.0),
    'retinanet_biformer_s_coco': (16, 0.2, 8, 2, 1e-4, 1e-4, 512.0),
    'retinanet_biformer_b_coco': (16, 0.3, 8, 2, 1e-4, 1e-4, 512.0),
    'sfpn_biformer_t_ade20k': (8, 0.15, 8, 4, 2e-4, 1e-4, 512.0),
    'sfpn_biformer_s_ade20k': (8, 0.15, 8, 4, 2e-4, 1e-4, 512.0),
    'sfpn_biformer_b_ade20k': (8, 0.3, 8, 4, 2e-4, 1e-4, 512.0),
    'upernet_biformer_t_ade20k': (8, 0.3, 8, 2, 6e-5, 0.01, 512.0),
    'upernet_biformer_s_ade20k': (8, 0.3, 8, 2, 6e-5, 0.01, 512.0),
    'upernet_biformer_b_ade20k': (8, 0.4, 8, 2, 6e-5, 0.01, 512.0),
    'debiformer_t_in1k': (7, 0.0, 8, 256, 2e-3, 0.1, 'dynamic'),
    'debiformer_s_in1k': (7, 0.3, 8, 256, 2e-3, 0.1, 'dynamic'),
    'debiformer_b_in1k': (7, 0.4, 8, 256, 2e-3, 0.1, 'dynamic'),
    'maskrcnn_debiformer_t_coco': (8, 0.1, 8, 2, 1e-4, 0.05, 512.0),
    'maskrcnn_debiformer_s_coco': (16, 0.2, 8, 1, 5e-5, 0.05, None),
    'maskrcnn_debiformer_b_coco': (32, 0.3, 4, 2, 2.5e-5, 0.05, 512.0),
    'retinanet_debiformer_t_coco': (8, 0.1, 8, 2, 1e-4, 1e-4, 512.0),
    'retinanet_debiformer_s_coco': (16, 0.0, 8, 2, 1e-4, 1e-4, 512.0),
    'retinanet_debiformer_b_coco': (32, 0.0, 8, 2, 1e-4, 1e-4, 512.0),
    'sfpn_debiformer_s_ade20k': (8, 0.15, 4, 2, 5e-5, 1e-4, 512.0),
    'sfpn_debiformer_b_ade20k': (8, 0.4, 4, 2, 1e-4, 1e-4, 512.0),
    'upernet_debiformer_s_ade20k': (8, 0.3, 8, 2, 6e-5, 0.01, 512.0),
    'upernet_debiformer_b_ade20k': (8, 0.4, 8, 2, 6e-5, 0.01, 'dynamic'),
}


def parts(name):
    """Task, family and size: those of biformer_s_in1k are in1k, biformer, s."""
    head, _, tail = name.partition('biformer_')
    size, _, data = tail.rpartition('_')
    size = size.removesuffix('_tokenlabel')
    task = head.removesuffix('de').rstrip('_') or data
    return task, 'debiformer' if head.endswith('de') else 'biformer', size


def test_every_recipe_is_tested():
    assert SETTINGS.keys() == {*RECIPES}


@pytest.mark.parametrize('name', [*ENTRIES, *DEMOS])
def test_builds(name):
    cfg, model = load(name), model_of(name)
    assert type(model.backbone).__module__.startswith('mmbiformer.models')
    more = ['mmbiformer.models.token_labeling'] if 'tokenlabel' in name else []
    assert cfg.custom_imports['imports'] == ['mmbiformer.models', *more]
    assert cfg.auto_scale_lr['base_batch_size'] > 0
    assert cfg.auto_scale_lr.enable is False


@pytest.mark.parametrize('name', RECIPES)
def test_model(name):
    """Arch, grid, and the stochastic depth of each block, rising linearly from 0."""
    task, family, size = parts(name)
    grid, drop_path, *_ = SETTINGS[name]
    assert load(name).model.backbone.arch == ARCHS.get(size, size)
    model = model_of(name).train()
    backbone = model.backbone
    rates = [block.drop_path.drop_prob for stage in backbone.stages for block in stage]
    pair = 2 if family == 'debiformer' else 1  # a block of DeBiFormer is a pair of ours
    expected = np.linspace(0, drop_path, len(rates) // pair).repeat(pair)
    assert rates == pytest.approx(expected, abs=1e-7)
    grids = {m.region_grid for m in backbone.modules() if isinstance(m, BiLevelRoutingAttention)}
    assert grids == {(grid, grid)}
    assert backbone.final_norm == (task == 'in1k')
    first = 1 if (task, family) == ('retinanet', 'biformer') else 0
    first = 3 if task == 'in1k' else first
    assert tuple(backbone.out_indices) == tuple(range(first, 4))
    taker = {'in1k': 'head', 'upernet': 'decode_head'}.get(task, 'neck')
    widths = [*backbone.arch['embed_dims']][first:]
    assert [*np.atleast_1d(getattr(model, taker).in_channels)] == widths
    # BiFormer's detectors keep BatchNorm in eval mode while they train.
    frozen = family == 'biformer' and task in ('maskrcnn', 'retinanet')
    batch_norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.training for m in batch_norms} == {not frozen}
    assert all(param.requires_grad for param in model.parameters())
    if task == 'upernet':
        assert (model.auxiliary_head.in_channels, model.auxiliary_head.in_index) == (widths[2], 2)
        assert model.auxiliary_head.loss_decode.loss_weight == 0.4


@pytest.mark.parametrize('name', RECIPES)
def test_optimizer(name):
    """The learning rate is for all GPUs; --auto-scale-lr on two divides it by as many."""
    _, _, gpus, images, lr, decay, loss_scale = SETTINGS[name]
    cfg = load(name)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == gpus * images
    assert cfg.optim_wrapper.get('loss_scale') == loss_scale
    assert cfg.optim_wrapper.type == ('AmpOptimWrapper' if loss_scale else 'OptimWrapper')
    clips = name.startswith('debiformer')
    assert cfg.optim_wrapper.get('clip_grad') == (dict(max_norm=5.0) if clips else None)
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == 1
    wrapper = build_optim_wrapper(nn.Linear(1, 1), in_float32(cfg))
    assert type(wrapper.optimizer) is torch.optim.AdamW
    found = wrapper.optimizer.defaults
    assert (found['lr'], found['weight_decay']) == (pytest.approx(lr), decay)
    assert (tuple(found['betas']), found['eps']) == ((0.9, 0.999), 1e-8)
    cfg.auto_scale_lr.enable = True  # as tools/train.py does
    runner = SimpleNamespace(
        world_size=2,
        _train_dataloader=cfg.train_dataloader,
        param_schedulers=[],
        logger=MMLogger.get_current_instance(),
    )
    Runner.scale_lr(runner, wrapper, cfg.auto_scale_lr)
    for group in wrapper.optimizer.param_groups:
        assert group['lr'] == pytest.approx(lr * 2 / gpus)


def in_float32(cfg):
    """MMEngine has no mixed precision without a GPU."""
    wrapper = cfg.optim_wrapper.copy()
    wrapper.update(type='OptimWrapper')
    wrapper.pop('loss_scale', None)
    return wrapper


def test_precision(monkeypatch):
    """fp16 with a loss scale that stays, bf16 by one option."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    cfg = load('upernet_biformer_s_ade20k')
    wrapper = build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper)
    assert (wrapper.cast_dtype, wrapper._scale_update_param) == (None, 512.0)
    cfg.merge_from_dict({'optim_wrapper.dtype': 'bfloat16'})
    assert build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper).cast_dtype == torch.bfloat16
