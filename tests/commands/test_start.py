"""Messages at the start of a training."""

import pytest

from mmbiformer.commands.runner import random_weights_message
from tests.helpers.configs import RECIPES, load
from tests.helpers.in_process import train
from tests.helpers.toy_training import config_text

OPTIMIZER = (
    "optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1),"
    ' paramwise_cfg=dict(norm_decay_mult=0.0))'
)
WARM_UP = "param_scheduler = dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=500)"


def test_log(tmp_path):
    config, work = tmp_path / 'toy.py', tmp_path / 'work'
    config.write_text('\n'.join([config_text(), OPTIMIZER, WARM_UP]))
    train(config, work, '--no-validate', '--cfg-options', 'train_cfg.max_epochs=1')
    (path,) = work.glob('*/*.log')
    log = path.read_text()
    assert 'paramwise_options --' not in log  # a line for each parameter
    assert log.count('rises for 500 iterations and the training has 4') == 1
    assert log.count('starts from random weights') == 1


@pytest.mark.parametrize('name', [name for name in RECIPES if name.count('biformer_s_')])
def test_random_weights(name):
    """Classifiers start from them as published."""
    message = random_weights_message(load(name))
    assert (message is None) == name.endswith('in1k')
