"""The shipped configs: they build, and hold the published figures."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob('configs/**/*.py')
    if '_base_' not in path.parts
)
# Parameters of the classifiers, as counted in the authors' code.
PARAMETERS = {
    'biformer_t': 13_142_760,
    'biformer_s': 25_536_232,
    'biformer_b': 56_804_968,
    'biformer_stl': 28_372_552,
    'biformer_stl_nchw': 28_372_552,
}


def load(name):
    cfg = Config.fromfile(ROOT / name)
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('config', CONFIGS)
def test_builds(config):
    cfg = load(config)
    model = MODELS.build(cfg.model)
    model.init_weights()
    assert type(model.backbone).__name__ == 'BiFormer'
    assert cfg.custom_imports['imports'] == ['mmbiformer.models']
    assert cfg.auto_scale_lr['base_batch_size'] > 0


@pytest.mark.parametrize('name', PARAMETERS)
def test_classifier_parameters(name):
    model = MODELS.build(load(f'configs/{name}_in1k.py').model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ('name', 'rate'), [('t', 0.1), ('s', 0.15), ('b', 0.4), ('stl', 0.1), ('stl_nchw', 0.1)]
)
def test_imagenet_recipe(name, rate):
    cfg = load(f'configs/biformer_{name}_in1k.py')
    assert cfg.model.backbone.drop_path_rate == rate
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_cfg.max_epochs == 300
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert cfg.val_dataloader.dataset.pipeline[1].scale == 256
    assert cfg.val_dataloader.dataset.pipeline[2].crop_size == 224


@pytest.mark.parametrize(('name', 'rate'), [('t', 0.2), ('s', 0.2), ('b', 0.3)])
def test_maskrcnn_recipe(name, rate):
    cfg = load(f'configs/maskrcnn_biformer_{name}_coco.py')
    backbone = cfg.model.backbone
    assert (backbone.region_grid, backbone.drop_path_rate, backbone.norm_eval) == (16, rate, True)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (0.001, 500)
    assert steps.milestones == [8, 11]
    resize = cfg.train_dataloader.dataset.pipeline[2]
    assert (resize.type, tuple(resize.scale), resize.keep_ratio) == ('Resize', (1333, 800), True)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 512.0)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, tuple(optimizer.betas)) == ('AdamW', 1e-4, (0.9, 0.999))


def test_maskrcnn_weight_decay_by_parameter():
    """Only LayerNorms are exempt: biases, and the BatchNorms between stages, decay."""
    cfg = load('configs/maskrcnn_biformer_t_coco.py')
    model = MODELS.build(cfg.model)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {
        id(param): group['weight_decay']
        for group in wrapper.param_groups
        for param in group['params']
    }
    exempt = {name for name, param in model.named_parameters() if decay[id(param)] == 0}
    assert {decay[id(param)] for param in model.parameters()} == {0.0, 0.05}
    expected = {
        f'backbone.{name}.{kind}'
        for name in [
            *(
                f'stages.{i}.{j}.norm{n}'
                for i, d in enumerate((2, 2, 8, 2))
                for j in range(d)
                for n in (1, 2)
            ),
            *(f'norm{i}' for i in range(4)),
        ]
        for kind in ('weight', 'bias')
    }
    assert exempt == expected
