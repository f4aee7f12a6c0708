"""What docs/faults.md promises, by doing harm to a real training."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_training import config_text

from mmbiformer.safe_load import safe_load

ROOT = Path(__file__).parent.parent
FULL = 64_000  # bytes that a file may have on our small disk


def command(config, work, *options):
    train = [sys.executable, '-W', 'ignore', str(ROOT / 'tools/train.py'), str(config)]
    return [*train, '--work-dir', str(work), *options]


def start(config, work, *options, limit=None, **environment):
    """A training in a process of its own; ``limit`` makes the disk take no larger files."""

    def restrict():
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    paths = [str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    return subprocess.Popen(
        command(config, work, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1', **environment),
        preexec_fn=restrict,
        start_new_session=True,
    )


def run(config, work, *options, status=0, **kwargs):
    process = start(config, work, *options, **kwargs)
    out, _ = process.communicate()
    assert process.returncode == status, out[-3000:]
    return out


def write_config(folder, **kwargs):
    path = folder / 'toy.py'
    path.write_text(config_text(**kwargs) + '\nrandomness = dict(seed=3)\n')
    return path


def last(work):
    return safe_load((work / 'last_checkpoint').read_text())


def assert_equal(a, b, name=''):
    """Equal to the last bit, but for the time and the log."""
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f'{name}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f'{name}.{i}')
    else:
        assert a == b, name


def assert_same_end(work, reference):
    ends = last(work), last(reference)
    for key in ('state_dict', 'optimizer', 'param_schedulers', 'random_state'):
        assert_equal(ends[0][key], ends[1][key], key)


def kill_until_done(config, work, kills, seed, **environment):
    """Kill -9 again and again, at random moments or while a checkpoint is being written."""
    rng = random.Random(seed)
    while_writing = 0
    for i in range(kills):
        process = start(config, work, '--resume', **environment)
        end = time.monotonic() + 120
        if i % 2:  # as soon as a file is begun
            while process.poll() is None and not [*work.glob('*.partial')]:
                assert time.monotonic() < end
                time.sleep(0.0005)
            while_writing += process.poll() is None
            time.sleep(rng.random() * 0.01)
        else:  # some time after training began, at most one or two checkpoints later
            began = time.time()
            while process.poll() is None and not any(
                path.stat().st_mtime > began for path in work.glob('*/vis_data/scalars.json')
            ):
                assert time.monotonic() < end
                time.sleep(0.01)
            time.sleep(rng.random() * 0.6)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in work.glob('*.pth'):
            safe_load(path)  # under its own name a file is always whole
    out = run(config, work, '--resume', **environment)
    return out, while_writing


def check_kills(folder, kills, **kwargs):
    config = write_config(folder, **kwargs)
    run(config, folder / 'through')
    environment = dict(TOY_SLEEP='0.1', TOY_BALLAST='0')
    _, while_writing = kill_until_done(config, folder / 'killed', kills, seed=kills, **environment)
    assert_same_end(folder / 'killed', folder / 'through')
    return while_writing


def test_killed_and_resumed(tmp_path):
    check_kills(tmp_path, 2, by_epoch=True, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('workers', [0, 2])
def test_killed_often(tmp_path, by_epoch, workers):
    """Six times each: 24 together, half of them while a checkpoint is being written."""
    assert check_kills(tmp_path, 6, by_epoch=by_epoch, workers=workers)


def test_resumes_bit_for_bit_by_iterations(tmp_path):
    """From a checkpoint in the middle, with workers and without a seed in the config."""
    config = tmp_path / 'toy.py'
    config.write_text(config_text(by_epoch=False, workers=1))
    through = tmp_path / 'through'
    run(config, through, '--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=-1')
    run(config, tmp_path / 'resumed', '--resume', through / 'iter_8.pth')
    assert_same_end(tmp_path / 'resumed', through)
    # The random state is plain data and tensors: PyTorch's own strict reader takes it.
    torch.save(last(through)['random_state'], tmp_path / 'random.pth')
    torch.load(tmp_path / 'random.pth', weights_only=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('faults')
    config = write_config(folder, by_epoch=True, workers=0)
    options = ('--no-validate', '--cfg-options', 'train_cfg.max_epochs=3')
    run(config, folder / 'work', *options)
    return config, folder / 'work'


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == 'truncated':
        content = content[: len(content) // 2]
    elif kind == 'flipped':
        content[len(content) // 2] ^= 16
    else:
        content = b''
    path.write_bytes(content)


@pytest.mark.parametrize('kind', ['truncated', 'flipped'])
def test_falls_back_to_the_last_whole_checkpoint(trained, tmp_path, kind):
    config, source = trained
    work = tmp_path / 'work'
    shutil.copytree(source, work)
    (work / 'last_checkpoint').write_text(str(work / 'epoch_3.pth'))
    damage(work / 'epoch_3.pth', kind)
    out = run(config, work, '--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=3')
    assert f'cannot read {work}/epoch_3.pth' in out
    assert f'resuming from {work}/epoch_2.pth' in out
    assert 'resumed epoch: 2, iter: 8' in out
    assert_same_end(work, source)


def test_no_whole_checkpoint(trained, tmp_path):
    config, source = trained
    work = tmp_path / 'work'
    shutil.copytree(source, work)
    (work / 'last_checkpoint').write_text(str(work / 'epoch_3.pth'))
    for path in work.glob('*.pth'):
        damage(path, 'empty')
    before = sorted(work.rglob('*'))
    out = run(config, work, '--resume', status=2)
    assert 'no checkpoint in' in out and 'epoch_3.pth: the file is empty' in out
    assert 'Remove them to start from the beginning' in out and 'Traceback' not in out
    assert sorted(work.rglob('*')) == before


def test_full_disk(trained, tmp_path):
    """A disk that takes no large file: the run ends, what was there stays, nothing half is left."""
    config, source = trained
    work = tmp_path / 'work'
    shutil.copytree(source, work)
    (work / 'last_checkpoint').write_text(str(work / 'epoch_3.pth'))
    out = run(config, work, '--resume', '--no-validate', status=2, limit=FULL)
    assert f'error: {work}/epoch_4.pth cannot be written' in out and 'File too large' in out
    assert '--resume' in out and 'Traceback' not in out
    assert sorted(path.name for path in work.glob('*.pth*')) == ['epoch_2.pth', 'epoch_3.pth']
    assert last(work)['meta']['epoch'] == 3


def test_folder_that_cannot_be_written(trained, tmp_path):
    config, _ = trained
    (tmp_path / 'file').write_text('no folder')
    out = run(config, tmp_path / 'file' / 'work', status=2)
    assert f'{tmp_path}/file/work cannot be written' in out and '--work-dir' in out
    assert 'Traceback' not in out


FAULTS = [
    ('killed:6', 1, ['a worker of the data loader died', 'Killed', 'num_workers', '--resume']),
    ('corrupt:6', 1, ['cannot be read: AssertionError', 'data/broken.jpg', '--resume']),
    ('corrupt:6', 0, ['cannot be read: AssertionError', 'data/broken.jpg', '--resume']),
    ('annotations', 0, ["annotations cannot be read: KeyError: 'bbox'"]),
]


@pytest.mark.parametrize(('fault', 'workers', 'messages'), FAULTS)
def test_one_message(tmp_path, fault, workers, messages):
    config = write_config(tmp_path, workers=workers)
    out = run(config, tmp_path / 'work', '--no-validate', status=2, TOY_FAULT=fault)
    for message in messages:
        assert message in out, out[-2000:]
    assert 'Traceback' not in out


def test_nan_is_reported_by_layer(tmp_path):
    config = write_config(tmp_path)
    with config.open('a') as file:
        file.write("custom_hooks = [dict(type='mmbiformer.CheckFiniteHook')]\n")
    out = run(config, tmp_path / 'work', '--no-validate', status=2, TOY_FAULT='nan:3')
    assert 'error: iteration 2: the input of data_preprocessor is not finite' in out
    assert 'Traceback' not in out


def test_wrong_kind_of_file_to_resume(trained, tmp_path):
    config, work = trained
    torch.save(last(work)['state_dict'], tmp_path / 'weights.pth')
    out = run(config, tmp_path / 'new', '--resume', tmp_path / 'weights.pth', status=2)
    assert 'holds no training run to resume: it lacks message_hub, meta' in out
    assert '--pretrained' in out and not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_one_of_two_processes_dies(tmp_path):
    """The other one ends too, soon, and the command says which one died of what."""
    config = write_config(tmp_path)
    paths = [str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), TOY_FAULT='rank:6')
    environment.update(PYTHON=sys.executable, PORT='29577', OMP_NUM_THREADS='1')
    began = time.monotonic()
    done = subprocess.run(
        [ROOT / 'tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'work'],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout[-2000:]
    assert 'Signal 9 (SIGKILL)' in done.stdout
    assert time.monotonic() - began < 200
