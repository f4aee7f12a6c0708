"""From what a run resumes, and what a resumed file may not do."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from test_faults import last, run, write_config
from torch import nn

from mmbiformer.checkpoint import check_fit
from mmbiformer.engine.checkpoint_hook import (
    CheckpointHook,
    find_whole_checkpoint,
    random_state,
    set_random_state,
)
from mmbiformer.engine.checks import CommandError
from mmbiformer.engine.command_line import make_resumable
from mmbiformer.safe_load import CheckpointError

WHOLE = dict(meta={}, message_hub={}, optimizer={}, state_dict={})


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
    (tmp_path / 'b' / 'epoch_2.pth').unlink()  # written elsewhere, as out_dir of the hook has it
    assert find_whole_checkpoint(tmp_path / 'b') == (str(tmp_path / 'a' / 'epoch_2.pth'), [])


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
