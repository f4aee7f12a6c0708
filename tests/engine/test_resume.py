"""From which checkpoint a run resumes."""

import os
from types import SimpleNamespace

import pytest
import torch

from mmbiformer.engine.hooks import resume
from mmbiformer.engine.hooks.resume import (
    check_resumable,
    check_same_point,
    find_whole_checkpoint,
    warn_if_finished,
)
from mmbiformer.errors import CheckpointError

WHOLE = dict(meta=dict(epoch=1, iter=4), message_hub={}, optimizer={}, state_dict={})


def write(path, checkpoint=WHOLE, age=0):
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return str(path)


def truncate(path):
    with open(path, 'r+b') as file:
        file.truncate(os.path.getsize(path) // 2)


def test_no_checkpoint_yet(tmp_path):
    """Also beside a note of one that is gone."""
    assert find_whole_checkpoint(tmp_path) == (None, [])
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    assert find_whole_checkpoint(tmp_path) == (None, [])


def test_best_checkpoint_cannot_be_resumed(tmp_path):
    write(tmp_path / 'best_toy_epoch_1.pth', dict(state_dict={}, meta={}))
    message = r'(?s)best_toy_epoch_1.pth lacks message_hub, optimizer.*Move them away'
    with pytest.raises(CheckpointError, match=message):
        find_whole_checkpoint(tmp_path)
    whole = write(tmp_path / 'epoch_1.pth', age=9)
    assert find_whole_checkpoint(tmp_path) == (whole, [])


@pytest.mark.parametrize('damage', [truncate, lambda path: open(path, 'w').close()])
def test_damaged_checkpoints_are_passed_over(damage, tmp_path):
    files = [write(tmp_path / f'epoch_{i}.pth') for i in (1, 2, 3)]
    (tmp_path / 'last_checkpoint').write_text(files[2])
    damage(files[2])
    found, (warning,) = find_whole_checkpoint(tmp_path)
    assert found == files[1]
    assert files[2] in warning and warning.endswith(f'resuming from {files[1]}.')
    for path in files[:2]:
        damage(path)
    with pytest.raises(CheckpointError, match=r'(?s)no checkpoint in .* can be resumed.*epoch_1'):
        find_whole_checkpoint(tmp_path)


def test_tensors_are_not_read(tmp_path):
    """A run reads them once, when it loads the checkpoint: only then a wrong bit shows."""
    path = write(tmp_path / 'epoch_1.pth', dict(WHOLE, state_dict=dict(a=torch.ones(10_000))))
    with open(path, 'r+b') as file:
        file.seek(20_000)
        file.write(b'\1')
    assert find_whole_checkpoint(tmp_path) == (path, [])


def test_numbers_count_more_than_the_time(tmp_path):
    """Copying changes the time."""
    whole = {i: write(tmp_path / f'epoch_{i}.pth', age=i) for i in (1, 2, 9, 10)}
    write(tmp_path / 'epoch_11.old.pth')
    assert find_whole_checkpoint(tmp_path)[0] == whole[10]
    # The files behind the last checkpoint belong to an earlier run.
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    assert find_whole_checkpoint(tmp_path)[0] == whole[2]
    (tmp_path / 'last_checkpoint').unlink()
    newest = write(tmp_path / 'iter_4.pth')  # its number cannot be compared
    assert find_whole_checkpoint(tmp_path)[0] == newest


def test_a_copied_run_goes_on_from_its_own_checkpoint(tmp_path):
    original, copy = (write(tmp_path / name / 'epoch_2.pth') for name in 'ab')
    (tmp_path / 'b' / 'last_checkpoint').write_text(original)
    assert find_whole_checkpoint(tmp_path / 'b') == (copy, [])
    os.unlink(copy)
    with pytest.raises(CheckpointError, match=f'no checkpoint of its own.*--resume {original}'):
        find_whole_checkpoint(tmp_path / 'b')


def test_checkpoints_elsewhere(tmp_path):
    """In the folder that MMEngine's hook makes in its out_dir."""
    whole = [write(tmp_path / 'out' / f'epoch_{i}.pth') for i in (1, 2)]
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / 'last_checkpoint').write_text(whole[1])
    assert find_whole_checkpoint(tmp_path / 'work', tmp_path / 'out')[0] == whole[1]
    truncate(whole[1])
    assert find_whole_checkpoint(tmp_path / 'work', tmp_path / 'out')[0] == whole[0]


def test_odd_names_do_not_block(tmp_path):
    whole = write(tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_2.pth').symlink_to('nowhere')
    (tmp_path / 'epoch_3.pth').symlink_to('epoch_3.pth')
    (tmp_path / 'epoch_4.pth').mkdir()
    for text in ('', '/', '..', 'x' * 5000, 'a\0b', str(tmp_path / 'epoch_3.pth')):
        (tmp_path / 'last_checkpoint').write_text(text)
        assert find_whole_checkpoint(tmp_path) == (whole, [])


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    """It may be whole, so the one before it is not taken."""
    write(tmp_path / 'epoch_1.pth')

    def refuse(path, mmap):
        raise PermissionError(path)

    monkeypatch.setattr(resume, 'read_checkpoint', refuse)
    with pytest.raises(PermissionError):
        find_whole_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ('checkpoint', 'lacking'),
    [
        ({}, 'message_hub, meta, optimizer, state_dict'),
        (dict(meta={}, state_dict={}), 'message_hub, optimizer'),
        (dict(WHOLE, optimizer=3), 'optimizer'),
    ],
)
def test_weights_alone_cannot_be_resumed(checkpoint, lacking):
    check_resumable('x.pth', WHOLE)
    message = f'x.pth holds no training run to resume: it lacks {lacking}. To.*--pretrained'
    with pytest.raises(CheckpointError, match=message):
        check_resumable('x.pth', checkpoint)


def test_processes_at_different_points(monkeypatch):
    """As where each node has a disk of its own."""
    check_same_point(SimpleNamespace(iter=4))
    monkeypatch.setattr(resume, 'all_gather_object', lambda own: [own, 0])
    with pytest.raises(CheckpointError, match=r'at iterations 4, 0\. They must find the same'):
        check_same_point(SimpleNamespace(iter=4))


@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_nothing_left_to_train(epoch):
    warnings = []
    warn_if_finished(
        SimpleNamespace(
            train_loop=None,
            epoch=epoch,
            max_epochs=2,
            logger=SimpleNamespace(warning=warnings.append),
        )
    )
    assert len(warnings) == (epoch >= 2)
    assert all(f'at epoch {epoch} of 2: nothing is left to train' in text for text in warnings)
