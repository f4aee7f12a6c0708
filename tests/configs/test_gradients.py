"""Every parameter gets a gradient; DistributedDataParallel would stop at the step after."""

import pytest

from mmbiformer.commands.fake_data import fake_batch
from mmbiformer.commands.runner import build_model
from mmbiformer.registry import MODELS
from tests.helpers.configs import RECIPES, load

# Sizes of one family and task differ only in widths and depths.
NAMES = {name.replace('_s_', '_t_').replace('_b_', '_t_'): name for name in reversed(RECIPES)}


@pytest.mark.parametrize('name', NAMES.values())
def test_every_parameter_is_used(name):
    """In one step, with one block a stage."""
    cfg = load(name)
    backbone = cfg.model.backbone
    arch = dict(MODELS.get(backbone.type).archs[backbone.arch], depths=(1, 1, 1, 1))
    backbone.update(arch=arch, drop_path_rate=0.0)
    size = (112, 112) if 'nchw' in name else (64, 64)  # the least that it takes
    if 'rcnn' in (cfg.model.get('train_cfg') or {}):
        cfg.model.train_cfg.rcnn.sampler.num = 16
    if 'size' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.size = size  # images would be padded to it
    model = build_model(cfg).train()
    data = model.data_preprocessor(fake_batch(cfg, 2, size), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []
