"""One real training through the commands: train, resume, evaluate, on a few synthetic scenes."""

import re

import pytest
import torch

from mmbiformer.shapes import make_shapes
from mmbiformer.weights.read import read_checkpoint
from tests.helpers.configs import write_toy_maskrcnn
from tests.helpers.in_process import run_tool, train
from tests.helpers.toy_training import config_text

CHANGES = """
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
"""
SMALL = dict(depths=1, embed_dims=32, topks=1)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs without a break: the config, the work folder and the log."""
    folder = tmp_path_factory.mktemp('training')
    make_shapes(folder / 'data', train=8, val=4, progress=False)
    config = write_toy_maskrcnn(folder, CHANGES)
    log = train(config, folder / 'work')
    return config, folder / 'work', log


def losses(log):
    """The losses of the second epoch, as logged."""
    return re.findall(r'Epoch\(train\)\s+\[2\]\[\s*\d+/4\].*? (loss: .*)', log)


def metrics(log):
    return re.findall(r'coco/(bbox|segm)_mAP: (\S+)', log)


def test_trains_and_says_where_weights_are(trained):
    _, work, log = trained
    assert len(losses(log)) == 4
    assert log.count('starts from random weights') == 1
    assert 'https://github.com/rayleizhu/BiFormer' in log
    assert (work / 'epoch_2.pth').is_file()


def test_resume_continues(trained):
    """From the first epoch's checkpoint, to the same end."""
    config, work, log = trained
    resumed = work.with_name('resumed')
    again = train(config, resumed, '--resume', work / 'epoch_1.pth')
    assert 'resumed epoch: 1, iter: 4' in again
    through, end = read_checkpoint(work / 'epoch_2.pth'), read_checkpoint(resumed / 'epoch_2.pth')
    assert {int(state['step']) for state in end['optimizer']['state'].values()} == {8}
    assert end['param_schedulers'] == through['param_schedulers']
    expected = through['state_dict']
    assert all(torch.equal(value, expected[key]) for key, value in end['state_dict'].items())
    assert len(losses(again)) == len(losses(log))


def test_evaluation_repeats_the_last_validation(trained):
    config, work, log = trained
    again = run_tool('test', config, work / 'epoch_2.pth', '--work-dir', work.with_name('test'))
    assert metrics(again)
    assert metrics(again) == metrics(log)[-2:]


def test_backbone_weights_from_a_file(trained):
    """--pretrained with a detector's file, at next to no learning rate: the backbone stays."""
    config, work, _ = trained
    pretrained, options = work.with_name('pretrained'), ['--pretrained', work / 'epoch_2.pth']
    settings = '--cfg-options', 'train_cfg.max_epochs=1', 'optim_wrapper.optimizer.lr=0'
    log = train(config, pretrained, *options, '--no-validate', *settings)
    assert 'starts from random weights' not in log
    assert 'Epoch(val)' not in log
    source, found = (
        read_checkpoint(path)['state_dict']
        for path in (work / 'epoch_2.pth', pretrained / 'epoch_1.pth')
    )
    # The schedule ends at 1e-6, whatever it begins with.
    same = {key for key in source if torch.allclose(source[key], found[key], rtol=0, atol=1e-4)}
    backbone = {key for key in source if key.startswith('backbone.')}
    statistics = {key for key in backbone if '.running_' in key or key.endswith('_tracked')}
    assert backbone - statistics <= same
    assert 'roi_head.mask_head.conv_logits.weight' not in same


def test_compiled(tmp_path):
    """MMEngine's key `compile`: the same losses."""
    config = tmp_path / 'toy.py'
    config.write_text(config_text())
    small = [f'model.backbone.arch.{key}=({n},)' for key, n in SMALL.items()]
    settings = 'randomness.seed=0', 'train_cfg.max_epochs=1', *small
    logs = [
        train(
            config,
            tmp_path / f'work{len(more)}',
            '--no-validate',
            '--cfg-options',
            *settings,
            *more,
        )
        for more in ((), ('compile.backend=eager',))
    ]
    assert 'Model has been "compiled"' in logs[1]
    found = [[float(loss) for loss in re.findall(r' loss: (\S+)', log)] for log in logs]
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-3)
