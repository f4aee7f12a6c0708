"""Overrides of variables that a config file has already used."""

import argparse
import shlex

import pytest

from mmbiformer.commands.options import read_config

BASE = """
root = 'data/'
epochs = 3
sizes = dict(small=(8, 8), large=16)
train_cfg = dict(max_epochs=epochs, dynamic_intervals=[(epochs - 1, 1)])
"""
TOP = """
_base_ = 'base.py'
name = 'run'
dataset = dict(root=_base_.root + 'set', size=_base_.sizes['small'])
train_dataloader = dict(dataset=dataset, batch_size=2)
val_dataloader = train_dataloader
param_scheduler = [dict(type='A'), dict(type='B', end={{_base_.epochs}})]
custom = dict(flag=1)
"""
NEW_STYLE = """
from mmengine.config import read_base
with read_base():
    from .base import *
train_cfg.update(end=epochs)
"""
FOLLOWING = 'train_cfg.max_epochs=1', 'train_cfg.dynamic_intervals=[(0, 1)]'


@pytest.mark.parametrize(
    ('text', 'options', 'missed'),
    [
        (TOP, dict(epochs=1), ('param_scheduler.1.end=1', *FOLLOWING)),
        (TOP, dict(epochs=3), ()),
        (TOP, {'epochs': 1, 'train_cfg.max_epochs': 1}, ('param_scheduler.1.end=1', FOLLOWING[1])),
        (
            TOP,
            dict(root='a b/'),
            [f'{split}_dataloader.dataset.root=a b/set' for split in ('train', 'val')],
        ),
        (
            TOP,
            {'sizes.small': (4, 4)},
            [f'{split}_dataloader.dataset.size=(4, 4)' for split in ('train', 'val')],
        ),
        # A setting of that name is elsewhere.
        (TOP, dict(max_epochs=1), FOLLOWING[:1]),
        # Settings that a Runner or the user's own code reads are followed by nothing.
        (TOP, {'train_dataloader.batch_size': 4, 'custom.flag': 2, 'more': 3, 'name': 'x'}, ()),
        (TOP, dict(root=None), ()),
        (NEW_STYLE, dict(epochs=1), ('train_cfg.end=1', *FOLLOWING)),
    ],
    ids=range(9),
)
def test_variable_that_was_used_already(text, options, missed, tmp_path, capsys):
    (tmp_path / 'base.py').write_text(BASE)
    (tmp_path / 'top.py').write_text(text)
    cfg = read_config(argparse.Namespace(config=tmp_path / 'top.py', cfg_options=options))
    printed = capsys.readouterr().err
    assert bool(printed) == bool(missed)
    assert sorted(shlex.split(printed.rpartition('give them instead: ')[2])) == sorted(missed)
    assert cfg.train_cfg.max_epochs == options.get('train_cfg.max_epochs', 3)
