"""A run that is killed and resumed ends as one that was not, to the last bit."""

import contextlib
import errno
import functools
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.runner import FlexibleRunner

from mmbiformer.errors import CheckpointError
from mmbiformer.files import PARTIAL, WriteError
from mmbiformer.weights.read import read_checkpoint
from tests.helpers.toy_training import (
    ToyMetric,
    assert_equal,
    assert_same_end,
    in_processes,
    last,
    toy_runner,
    toy_train,
)

SHORT = dict(train_cfg__max_epochs=3)
SHORT_ITER = dict(train_cfg__max_iters=14)


def settings(by_epoch):
    return dict(by_epoch=by_epoch, **(SHORT if by_epoch else SHORT_ITER))


@pytest.fixture(scope='module')
def through(tmp_path_factory):
    """Runs that nobody kills: work folders by kind."""

    @functools.cache
    def run(by_epoch, workers=0):
        work = tmp_path_factory.mktemp('through')
        toy_train(work, workers=workers, **settings(by_epoch))
        return work

    return run


def log_of(runner):
    (path,) = Path(runner.log_dir).glob('*.log')
    return path.read_text()


@pytest.mark.parametrize(
    ('by_epoch', 'workers', 'fault'),
    [
        (True, 1, 'step:11'),
        (False, 1, 'step:10'),
        (True, 0, 'validation:6'),  # at epoch 2, whose checkpoint is there
        (False, 0, 'validation:6'),  # at iteration 12, as a checkpoint is written
        (True, 0, 'writing:6'),  # the checkpoint of epoch 2
        (False, 0, 'writing:3'),  # that of iteration 8
    ],
)
def test_killed_and_resumed(by_epoch, workers, fault, through, tmp_path):
    in_processes(tmp_path, workers=workers, fault=fault, status=-9, **settings(by_epoch))
    for path in tmp_path.glob('*.pth'):
        read_checkpoint(path)  # under its own name a file is always whole
    assert bool([*tmp_path.glob(f'.*{PARTIAL}')]) == fault.startswith('writing')
    toy_train(tmp_path, workers=workers, resume='auto', **settings(by_epoch))
    assert not [*tmp_path.glob(f'.*{PARTIAL}')]
    assert_same_end(tmp_path, through(by_epoch, workers))


@pytest.mark.parametrize('by_epoch', [True, False])
def test_two_processes_killed_and_resumed(by_epoch, tmp_path):
    """The checkpoint of iteration 4 is between two steps of the optimizer."""
    options = dict(settings(by_epoch), optim_wrapper__accumulative_counts=1 if by_epoch else 3)
    in_processes(tmp_path / 'through', count=2, **options)
    killed = tmp_path / 'killed'
    in_processes(killed, count=2, fault='step:5', status=-9, **options)
    in_processes(killed, count=2, resume='auto', **options)
    assert_same_end(killed, tmp_path / 'through')


NEVER_BETTER = dict(monitor='toy', rule='greater')
PLATEAU = dict(
    type='ReduceOnPlateauLR', **NEVER_BETTER, patience=0, threshold=100, threshold_rule='abs'
)
ONE_CYCLE = dict(type='OneCycleLR', eta_max=0.01, total_steps=14, by_epoch=False)
RESTARTS = dict(
    type='CosineRestartLR', periods=[3, 11], restart_weights=[1, 0.5], eta_min=0, by_epoch=False
)
EMA = dict(type='EMAHook', update_buffers=True, begin_epoch=2)
SIDE = dict(type='mmbiformer.SideEMAHook', begin_iter=3)
MOMENTUM = dict(type='LinearMomentum', start_factor=0.5, begin=2, end=9, by_epoch=False)


@pytest.mark.parametrize(
    ('by_epoch', 'options'),
    [
        (True, dict(param_scheduler=[PLATEAU], custom_hooks=[EMA])),
        (False, dict(param_scheduler=[dict(PLATEAU, cooldown=1), MOMENTUM], custom_hooks=[SIDE])),
        (True, dict(param_scheduler=[ONE_CYCLE], optim_wrapper__accumulative_counts=3)),
        (False, dict(param_scheduler=[RESTARTS], optim_wrapper__accumulative_counts=5)),
    ],
    ids=['plateau', 'plateau_iter', 'one_cycle', 'restarts'],
)
def test_schedules_and_hooks_go_on(by_epoch, options, tmp_path, monkeypatch):
    """Resumed from a checkpoint of before a validation, and of after one."""
    options = dict(settings(by_epoch), **options, default_hooks__checkpoint__max_keep_ckpts=-1)
    options.update(train_cfg__val_interval=1 if by_epoch else 4)
    toy_train(tmp_path / 'through', **options)
    file = 'epoch_2.pth' if by_epoch else 'iter_8.pth'
    toy_train(tmp_path / 'after', resume=str(tmp_path / 'through' / file), **options)
    assert_same_end(tmp_path / 'after', tmp_path / 'through')

    process, calls = ToyMetric.process, itertools.count(1)

    def fail(self, *args):
        if next(calls) == 6:  # in the second validation
            raise KeyboardInterrupt
        process(self, *args)

    monkeypatch.setattr(ToyMetric, 'process', fail)
    with pytest.raises(KeyboardInterrupt):
        toy_train(tmp_path / 'before', **options)
    log = log_of(toy_train(tmp_path / 'before', resume='auto', **options))
    assert 'Validating first: the run was killed before it had done so.' in log
    assert_same_end(tmp_path / 'before', tmp_path / 'through')
    before, through = tmp_path / 'before', tmp_path / 'through'
    assert {path.name for path in before.glob('*.pth')} == {
        path.name for path in through.glob('*.pth')
    }


def test_early_stopping(tmp_path):
    """It stops where it would have stopped, and goes on if it is given more patience."""
    hook = dict(type='EarlyStoppingHook', **NEVER_BETTER, min_delta=100.0, patience=3)
    options = dict(custom_hooks=[hook], default_hooks__checkpoint__max_keep_ckpts=-1)
    toy_train(tmp_path / 'through', **options)
    assert last(tmp_path / 'through')['meta']['epoch'] == 4
    toy_train(tmp_path / 'again', resume=str(tmp_path / 'through/epoch_2.pth'), **options)
    assert_same_end(tmp_path / 'again', tmp_path / 'through')
    log = log_of(toy_train(tmp_path / 'again', resume='auto', **options))
    assert 'EarlyStoppingHook ended the resumed run' in log
    options.update(custom_hooks=[dict(hook, patience=4)])
    toy_train(tmp_path / 'again', resume='auto', **options)
    assert last(tmp_path / 'again')['meta']['epoch'] == 5


def test_resumed_without_a_seed_in_the_config(tmp_path):
    """The sampler's own seed is in the checkpoint."""
    free = dict(settings(False), randomness=dict(seed=None, _delete_=True))
    toy_train(tmp_path / 'through', default_hooks__checkpoint__max_keep_ckpts=-1, **free)
    toy_train(tmp_path / 'resumed', resume=str(tmp_path / 'through/iter_8.pth'), **free)
    assert_same_end(tmp_path / 'resumed', tmp_path / 'through')


def test_resumed_by_another_number_of_processes(through, tmp_path):
    work = shutil.copytree(through(True), tmp_path / 'work')
    in_processes(work, count=2, resume='auto', train_cfg__max_epochs=4)
    assert (last(work)['meta']['epoch'], last(work)['meta']['iter']) == (4, 12 + 2)
    log = sorted(work.glob('*/*.log'))[-1]
    assert 'is of 1 processes, this run has 2: random numbers and the order of' in log.read_text()


def test_validation_leaves_the_random_state(through, tmp_path):
    none = dict(val_cfg=None, val_dataloader=None, val_evaluator=None)
    toy_train(tmp_path, default_hooks__checkpoint__save_best=None, **none, **settings(True))
    assert_same_end(tmp_path, through(True))


def test_a_checkpoint_is_read_once(through, tmp_path, monkeypatch):
    work = shutil.copytree(through(True), tmp_path / 'work')
    reads, load = [], torch.load

    def counted(path, *args, mmap=False, **kwargs):
        reads.append((Path(path).name, mmap))
        return load(path, *args, mmap=mmap, **kwargs)

    monkeypatch.setattr('torch.load', counted)
    toy_train(work, resume='auto', **settings(True))
    # The first only looks for a whole file: it maps the tensors and does not touch them.
    assert reads == [('epoch_3.pth', True), ('epoch_3.pth', False)]


RISING = dict(val_evaluator__type='RisingMetric')


@pytest.mark.parametrize(('fault', 'best'), [('writing:3', None), ('writing:8', 1)])
def test_the_best_stays_until_the_next_is_whole(fault, best, tmp_path):
    """Each epoch writes its checkpoint, the note of it, the best one, and both again."""
    in_processes(tmp_path, fault=fault, status=-9, **SHORT, **RISING)
    found = sorted(path.name for path in tmp_path.glob('best_*.pth'))
    assert found == ([f'best_toy_epoch_{best}.pth'] if best else [])
    toy_train(tmp_path, resume='auto', **SHORT, **RISING)
    assert [path.name for path in tmp_path.glob('best_*.pth')] == ['best_toy_epoch_3.pth']
    assert sorted(path.name for path in tmp_path.glob('e*.pth')) == ['epoch_2.pth', 'epoch_3.pth']


@pytest.mark.parametrize('several', [False, True])
def test_a_copied_run_leaves_the_original(several, tmp_path):
    """Its checkpoint names the best one of the original, which MMEngine would remove."""
    names = ['toy', 'other'] if several else 'toy'
    options = dict(SHORT, **RISING, default_hooks__checkpoint__save_best=names)
    original, copy = tmp_path / 'original', tmp_path / 'copy'
    toy_train(original, **options)
    before = sorted(original.glob('*.pth'))
    shutil.copytree(original, copy)
    toy_train(copy, resume='auto', **dict(options, train_cfg__max_epochs=4))
    assert sorted(original.glob('*.pth')) == before
    expected = [f'best_{name}_epoch_4.pth' for name in ('other', 'toy')[not several :]]
    assert sorted(path.name for path in copy.glob('best_*.pth')) == expected


def test_full_disk(tmp_path, monkeypatch):
    """The run ends; what was there stays."""
    fsync, writes = os.fsync, itertools.count(1)

    def fail(file):
        if next(writes) == 11:  # five an epoch, if each is better
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(file)

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(WriteError, match=r'epoch_3\.pth cannot be written .* No space left'):
        toy_train(tmp_path, **SHORT, **RISING)
    assert sorted(path.name for path in tmp_path.glob('epoch*')) == ['epoch_1.pth', 'epoch_2.pth']
    assert last(tmp_path)['meta']['epoch'] == 2


@pytest.fixture
def checkpoint(through):
    return through(True) / 'epoch_3.pth'


def test_checkpoint_of_another_model(checkpoint, tmp_path):
    """A training may start from it with another head, but not with another backbone."""
    damaged = read_checkpoint(checkpoint)
    weights = damaged['state_dict']
    other = dict(model__backbone__arch__mlp_ratio=2)
    path = str(tmp_path / 'x.pth')
    del weights['scale']
    torch.save(damaged, path)
    with pytest.raises(CheckpointError, match=r'x\.pth does not fit .*: scale is missing'):
        toy_train(tmp_path / 'a', resume=path, **SHORT)
    runner = toy_runner(tmp_path / 'b', **SHORT)
    runner._load_from = path
    runner.train()
    runner = toy_runner(tmp_path / 'c', **SHORT, **other)
    runner._load_from = path
    with pytest.raises(CheckpointError, match=r'mlp\.fc1\.weight is \(32, 32\) instead of'):
        runner.train()
    assert not [*(tmp_path / 'c').glob('*.pth')]


def test_checkpoint_that_is_tested(checkpoint, tmp_path):
    test = dict(test_cfg={}, test_evaluator=dict(type='ToyMetric'))
    loader = dict(batch_size=2, dataset=dict(type='ToyDataset'))
    loader['sampler'] = dict(type='DefaultSampler', shuffle=False)
    for more in ({}, dict(model__backbone__arch__mlp_ratio=2)):
        runner = toy_runner(tmp_path, test_dataloader=loader, **test, **more)
        runner._load_from = str(checkpoint)
        fits = contextlib.nullcontext() if not more else pytest.raises(CheckpointError)
        with fits:
            runner.test()


def test_weights_alone(checkpoint, tmp_path):
    torch.save(read_checkpoint(checkpoint)['state_dict'], tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match='holds no training run to resume'):
        toy_train(tmp_path / 'work', resume=str(tmp_path / 'weights.pth'))


def test_another_learning_rate(checkpoint, tmp_path):
    """MMEngine restores the old one: a warning says so."""
    options = dict(resume=str(checkpoint), train_cfg__max_epochs=4)
    rate = dict(optim_wrapper__optimizer__lr=0.5)
    logs = [log_of(toy_train(tmp_path / str(len(more)), **options, **more)) for more in ({}, rate)]
    assert 'learning rate' not in logs[0]
    assert "The checkpoint's learning rate 0.001 holds, not 0.5 of the config" in logs[1]
    assert f'load_from={checkpoint} in another --work-dir' in logs[1]
    assert_equal(last(tmp_path / '0')['state_dict'], last(tmp_path / '1')['state_dict'])


def test_file_of_mmengine_itself(tmp_path):
    """Without a random state, it resumes as MMEngine does."""
    own = dict(default_hooks__checkpoint__type='CheckpointHook')
    toy_train(tmp_path / 'work', **own, train_cfg__max_epochs=1)
    assert 'random_state' not in last(tmp_path / 'work')
    toy_train(tmp_path / 'work', resume='auto', **SHORT)
    assert last(tmp_path / 'work')['meta']['epoch'] == 3


def test_flexible_runner(tmp_path):
    """It takes the point of a checkpoint after a validation for one step too many."""
    kind = dict(SHORT, runner=FlexibleRunner, optim_wrapper__accumulative_counts=3)
    kind.update(param_scheduler=[PLATEAU], default_hooks__checkpoint__max_keep_ckpts=-1)
    toy_train(tmp_path / 'through', **kind)
    toy_train(tmp_path / 'again', resume=str(tmp_path / 'through/epoch_2.pth'), **kind)
    assert_same_end(tmp_path / 'again', tmp_path / 'through')
