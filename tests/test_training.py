"""One real training through the commands: train, resume, evaluate, on a few synthetic scenes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training
from in_process import run_tool, train

from mmbiformer.datasets import make_shapes
from mmbiformer.safe_load import safe_load

ROOT = Path(__file__).parent.parent
CONFIG = """
_base_ = '{root}/configs/demo/maskrcnn_biformer_t_shapes.py'
data_root = '{data}/'
model = dict(backbone=dict(
    _delete_=True, type='mmbiformer.BiFormer',
    arch=dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(max_keep_ckpts=-1))
"""


def run(*args):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs in one go: the config, the work folder and the log."""
    folder = tmp_path_factory.mktemp('training')
    make_shapes(folder / 'shapes', train=8, val=4, progress=False)
    config = folder / 'config.py'
    config.write_text(CONFIG.format(root=ROOT, data=folder / 'shapes'))
    log = run('tools/train.py', config, '--work-dir', folder / 'work')
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
    """From the first epoch's checkpoint, with what MMEngine stores beside the weights."""
    config, work, log = trained
    resumed = work.with_name('resumed')
    again = run('tools/train.py', config, '--work-dir', resumed, '--resume', work / 'epoch_1.pth')
    assert 'resumed epoch: 1, iter: 4' in again
    # The data come in another order than in one go; the state they are met with is the same.
    start, end = safe_load(work / 'epoch_1.pth'), safe_load(resumed / 'epoch_2.pth')
    through = safe_load(work / 'epoch_2.pth')
    assert end['meta']['iter'] == through['meta']['iter'] == 8
    steps = {int(state['step']) for state in end['optimizer']['state'].values()}
    assert steps == {8}
    assert end['param_schedulers'] == through['param_schedulers']
    name = 'backbone.stages.0.0.attn.qkv.weight'
    assert not torch.equal(start['state_dict'][name], end['state_dict'][name])
    moved = (start['state_dict'][name] - end['state_dict'][name]).abs().max()
    assert moved < 10 * 5e-4  # not from scratch
    assert len(losses(again)) == len(losses(log))


def test_evaluation_repeats_the_last_validation(trained):
    config, work, log = trained
    again = run_tool('test', config, work / 'epoch_2.pth', '--work-dir', work.with_name('test'))
    assert metrics(again)
    assert metrics(again) == metrics(log)[-2:]


def test_backbone_weights_from_a_file(trained):
    """--pretrained with a detector's file, at next to no learning rate: the backbone stays."""
    config, work, _ = trained
    pretrained = work.with_name('pretrained')
    log = train(
        config,
        pretrained,
        '--pretrained',
        work / 'epoch_2.pth',
        '--no-validate',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'optim_wrapper.optimizer.lr=0',
    )
    assert 'starts from random weights' not in log
    assert 'Epoch(val)' not in log
    source, found = (
        safe_load(folder / name)['state_dict']
        for folder, name in ((work, 'epoch_2.pth'), (pretrained, 'epoch_1.pth'))
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
    config.write_text(toy_training.config_text())
    settings = '--cfg-options', 'randomness.seed=0', 'train_cfg.max_epochs=1'
    logs = [
        train(config, tmp_path / f'work{len(more)}', *settings, *more)
        for more in ((), ('compile.backend=aot_eager',))
    ]
    assert 'Model has been "compiled"' in logs[1]
    found = [[float(loss) for loss in re.findall(r' loss: (\S+)', log)] for log in logs]
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-3)
