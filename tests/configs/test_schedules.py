"""The learning rate of each recipe, iteration by iteration, beside the authors' formulas."""

import math
import re

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from tests.helpers.configs import RECIPES, load

# Warm-up and length by the first pattern that a name matches. They are iterations, but the warm-up
# of ImageNet and the lengths of ImageNet and COCO are epochs.
LENGTHS = {
    '^debiformer': (20, 300),
    '^biformer': (5, 300),
    'maskrcnn_debiformer_s': (1500, 12),
    'maskrcnn_debiformer_b': (5000, 12),
    'coco': (500, 12),
    'sfpn_debiformer_s': (9000, 320_000),
    'sfpn_debiformer_b': (3000, 160_000),
    'sfpn': (1000, 80_000),
    'upernet_debiformer': (3000, 160_000),
    'upernet': (1500, 160_000),
}
IMAGENET, COCO, SFPN, UPERNET = (
    [name for name in RECIPES if part in name] for part in ('in1k', 'coco', 'sfpn', 'upernet')
)


def lengths(name):
    """Warm-up and length of a recipe."""
    return next(LENGTHS[pattern] for pattern in LENGTHS if re.search(pattern, name))


def learning_rates(cfg, epoch_length, at):
    """Those of a config's own schedulers, at some iterations."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.optim_wrapper.optimizer.lr)
    optimizer.step = lambda: None
    wrapper = OptimWrapper(optimizer)
    defaults = dict(optimizer=wrapper, epoch_length=epoch_length)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=defaults)
        for scheduler in cfg.param_scheduler
    ]
    rates = {}
    for i in range(max(at) + 1):
        if i in at:
            rates[i] = optimizer.param_groups[0]['lr']
        wrapper.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (epoch_length and (i + 1) % epoch_length == 0):
                scheduler.step()
    return rates


def warm_up(i, iterations, ratio):
    """The factor by which MMCV 1 multiplies a schedule that is already running."""
    return 1 - (1 - min(i / iterations, 1)) * (1 - ratio)


@pytest.mark.parametrize('name', IMAGENET)
def test_imagenet(name):
    cfg = load(name)
    (epochs, length), lr = lengths(name), cfg.optim_wrapper.optimizer.lr
    end = 5e-6 if name.startswith('debiformer') else 1e-5
    assert (cfg.train_cfg.by_epoch, cfg.train_cfg.max_epochs) == (True, length)
    rates = learning_rates(cfg, 1, range(length))
    # The first epoch's rate lasts two: it is set at the end of an epoch, from that epoch's number.
    for epoch, rate in rates.items():
        t = max(epoch - 1, 0)
        if t < epochs:
            expected = 1e-6 + t * (lr - 1e-6) / epochs
        else:
            expected = end + (lr - end) * (1 + math.cos(math.pi * t / length)) / 2
        assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('name', COCO)
def test_coco(name):
    cfg = load(name)
    (warmup, epochs), lr = lengths(name), cfg.optim_wrapper.optimizer.lr
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)
    length = 600
    steps = (8 * length - 1, 8 * length, 11 * length - 1, 11 * length)
    rates = learning_rates(cfg, length, (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, *steps))
    for i, rate in rates.items():
        step = 0.1 ** sum(i // length >= epoch for epoch in (8, 11))
        assert rate == pytest.approx(lr * step * warm_up(i, warmup, 0.001), rel=1e-9)


@pytest.mark.parametrize('name', SFPN + UPERNET)
def test_ade20k(name):
    """BiFormer-S to the end; the others through their warm-up."""
    cfg = load(name)
    (warmup, length), lr = lengths(name), cfg.optim_wrapper.optimizer.lr
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', length)
    assert cfg.param_scheduler[1].end == length + (name in UPERNET)
    at = [0, 1, warmup // 2, warmup - 1, warmup, warmup + 1]
    if '_biformer_s_' in name:
        at += [length // 2, length - 1]
    for i, rate in learning_rates(cfg, None, at).items():
        if name in SFPN:
            floor, ratio = (1e-10 if 'debiformer' in name else 1e-8), 0.1
            factor = floor + (1 - floor) * (1 + math.cos(math.pi * i / length)) / 2
        else:
            ratio = 2e-6 if 'debiformer_s' in name else 1e-6
            factor = 1 - i / length
        expected = lr * factor * warm_up(i, warmup, ratio)
        assert rate == pytest.approx(expected, rel=1e-6 if name in SFPN else 1e-9)
