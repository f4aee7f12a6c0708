"""From what a run resumes, and what a resumed file may not do."""

import contextlib
import copy
import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper
from test_faults import last, run, write_config
from torch import nn

from mmbiformer.checkpoint import check_fit
from mmbiformer.engine import checkpoint_hook
from mmbiformer.engine.checkpoint_hook import (
    AtomicBackend,
    CheckpointHook,
    _check_optimizer_state,
    check_resumable,
    find_whole_checkpoint,
    random_state,
    set_random_state,
)
from mmbiformer.engine.checks import CommandError
from mmbiformer.engine.command_line import build_runner, claim_work_dir, make_resumable
from mmbiformer.engine.faults import faults_explained
from mmbiformer.engine.files import WriteError
from mmbiformer.safe_load import CheckpointError, safe_load

WHOLE = dict(meta=dict(epoch=1, iter=4), message_hub={}, optimizer={}, state_dict={})


def write(path, checkpoint, age=0):
    torch.save(checkpoint, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def config(folder, **kwargs):
    model = dict(backbone=dict(type='mmbiformer.BiFormer'))
    return Config(dict(work_dir=str(folder), default_hooks={}, model=model, **kwargs))


def test_nothing_is_started_over_silently(tmp_path):
    write(tmp_path / 'best_toy_epoch_1.pth', dict(state_dict={}))
    with pytest.raises(
        CheckpointError, match=r'(?s)best_toy_epoch_1.pth lacks message_hub, meta, optimizer.*Move'
    ):
        make_resumable(config(tmp_path), 'auto')
    whole = write(tmp_path / 'epoch_1.pth', WHOLE, age=9)
    cfg = config(tmp_path)
    make_resumable(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (whole, True)


def test_starts_as_without_the_option_if_there_is_none(tmp_path):
    """Also beside a note of a checkpoint that is gone, which MMEngine would follow."""
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    weights = write(tmp_path / 'weights', {'backbone.stages.0.0.norm1.weight': torch.ones(2)})
    cfg = config(tmp_path, load_from=weights)
    make_resumable(cfg, 'auto')
    assert (cfg.load_from, cfg.resume) == (weights, False)
    cfg = config(tmp_path)
    make_resumable(cfg, 'auto')
    assert (cfg.get('load_from'), cfg.resume) == (None, False)
    with pytest.raises(CommandError, match='load_from: there is no file none'):
        make_resumable(config(tmp_path, load_from='none.pth'))
    other = write(tmp_path / 'resnet', {'conv1.weight': torch.ones(2)})
    cfg = config(tmp_path, load_from=other)
    with pytest.raises(CheckpointError, match='this is not a model around'):
        make_resumable(cfg)
    cfg.model.backbone.type = 'ResNet'
    make_resumable(cfg)
    make_resumable(config(tmp_path, load_from='s3://bucket/file.pth'))  # MMEngine's to find


def test_a_copied_run_goes_on_from_its_own_checkpoint(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        write(tmp_path / name / 'epoch_2.pth', WHOLE)
        (tmp_path / name / 'last_checkpoint').write_text(str(tmp_path / 'a' / 'epoch_2.pth'))
    assert find_whole_checkpoint(tmp_path / 'b') == (str(tmp_path / 'b' / 'epoch_2.pth'), [])
    (tmp_path / 'b' / 'epoch_2.pth').write_bytes(b'')
    before = write(tmp_path / 'b' / 'epoch_1.pth', WHOLE)
    found, (told,) = find_whole_checkpoint(tmp_path / 'b')
    assert found == before and str(tmp_path / 'b' / 'epoch_2.pth') in told
    for path in (tmp_path / 'b').glob('*.pth'):
        path.unlink()
    original = tmp_path / 'a' / 'epoch_2.pth'
    with pytest.raises(CheckpointError, match=f'no checkpoint of its own.*--resume {original}'):
        find_whole_checkpoint(tmp_path / 'b')


def test_last_checkpoint_that_may_not_be_read(tmp_path, monkeypatch):
    """May be whole, other than one at which the disk fails."""
    before, newest = (write(tmp_path / f'epoch_{i}.pth', WHOLE) for i in (1, 2))
    for code in (errno.EIO, errno.EACCES):

        def fail(path, code=code):
            if str(path) == newest:
                raise OSError(code, os.strerror(code), newest)
            return safe_load(path)

        monkeypatch.setattr('mmbiformer.engine.checkpoint_hook.safe_load', fail)
        if code == errno.EIO:
            found, (told,) = find_whole_checkpoint(tmp_path)
            assert found == before and newest in told
        else:
            with pytest.raises(PermissionError, match=newest):
                find_whole_checkpoint(tmp_path)


def test_checkpoints_elsewhere_are_found(tmp_path):
    """The out_dir of the hook has a folder named like the work folder."""
    work, other = tmp_path / 'work', tmp_path / 'other' / 'work'
    for folder in (work, other):
        folder.mkdir(parents=True)
    whole = [write(other / f'epoch_{i}.pth', WHOLE) for i in (1, 2)]
    (work / 'last_checkpoint').write_text(whole[1])
    for expected in reversed(whole):
        cfg = config(work)
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', out_dir=str(tmp_path / 'other'))
        make_resumable(cfg, 'auto')
        assert cfg.load_from == expected
        damaged = tmp_path / 'other' / 'work' / 'epoch_2.pth'
        damaged.write_bytes(b'')


def test_numbers_count_more_than_the_time(tmp_path):
    """Which copying changes."""
    whole = {i: write(tmp_path / f'epoch_{i}.pth', WHOLE, age=i) for i in (1, 2, 9, 10)}
    write(tmp_path / 'epoch_11.old.pth', WHOLE)
    assert find_whole_checkpoint(tmp_path)[0] == whole[10]
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))  # of a later run
    assert find_whole_checkpoint(tmp_path)[0] == whole[2]
    (tmp_path / 'last_checkpoint').unlink()
    newest = write(tmp_path / 'iter_4.pth', WHOLE)
    assert find_whole_checkpoint(tmp_path)[0] == newest  # not to be compared


def test_odd_names_do_not_block(tmp_path):
    whole = write(tmp_path / 'epoch_1.pth', WHOLE)
    (tmp_path / 'epoch_2.pth').symlink_to('nowhere')
    (tmp_path / 'epoch_3.pth').symlink_to('epoch_3.pth')
    (tmp_path / 'epoch_4.pth').mkdir()
    for text in ('', '/', '..', 'x' * 5000, 'x/' * 5000, 'a\0b', str(tmp_path / 'epoch_3.pth')):
        (tmp_path / 'last_checkpoint').write_text(text)
        assert find_whole_checkpoint(tmp_path) == (whole, [])


def test_a_note_of_the_last_checkpoint_that_has_no_end(tmp_path):
    """It may come with a folder from someone else; nobody would write into the pipe."""
    whole, note = write(tmp_path / 'epoch_1.pth', WHOLE), tmp_path / 'last_checkpoint'
    os.mkfifo(note)
    with ends_within(5):
        assert find_whole_checkpoint(tmp_path) == (whole, [])
    note.unlink()
    note.symlink_to('/dev/zero')
    with ends_within(5):
        assert find_whole_checkpoint(tmp_path) == (whole, [])
    note.unlink()
    with note.open('wb') as file:
        file.truncate(2**40)
    with ends_within(5):
        assert find_whole_checkpoint(tmp_path) == (whole, [])


@contextlib.contextmanager
def ends_within(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_links_in_a_folder_from_someone_else(tmp_path):
    """Where they lead nothing is lost, neither by a half checkpoint nor by the lock."""
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    partial = tmp_path / '.epoch_1.pth.mmbiformer.partial'
    partial.symlink_to(victim)
    AtomicBackend().put(b'new', tmp_path / 'epoch_1.pth')
    assert (tmp_path / 'epoch_1.pth').read_bytes() == b'new'
    assert not (tmp_path / 'epoch_1.pth').is_symlink()
    os.mkfifo(partial)
    with ends_within(5):
        AtomicBackend().put(b'newer', tmp_path / 'epoch_1.pth')
    cfg = Config(dict(work_dir=str(tmp_path), launcher='none'))
    lock = tmp_path / '.lock'
    lock.symlink_to(victim)
    for _ in range(2):
        with pytest.raises(CommandError, match=r'/\.lock is no plain file; remove it, or'):
            claim_work_dir(cfg)
        lock.unlink()
        os.mkfifo(lock)
    assert victim.read_text() == 'precious'


@pytest.mark.parametrize('code', ['ENOLCK', 'EOPNOTSUPP'])
def test_disk_without_locks(code, tmp_path, monkeypatch):
    """As some networks' disks: the run goes on, and says so."""

    def refuse(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr('fcntl.lockf', refuse)
    runner = train(write_config(tmp_path), tmp_path / 'work')
    assert runner.epoch == 1
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert f'a disk that cannot lock files ({os.strerror(getattr(errno, code))})' in log


def test_checkpoints_of_an_earlier_run_are_told_of(tmp_path):
    assert make_resumable(config(tmp_path)) == []
    write(tmp_path / 'best_toy_epoch_1.pth', WHOLE)
    assert make_resumable(config(tmp_path)) == []
    write(tmp_path / 'iter_4.pth', WHOLE)
    (told,) = make_resumable(config(tmp_path))
    for part in (f'{tmp_path} holds', 'iter_4.pth', 'give --resume', 'another --work-dir'):
        assert part in told
    assert make_resumable(config(tmp_path), 'auto') == []


def test_only_the_best_of_this_run_is_removed(tmp_path):
    for name in ('run', 'other'):
        (tmp_path / name).mkdir()
        for file in ('best_a_epoch_1.pth', 'epoch_1.pth'):
            (tmp_path / name / file).write_bytes(b'')
    (tmp_path / 'run' / 'best_link.pth').symlink_to(tmp_path / 'other' / 'epoch_1.pth')
    (tmp_path / 'run' / 'best_folder').mkdir()

    def kept(path, key='best_ckpt', **kwargs):
        hook = CheckpointHook(**{'save_best': 'a', 'rule': 'greater', **kwargs})
        runner = SimpleNamespace(
            work_dir=str(tmp_path / 'run'),
            _resume=False,
            iter=0,
            logger=SimpleNamespace(info=print),
            message_hub=SimpleNamespace(runtime_info={key: path, 'keep_ckpt_ids': '../other'}),
            train_loop=None,
        )
        runner.message_hub.get_info = runner.message_hub.runtime_info.get
        hook.before_train(runner)
        assert not getattr(hook, 'keep_ckpt_ids', None)
        found = runner.message_hub.runtime_info.get(key)
        assert found == (
            hook.best_ckpt_path if key == 'best_ckpt' else hook.best_ckpt_path_dict['a']
        )
        return found

    own = str(tmp_path / 'run' / 'best_a_epoch_1.pth')
    assert kept(own) == own
    both = dict(save_best=['a', 'b'], rule=['greater', 'greater'])
    assert kept(own, 'best_ckpt_a', **both) == own
    for foreign in (
        'other/best_a_epoch_1.pth',
        'run/../other/best_a_epoch_1.pth',
        'run/epoch_1.pth',
        'run/best_link.pth',
        'run/best_folder',
        'run/best_none.pth',
        '.',
    ):
        assert kept(str(tmp_path / foreign)) is None, foreign
        assert kept(str(tmp_path / foreign), 'best_ckpt_a', **both) is None, foreign
    assert kept(3) is None
    for strange in (dict(), dict(save_best=None, rule=None)):
        hook = CheckpointHook(**{'save_best': 'a', 'rule': 'greater', **strange})
        info = {'best_ckpt_b': '/', 'best_ckpt': '/'}
        hook.out_dir, hook.file_backend = str(tmp_path), LocalBackend()
        hook._forget_foreign_best(info)
        assert not info


@pytest.mark.parametrize('names', [['a'], ['a', 'b']])
def test_the_best_stays_until_the_next_is_whole(names, tmp_path):
    """MMEngine removes it before it writes: killed there, a run had lost both."""
    info, writes = {}, []
    for name in names:
        (tmp_path / f'best_{name}_epoch_1.pth').write_bytes(b'')
        end = f'_{name}' if len(names) > 1 else ''
        info[f'best_ckpt{end}'] = str(tmp_path / f'best_{name}_epoch_1.pth')
        info[f'best_score{end}'] = 1.0

    def files():
        return sorted(path.name for path in tmp_path.glob('*.pth'))

    def save(folder, filename, **kwargs):
        writes.append(files())
        if len(writes) == 1:
            raise WriteError('the disk is full')
        Path(folder, filename).write_bytes(b'')

    hub = MessageHub.get_instance(f'best {names}')
    for key, value in info.items():
        hub.update_info(key, value)
    runner = SimpleNamespace(
        work_dir=str(tmp_path), _resume=False, logger=SimpleNamespace(info=print), epoch=2, iter=8,
        message_hub=hub, train_loop=None, save_checkpoint=save,
    )  # fmt: skip
    for scores, best in ((2.0, 1), (2.0, 2), (0.5, 2)):
        hook = CheckpointHook(save_best=names, rule='greater')
        for key, value in info.items():  # those of the file that is resumed from
            hub.update_info(key, value)
        hook.before_train(runner)
        if len(writes) == 1:
            assert files() == [f'best_{name}_epoch_1.pth' for name in names]
        with contextlib.suppress(WriteError):
            hook._save_best_checkpoint(runner, dict.fromkeys(names, scores))
        assert files() == [f'best_{name}_epoch_{best}.pth' for name in names]
        if best == 2:
            info = {key: hub.get_info(key) for key in info}


def test_one_training_at_a_time_in_a_folder(tmp_path):
    """A second one, as of a scheduler that takes the first for dead, writes nothing there."""
    path, work = write_config(tmp_path), tmp_path / 'work'
    claim_work_dir(Config(dict(work_dir=str(work), launcher='none')))
    out = run(path, work, '--resume', status=2)
    assert f'error: --work-dir {work}: another training is under way there (process ' in out
    assert f'(process {os.getpid()} on ' in out and 'choose another --work-dir' in out
    assert os.listdir(work) == ['.lock']


def test_half_checkpoints_of_a_killed_run_go(tmp_path):
    """Not all are written again: those of the best one, say."""
    half = tmp_path / 'work' / '.best_toy_epoch_3.pth.mmbiformer.partial'
    half.parent.mkdir()
    half.write_bytes(b'half')
    train(write_config(tmp_path), half.parent, resume='auto')
    assert (half.parent / 'epoch_1.pth').exists() and not half.exists()


def test_folder_of_checkpoints_that_cannot_be_written(tmp_path):
    """Said at once, not when the first is written."""
    (tmp_path / 'file').touch()
    cfg = config(tmp_path / 'work')
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', out_dir=str(tmp_path / 'file'))
    with pytest.raises(CommandError, match=r'file is a file; choose another default_hooks\.checkp'):
        make_resumable(cfg)
    cfg.default_hooks.checkpoint.out_dir = 's3://bucket/runs'
    make_resumable(cfg)


def test_last_checkpoint_is_whole(tmp_path, monkeypatch):
    """It is written like a checkpoint. An empty one would make an earlier run's files the last."""
    written = []
    monkeypatch.setattr(
        checkpoint_hook, 'write_whole', lambda path, content, *_: written.append(Path(path).name)
    )
    train(write_config(tmp_path), tmp_path / 'work', resume='auto')
    assert written == ['epoch_1.pth', 'last_checkpoint']
    assert not (tmp_path / 'work' / 'last_checkpoint').exists()


def test_a_resumed_file_removes_nothing_of_others(tmp_path):
    """By a real run; and a file of another config is refused before it trains."""
    path = write_config(tmp_path)
    options = '--cfg-options', 'train_cfg.max_epochs=1'
    run(path, tmp_path / 'work', *options)
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'file').write_text('precious')
    checkpoint = last(tmp_path / 'work')
    checkpoint['message_hub']['runtime_info'].update(best_ckpt=str(victim), best_score=-1e9)
    evil = write(tmp_path / 'evil.pth', checkpoint)
    more = '--cfg-options', 'train_cfg.max_epochs=2'
    run(path, tmp_path / 'resumed', '--resume', evil, *more)
    assert (victim / 'file').read_text() == 'precious'
    (best,) = (tmp_path / 'resumed').glob('best_*.pth')
    assert best.name == 'best_toy_epoch_2.pth'
    out = run(
        path,
        tmp_path / 'other',
        '--resume',
        evil,
        *more,
        'model.backbone.arch.mlp_ratio=2',
        status=2,
    )
    assert 'evil.pth does not fit the config: backbone.stages.0.0.mlp.fc1.weight is (32, 32)' in out
    assert 'Traceback' not in out


def train(path, work, resume=None, **settings):
    """A training in this process."""
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'train_cfg.max_epochs': 1, **settings})
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.work_dir = cfg.experiment_name = str(work)
    cfg.launcher = 'none'
    if resume:
        make_resumable(cfg, str(resume))
    runner = build_runner(cfg)
    with faults_explained(cfg):
        runner.train()
    return runner


@pytest.fixture(scope='module')
def epoch(tmp_path_factory):
    """A config, one epoch of it, and the checkpoint that MMEngine's own hook wrote then."""
    folder = tmp_path_factory.mktemp('epoch')
    path = write_config(folder)
    runner = train(path, folder / 'work')
    checkpoint = last(folder / 'work')
    assert 'random_state' not in checkpoint
    return path, runner, checkpoint


def test_finished_run_says_so(epoch, tmp_path):
    """Also: a file of MMEngine's own hook resumes, with other values of the same settings."""
    path, _, checkpoint = epoch
    checkpoint = copy.deepcopy(checkpoint)
    score = torch.tensor(0.5)  # as some metrics give it
    checkpoint['message_hub']['runtime_info'].update(best_score=score)
    source = write(tmp_path / 'epoch_1.pth', checkpoint)
    logs = {}
    for epochs in (1, 2):
        work = tmp_path / str(epochs)
        options = {'train_cfg.max_epochs': epochs, 'optim_wrapper.optimizer.lr': 1e-2}
        train(path, work, source, **options)
        logs[epochs] = next(work.glob('*/*.log')).read_text()
    assert 'at epoch 1 of 1: nothing is left to train; raise train_cfg.max_epochs' in logs[1]
    assert 'nothing is left' not in logs[2]
    end = last(tmp_path / '2')
    assert (end['meta']['epoch'], end['meta']['iter']) == (2, 8)


@pytest.mark.parametrize('kind', ['Runner', 'FlexibleRunner'])
def test_testing_leaves_the_config_that_training_wrote(kind, epoch, tmp_path):
    cfg = Config.fromfile(epoch[0])
    record = tmp_path / 'toy.py'
    record.write_text(cfg.pretty_text)
    cfg.test_cfg, cfg.test_evaluator = {}, cfg.val_evaluator
    cfg.test_dataloader = cfg.val_dataloader
    cfg.train_cfg = cfg.train_dataloader = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.work_dir = cfg.experiment_name = str(tmp_path)
    cfg.launcher, cfg.runner_type = 'none', kind
    assert type(build_runner(cfg, ('test',))).__name__ == kind
    assert Config.fromfile(record).train_cfg.max_epochs == 6
    cfg.runner_type = 'Runer'
    with pytest.raises(CommandError, match=r'toy.py cannot be built: .*Runer is not in the runner'):
        build_runner(cfg, ('test',))


def state(checkpoint):
    return [*checkpoint['optimizer']['state'].values()][-1]


RANDOM = dict(sampler_seed=0, ranks=[random_state()])
DAMAGES = {
    'message_hub of another kind': lambda c: c['message_hub'].update(log_scalars=[1]),
    'message_hub without parts': lambda c: c['message_hub'].clear(),
    'message_hub without names': lambda c: c['message_hub'].update(runtime_info={3: 4}),
    'message_hub of odd names': lambda c: c['message_hub']['log_scalars'].update(
        {'train/\x1b[2J': HistoryBuffer([1], [1])}
    ),
    'message_hub that contradicts itself': lambda c: c['message_hub']['resumed_keys'].update(
        {'train/lr': False}
    ),
    'message_hub with an odd score': lambda c: c['message_hub']['runtime_info'].update(
        best_score='x'
    ),
    'optimizer that is empty': lambda c: c['optimizer'].clear(),
    'optimizer of other groups': lambda c: c['optimizer']['param_groups'].append(
        dict(c['optimizer']['param_groups'][0], params=[])
    ),
    'optimizer without a rate': lambda c: c['optimizer']['param_groups'][0].update(lr='x'),
    'optimizer of odd settings': lambda c: c['optimizer'].update(base_param_settings=[]),
    'optimizer of odd states': lambda c: c['optimizer']['state'].update({0: [1]}),
    'optimizer with another shape (exp_avg of backbone.': lambda c: state(c).update(
        exp_avg=torch.zeros(3, 2)
    ),
    'optimizer with one number (exp_avg_sq of ': lambda c: state(c).update(
        exp_avg_sq=torch.zeros(1)
    ),
    'optimizer without a part (exp_avg of ': lambda c: state(c).pop('exp_avg'),
    'optimizer with text': lambda c: state(c).update(step='x'),
    'optimizer with many steps (step of ': lambda c: state(c).update(step=torch.ones(2)),
    'optimizer with odd steps (step of ': lambda c: state(c).update(step=torch.tensor(-5.0)),
    'param_schedulers of another kind': lambda c: c.update(param_schedulers=3),
    'param_schedulers of another number': lambda c: c.update(param_schedulers=[]),
    'param_schedulers of odd state': lambda c: c['param_schedulers'][0].update(base_values=['x']),
    'param_schedulers with more': lambda c: c['param_schedulers'][0].update(more=1),
    'random_state of another kind': lambda c: c.update(random_state=[]),
    'random_state of nobody': lambda c: c.update(random_state=dict(RANDOM, ranks=3)),
    'random_state of an odd seed': lambda c: c.update(random_state=dict(RANDOM, sampler_seed='x')),
    'random_state of lists': lambda c: c.update(
        random_state=dict(RANDOM, ranks=[dict(random_state(), torch=[1])])
    ),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_state_is_one_message(name, epoch):
    _, runner, checkpoint = epoch
    runner._resume, runner._load_from = True, 'epoch_1.pth'
    runner.optim_wrapper.base_param_settings = None  # what another damage left
    resume(runner, copy.deepcopy(checkpoint))
    checkpoint = copy.deepcopy(checkpoint)
    DAMAGES[name](checkpoint)
    part, _, reason = name.partition('(')
    with pytest.raises(CheckpointError, match=rf'epoch_1\.pth .*its {part.split()[0]} ') as info:
        resume(runner, checkpoint)
    assert reason in str(info.value)


def test_file_of_another_task(epoch):
    """Its model is to blame, not the optimizer that trained it."""
    _, runner, checkpoint = epoch
    runner._resume, runner._load_from = True, 'epoch_1.pth'
    weights = {k: v for k, v in checkpoint['state_dict'].items() if k.startswith('backbone.')}
    weights['head.weight'] = torch.zeros(1)
    groups = [dict(checkpoint['optimizer']['param_groups'][0], params=[0])]
    optimizer = dict(state={}, param_groups=groups)
    with pytest.raises(CheckpointError, match=r'epoch_1\.pth does not fit .* ballast is missing'):
        resume(runner, dict(checkpoint, state_dict=weights, optimizer=optimizer))


KINDS = {
    **{name: {} for name in ('Adadelta', 'Adagrad', 'Adam', 'Adamax', 'AdamW', 'ASGD', 'LBFGS')},
    **{name: {} for name in ('Adafactor', 'Muon', 'NAdam', 'RAdam', 'Rprop', 'SGD')},
    'RMSprop': dict(momentum=0.9, centered=True),
    'Adam with its largest': dict(amsgrad=True),
    'SGD with momentum': dict(momentum=0.9),
    'SGD all at once': dict(momentum=0.9, foreach=True),
}


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_states_of_every_optimizer(name, dtype):
    """Those that it makes are taken, also where some parameters have had no gradient."""
    kind = getattr(torch.optim, name.split()[0], None)
    if kind is None:  # in an older torch
        return
    model = nn.Sequential(nn.Linear(2, 3, bias=name != 'Muon'), nn.Linear(2, 3, bias=False))
    scales = []
    if name != 'Muon':  # numbers, as in mmdet's heads, of gradients of either sign
        scales = [nn.Parameter(torch.tensor(value)) for value in (1.0, -1.0)]
        model.scales = nn.ParameterList(scales)
    model.to(dtype)

    def wrapper():
        return OptimWrapper(kind(model.parameters(), lr=0.1, **KINDS[name]))

    first = wrapper()
    loss = model[0](torch.ones(1, 2, dtype=dtype)).sum()
    (loss + sum(scale**2 for scale in scales)).backward()
    first.optimizer.step(lambda: torch.zeros(()))
    saved = copy.deepcopy(first.state_dict())
    names = {parameter: name for name, parameter in model.named_parameters()}
    _check_optimizer_state(wrapper(), saved, names)
    for state in saved['state'].values():  # older ones had numbers
        state.update({key: float(value) for key, value in state.items() if key == 'step'})
    _check_optimizer_state(wrapper(), saved, names)


def resume(runner, checkpoint):
    hook = CheckpointHook()
    hook.after_load_checkpoint(runner, checkpoint)
    hook.before_train(runner)


SETTINGS = {
    'another optimizer': {'optim_wrapper.optimizer': dict(type='SGD', lr=0.1, _delete_=True)},
    'other groups of optimizer': {'optim_wrapper.paramwise_cfg': dict(bias_lr_mult=2.0)},
    'more param_schedulers': {'param_scheduler': [dict(type='ConstantLR')] * 2},
    'other param_schedulers': {'param_scheduler': [dict(type='MultiStepLR', milestones=[3])]},
}


@pytest.mark.parametrize('name', SETTINGS)
def test_other_settings_than_those_it_was_trained_with(name, epoch, tmp_path):
    path, _, checkpoint = epoch
    source = write(tmp_path / 'epoch_1.pth', checkpoint)
    more = {'train_cfg.max_epochs': 2, **SETTINGS[name]}
    with pytest.raises(CommandError) as info:
        train(path, tmp_path / 'work', source, **more)
    message = str(info.value)
    part = name.split()[-1]
    assert f'{source} cannot be resumed from: its {part} does not fit this run' in message
    assert 'Resume with the settings it was trained with' in message
    assert f'--cfg-options load_from={source} in another --work-dir' in message
    assert not [*(tmp_path / 'work').glob('*.pth')]


@pytest.mark.parametrize(
    ('settings', 'told'),
    [
        ({}, None),
        ({'optim_wrapper.optimizer.lr': 0.5}, 'initial_lr=0.001 instead of 0.5'),
        (
            {'optim_wrapper.optimizer.betas': (0.5, 0.9)},
            'betas=(0.9, 0.999) instead of (0.5, 0.9). ',
        ),
        ({'param_scheduler.T_max': 80}, 'CosineAnnealingLR.T_max=40 instead of 80. '),
    ],
)
def test_settings_of_the_config_that_do_nothing(settings, told, epoch, tmp_path):
    """MMEngine restores those of the checkpoint: a warning says which."""
    path, _, checkpoint = epoch
    source = write(tmp_path / 'epoch_1.pth', checkpoint)
    runner = train(path, tmp_path / 'work', source, **{'train_cfg.max_epochs': 1, **settings})
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert ('settings of the checkpoint hold' in log) == bool(told)
    assert told is None or told in log


def test_another_batch_size_changes_no_schedule(tmp_path):
    """The schedule counts iterations: resumed with twice as many images each, it ends halfway."""
    path = write_config(tmp_path)
    text = path.read_text().replace('by_epoch=False, T_max=40', 'T_max=6, convert_to_iter_based=1')
    path.write_text(text)
    train(path, tmp_path / 'work', resume='auto')
    source = tmp_path / 'work' / 'epoch_1.pth'
    runner = train(path, tmp_path / 'other', source, **{'train_dataloader.batch_size': 4})
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert 'not those of the config: CosineAnnealingLR.' in log
    assert 'CosineAnnealingLR.T_max=24 instead of 12' in log


def test_average_of_another_kind(epoch, tmp_path):
    """What hooks of others stumble over while they resume."""
    path, _, checkpoint = epoch
    source = write(tmp_path / 'epoch_1.pth', dict(checkpoint, ema_state_dict=3))
    hooks = [dict(type='EMAHook', begin_iter=1)]
    with pytest.raises(CommandError) as info:
        train(path, tmp_path / 'work', source, custom_hooks=hooks)
    assert str(info.value).startswith(f'{source} cannot be resumed from: ')
    assert 'another --work-dir' in str(info.value)


@pytest.mark.parametrize('name', ['epoch', 'iter'])
def test_counters_are_required(name):
    for value in (None, 2**40):
        meta = dict(WHOLE['meta'], **{name: value})
        with pytest.raises(CheckpointError, match=rf'it lacks a number as meta\.{name}\. To'):
            check_resumable('x.pth', dict(WHOLE, meta=meta))


def test_random_state_of_strangers():
    state = random_state()
    kind, keys, _, *gauss = state['numpy']
    for position in (-1, 625, 2**30):  # of which numpy reads beyond its memory
        with pytest.raises(CheckpointError, match='random_state'):
            set_random_state(dict(state, numpy=(kind, keys, position, *gauss)))
    with pytest.raises(CheckpointError, match='random_state'):
        set_random_state(dict(state, numpy=(kind, keys[1:], 0, *gauss)))
    expected = np.random.rand()
    set_random_state(state)
    assert np.random.rand() == expected


def test_whole_weights_fit():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    check_fit(model, dict(state_dict=state), 'FILE')
    check_fit(model, {f'module.{name}': value for name, value in state.items()}, 'FILE')
    del state['1.num_batches_tracked']  # which older files lack
    check_fit(model, dict(state_dict=state), 'FILE')
    wrong = dict(state, **{'0.weight': torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r'FILE does not fit .*0\.weight is \(2, 2\) instead'):
        check_fit(model, wrong, 'FILE')
    del wrong['0.weight'], wrong['1.bias']
    with pytest.raises(CheckpointError, match=r'0\.weight is missing, 1\.bias is missing\. Take'):
        check_fit(model, wrong, 'FILE')
