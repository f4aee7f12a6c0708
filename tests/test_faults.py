"""What docs/faults.md promises, by doing harm to a real training."""

import copy
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from in_process import train
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from test_tools import small_disk
from test_training import CONFIG as SHAPES_CONFIG
from toy_training import config_text

from mmbiformer.datasets import make_shapes
from mmbiformer.engine.checkpoint_hook import check_resumable
from mmbiformer.engine.checks import CommandError, check_writable
from mmbiformer.engine.command_line import _WritesWholeConfig, build_runner
from mmbiformer.engine.faults import faults_explained
from mmbiformer.engine.files import WriteError
from mmbiformer.safe_load import CheckpointError, safe_load

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


def validations(work):
    """The iterations after which was validated, by the logs of all runs."""
    found, iteration = [], 0
    for log in sorted(work.glob('*/vis_data/scalars.json')):
        for line in map(json.loads, log.read_text().splitlines()):
            if 'toy' in line:
                found.append(iteration)
            else:
                iteration = line['iter']
    return found


@pytest.mark.parametrize(
    ('by_epoch', 'batch', 'found'),
    [
        (True, 6, [4, 12, 16, 20, 24]),  # in the second of six
        pytest.param(True, 22, [4, 8, 12, 16, 20], marks=pytest.mark.slow),  # in the last
        # At iteration 6 the last checkpoint is that of 4; at 12 one is written.
        pytest.param(False, 2, [6, 12, 18, 24], marks=pytest.mark.slow),
        pytest.param(False, 6, [6, 18, 24], marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_validates(tmp_path, by_epoch, batch, found):
    """Training goes on from the last checkpoint, equal to the last bit."""
    config = write_config(tmp_path, by_epoch=by_epoch)
    run(config, tmp_path / 'through')
    run(config, tmp_path / 'killed', status=-9, TOY_FAULT=f'validation:{batch}')
    run(config, tmp_path / 'killed', '--resume')
    assert_same_end(tmp_path / 'killed', tmp_path / 'through')
    assert validations(tmp_path / 'killed') == found


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
    train(config, folder / 'work', *options)
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
    out = train(
        config, work, '--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=3'
    )
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
    out = train(config, work, '--resume', status=2)
    assert 'no checkpoint in' in out and 'epoch_3.pth: the file is empty' in out
    assert 'Move them away to start from the beginning' in out and 'Traceback' not in out
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


def test_full_disk_of_logs(tmp_path):
    """MMEngine's own files, too; of its log, nothing is said twice."""
    config = write_config(tmp_path)
    for limit, file in (
        (config.stat().st_size - 1, '/.*/toy.py'),  # of which MMEngine makes a copy
        (config.stat().st_size, f'{tmp_path}/run/.*/vis_data/config.py'),  # with all defaults
    ):
        out = run(config, tmp_path / 'run', status=2, limit=limit)
        assert re.search(f'error: {file}: File too large; ', out), out
        assert 'Traceback' not in out and 'Logging error' not in out


def test_full_disk_of_the_config(tmp_path):
    """From which a run may go on: no half one is left, and none is replaced by half a one."""
    cfg = Config.fromfile(write_config(tmp_path))
    runner = SimpleNamespace(cfg=cfg, work_dir=tmp_path / 'work', timestamp='now')
    with small_disk(100), pytest.raises(WriteError, match=r'work/toy\.py cannot be written'):
        _WritesWholeConfig.dump_config(runner)
    assert not [*runner.work_dir.iterdir()]
    _WritesWholeConfig.dump_config(runner)
    assert (runner.work_dir / 'toy.py').read_text() == cfg.dump()


def written(path):
    with open(path, 'w') as file:
        file.write('x' * 10_000)


def logged(path):
    handler = logging.FileHandler(path)
    handler.stream.write('x' * 10_000)
    handler.stream.flush()


@pytest.mark.parametrize('write', [written, logged])
def test_errors_of_a_full_disk_that_name_no_file(write, tmp_path):
    path = tmp_path / 'file'
    with (
        small_disk(100),
        pytest.raises(CommandError, match=f'^{path}: File too large; .* room. If .* --resume'),
        faults_explained(Config()),
    ):
        write(path)


def test_full_disk_takes_no_run(tmp_path):
    """One that takes files, but nothing in them."""
    with small_disk(0), pytest.raises(CommandError, match=r'takes no new file \(File too large'):
        check_writable(str(tmp_path / 'work'))


def test_folder_that_cannot_be_written(trained, tmp_path):
    config, _ = trained
    (tmp_path / 'file').write_text('no folder')
    out = train(config, tmp_path / 'file' / 'work', status=2)
    assert f'{tmp_path}/file/work cannot be written' in out and '--work-dir' in out
    assert 'Traceback' not in out


FAULTS = [
    ('killed:6', 1, ['a worker of the data loader died: ', 'num_workers', '--resume']),
    ('annotations', 0, ["annotations cannot be read: KeyError: 'bbox'"]),
]


@pytest.mark.parametrize(('fault', 'workers', 'messages'), FAULTS)
def test_one_message(tmp_path, fault, workers, messages):
    config = write_config(tmp_path, workers=workers)
    out = run(config, tmp_path / 'work', '--no-validate', status=2, TOY_FAULT=fault)
    for message in messages:
        assert message in out, out[-2000:]
    # PyTorch may hear of the death again while it tidies up, and Python writes that it ignores it.
    assert 'Traceback' not in out.partition('Exception ignored')[0]


def _try_get_data(error, cause):  # PyTorch's name for where it asks the workers
    raise error from cause


SIGNAL = RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')
EXIT = RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
PIN = RuntimeError('Pin memory thread exited unexpectedly')
RESET = ConnectionResetError(104, 'Connection reset by peer')
DEATHS = [
    (SIGNAL, None, 'DataLoader worker (pid 7) is killed by signal: Killed'),
    (EXIT, SIGNAL, 'DataLoader worker (pid 7) is killed by signal: Killed'),
    (EXIT, RESET, 'DataLoader worker (pid(s) 7) exited unexpectedly'),
    (PIN, None, 'Pin memory thread exited unexpectedly'),
    (RESET, None, 'ConnectionResetError: [Errno 104] Connection reset by peer'),
    (EOFError(), None, 'EOFError'),
]


@pytest.mark.parametrize(('error', 'cause', 'said'), DEATHS)
def test_how_a_dead_worker_shows(error, cause, said):
    """It depends on what PyTorch does when the worker dies; all of these were seen or can be."""
    with pytest.raises(CommandError) as caught, faults_explained(Config()):
        _try_get_data(error, cause)
    assert str(caught.value).startswith(f'a worker of the data loader died: {said}. If it was')


def test_a_death_that_shows_twice():
    """Once by the pipe, then by the signal, while the message is being made or printed."""

    def handler(number, frame):
        raise SIGNAL

    previous = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(CommandError, match='Connection reset'), faults_explained(Config()):
            _try_get_data(RESET, None)
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, previous)


def test_connections_of_others_keep_their_traceback():
    with pytest.raises(ConnectionResetError), faults_explained(Config()):
        raise ConnectionResetError(104, 'Connection reset by peer')


def jpeg(**options):
    """A photograph's worth of bytes."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    params = [value for pair in options.items() for value in (getattr(cv2, pair[0]), pair[1])]
    return cv2.imencode('.jpg', cv2.resize(pixels, (640, 480)), params)[1].tobytes()


FILES = {
    'no image': b'no image',
    'cut off': jpeg()[: len(jpeg()) // 2],
    'empty': b'',
}


@pytest.mark.parametrize(('kind', 'workers'), [('no image', 0), ('cut off', 1), ('empty', 1)])
def test_file_that_is_no_whole_image(tmp_path, kind, workers):
    """No grey rows and no leftovers of another image are trained on."""
    config, image = write_config(tmp_path, workers=workers), tmp_path / 'broken.jpg'
    image.write_bytes(FILES[kind])
    environment = dict(TOY_FAULT='file:6', TOY_IMAGE=str(image))
    out = train(config, tmp_path / 'work', '--no-validate', status=2, **environment)
    if kind == 'empty':
        assert 'error: an image file is empty; `find' in out and '-empty` names it' in out
    else:
        assert f'cannot be read: AssertionError: failed to load image: {image}' in out
    assert 'If there is a checkpoint, go on from it with --resume.' in out
    assert 'Traceback' not in out


@pytest.mark.parametrize('part', [0.05, 0.5, 0.95])
@pytest.mark.parametrize('progressive', [0, 1])
def test_jpegs_that_are_cut_off(tmp_path, part, progressive):
    content = jpeg(IMWRITE_JPEG_PROGRESSIVE=progressive)
    path = tmp_path / 'image.jpg'
    path.write_bytes(content)
    assert LoadImageFromFile()(dict(img_path=str(path)))['img'].shape == (480, 640, 3)
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(AssertionError, match=f'failed to load image: {path}'):
        LoadImageFromFile(ignore_empty=True)(dict(img_path=str(path)))
    skipping = LoadImageFromFile(ignore_empty=True, imdecode_backend='pillow')
    assert skipping(dict(img_path=str(path))) is None


@pytest.fixture(scope='module')
def half_without_boxes(tmp_path_factory):
    """A config for four scenes, two of them without boxes."""
    folder = tmp_path_factory.mktemp('boxes')
    make_shapes(folder / 'shapes', train=4, val=1, progress=False)
    path = folder / 'shapes/annotations/instances_train.json'
    content = json.loads(path.read_text())
    empty = [image['id'] for image in content['images'][:2]]
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] not in empty]
    path.write_text(json.dumps(content))
    config = folder / 'boxes.py'
    config.write_text(SHAPES_CONFIG.format(root=ROOT, data=folder / 'shapes'))
    return config


FILTER = 'train_dataloader.dataset.filter_cfg.filter_empty_gt'


@pytest.mark.parametrize('left_out', [True, False])
def test_images_without_boxes(half_without_boxes, tmp_path, left_out):
    out = train(
        half_without_boxes,
        tmp_path / 'work',
        '--no-validate',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=1',
        f'{FILTER}={left_out}',
    )
    steps = re.findall(r'Epoch\(train\) +\[1\]\[(\d)/(\d)\]', out)
    assert steps == [(str(i + 1), '2' if left_out else '4') for i in range(2 if left_out else 4)]
    losses = {
        name: [float(value) for value in re.findall(rf' {name}: (\S+)', out)]
        for name in ('loss', 'loss_cls', 'loss_bbox', 'loss_mask')
    }
    assert all(math.isfinite(value) for values in losses.values() for value in values)
    assert all(value > 0 for value in losses['loss_cls'])
    background = [value == 0 for value in losses['loss_mask']]
    assert sum(background) == (0 if left_out else 2)
    assert all(losses['loss_bbox'][i] == 0 for i, empty in enumerate(background) if empty)


def test_configs_leave_images_without_boxes_out():
    configs = [*ROOT.glob('configs/*_coco.py'), *ROOT.glob('configs/demo/[mr]*.py')]
    assert len(configs) == 14
    for config in configs:
        dataset = Config.fromfile(config).train_dataloader.dataset
        assert dataset.filter_cfg.filter_empty_gt, config


def message_of(config, work, options, test=False):
    """What is said of a run in this process, with settings of the config changed."""
    cfg = Config.fromfile(config)
    cfg.test_cfg, cfg.test_evaluator = {}, cfg.val_evaluator.copy()
    cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
    cfg.merge_from_dict(options)
    cfg.work_dir, cfg.experiment_name, cfg.launcher = str(work), str(work), 'none'
    splits = ('test',) if test else ('train', 'val')
    with pytest.raises(CommandError) as info, faults_explained(cfg, splits):
        runner = build_runner(cfg)
        runner.test() if test else runner.train()
    return str(info.value)


DATASET = 'train_dataloader.dataset'
# Settings that MMEngine reads only when a run starts, and what must be said of them before (of the
# name of a metric, when there is one).
SETTINGS = {
    'sampler': (
        {'train_dataloader.sampler.type': 'Samplr'},
        'train_dataloader of', 'Samplr is not in the data sampler registry',
    ),
    'batch size': ({'train_dataloader.batch_size': 0}, 'train_dataloader of', 'batch_size=0'),
    'workers': ({'val_dataloader.num_workers': -1}, 'val_dataloader of', 'num_workers'),
    'dataset': ({'val_dataloader.dataset.type': 'Toy'}, 'val_dataloader of', 'Toy is not in'),
    'transform': (
        {f'{DATASET}.pipeline': [dict(type='Lod')]}, 'train_dataloader of', 'Lod is not in',
    ),
    'no type': ({f'{DATASET}.pipeline': [dict(a=1)]}, 'train_dataloader of', 'the key "type"'),
    'argument': ({f'{DATASET}.data_rot': 'x'}, 'train_dataloader of', "argument 'data_rot'"),
    'metric': ({'val_evaluator.type': 'Metrc'}, 'val_evaluator of', 'Metrc is not in'),
    'schedule': ({'param_scheduler.type': 'Cosin'}, 'param_scheduler of', 'Cosin is not in'),
    'loop': ({'train_cfg.max_epoch': 1}, 'train_cfg of', "argument 'max_epoch'"),
    'workers of a test': ({'test_dataloader.num_workers': -1}, 'test_dataloader of', 'num_workers'),
    'transform of a test': (
        {'test_dataloader.dataset.pipeline': [dict(type='Lod')]},
        'test_dataloader of', 'Lod is not in',
    ),
    'metric of a test': ({'test_evaluator.type': 'Metrc'}, 'test_evaluator of', 'Metrc is not in'),
    'best': (
        {'default_hooks.checkpoint.save_best': 'abc'},
        'save_best of', "the evaluation gives no 'abc'", "'auto'", '--resume',
    ),
    'average': (
        {'custom_hooks': [dict(type='EMAHook', begin_iter=99)]},
        'custom_hooks of', 'begin_iter: 99',
    ),
    'loop of a test': ({'test_cfg.fp': 1}, 'test_cfg of', "argument 'fp'"),
}  # fmt: skip


@pytest.mark.parametrize('name', SETTINGS)
def test_settings_that_mmengine_reads_late(name, tmp_path):
    options, *parts = SETTINGS[name]
    config, test = write_config(tmp_path), name.endswith('of a test')
    found = message_of(config, tmp_path / 'work', options, test)
    for part in [*parts, str(config), *(['cannot be built', 'Mend'] if name != 'best' else [])]:
        assert part in found
    assert 'annotations' not in found
    # What a class of the user's own passes on, nobody knows before it is made.
    assert (tmp_path / 'work').exists() == (name in ('argument', 'average', 'best'))


BATCHES = dict(batch_size=9, drop_last=True)


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_no_batch(split, tmp_path):
    """A training would end at once, and write a checkpoint of no step."""
    options = {f'{split}_dataloader.{name}': value for name, value in BATCHES.items()}
    config, test = write_config(tmp_path), split == 'test'
    found = message_of(config, tmp_path / 'work', options, test)
    assert f'{split}_dataloader of {config} cannot be built: ' in found
    if split == 'train':
        assert ' it has no batch: batch_size=9' in found
        assert 'drop_last=True, but 8 images a process; lower batch_size or set' in found
    else:  # where any rest is too much
        assert 'leave images of the last batch out of the score' in found
    assert not [*tmp_path.rglob('*.pth')]


def test_batches_without_end(tmp_path):
    """Of more images than there are."""
    cfg = Config.fromfile(write_config(tmp_path, by_epoch=False))
    cfg.work_dir, cfg.launcher = str(tmp_path / 'work'), 'none'
    cfg.train_dataloader.update(BATCHES)
    cfg.train_cfg.max_iters = 1
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    assert build_runner(cfg, ('train',)).train() is not None


def test_image_that_a_test_cannot_read(half_without_boxes, tmp_path):
    """There is nothing to resume."""
    for image in (half_without_boxes.parent / 'shapes/val').iterdir():
        (tmp_path / image.name).write_bytes(b'no image')
    options = {'test_dataloader.dataset.data_prefix.img': f'{tmp_path}/'}
    found = message_of(half_without_boxes, tmp_path / 'work', options, test=True)
    assert 'an image or its annotation cannot be read' in found
    assert found.endswith('take it out of the annotation file.')


def test_bugs_keep_their_traceback():
    for error in (KeyError('x'), TypeError('no'), IndexError('index 5 is out of bounds')):
        with pytest.raises(type(error)) as info, faults_explained(Config()):
            raise error
        assert info.value is error


def test_classes_that_no_image_has(half_without_boxes, tmp_path):
    options = {f'{DATASET}.metainfo.classes': ('cat', 'dog')}
    found = message_of(half_without_boxes, tmp_path, options)
    assert found.startswith(f'train_dataloader of {half_without_boxes} is empty')
    assert 'no image has an annotation of the configured classes' in found
    assert 'annotations/instances_train.json' in found and 'instances_val.json' not in found


@pytest.mark.parametrize('count', [1, 80])
def test_other_classes_than_the_model(count, half_without_boxes, tmp_path):
    """More than the data has, as in the recipe for COCO, would train and find nothing."""
    heads = [f'model.roi_head.{name}_head.num_classes' for name in ('bbox', 'mask')]
    found = message_of(half_without_boxes, tmp_path, dict.fromkeys(heads, count))
    assert found.startswith(f'{half_without_boxes}: the train data have ')
    for head in heads:
        assert f'{head.removeprefix("model.")}={count}' in found
    assert not [*tmp_path.rglob('*.pth')]


def test_label_above_the_classes(tmp_path):
    """Annotations can hold labels that their own list of classes lacks."""
    config = tmp_path / 'my.py'
    config.write_text('model = dict(head=dict(num_classes=5))')
    cfg = Config.fromfile(config)
    with pytest.raises(CommandError) as info, faults_explained(cfg):
        raise IndexError('Target 6 is out of bounds.')
    assert str(info.value) == (
        'the annotations hold more classes than the model: Target 6 is out of bounds. Set '
        f'num_classes of every head in {config} (now 5) to the number of classes of the data'
    )


def test_nan_is_reported_by_layer(tmp_path):
    config = write_config(tmp_path)
    with config.open('a') as file:
        file.write("custom_hooks = [dict(type='mmbiformer.CheckFiniteHook')]\n")
    out = train(config, tmp_path / 'work', '--no-validate', status=2, TOY_FAULT='nan:3')
    assert 'error: iteration 2: the input of data_preprocessor is not finite' in out
    assert 'Traceback' not in out


@pytest.mark.parametrize('name', ['epoch', 'iter', 'seed'])
def test_numbers_of_a_file_to_resume(name):
    """Lists within lists, each twice in the next, take no room in a file; their text does."""
    bomb = [0]
    for _ in range(60):
        bomb = [bomb, bomb]
    parts = dict(message_hub={}, optimizer={}, state_dict={})
    meta = dict(epoch=1, iter=4, seed=0)
    check_resumable('x.pth', dict(meta=meta, **parts))
    with pytest.raises(CheckpointError, match=f'it lacks a number as meta.{name}'):
        check_resumable('x.pth', dict(meta={**meta, name: bomb}, **parts))


def test_wrong_kind_of_file_to_resume(trained, tmp_path):
    config, work = trained
    torch.save(last(work)['state_dict'], tmp_path / 'weights.pth')
    out = train(config, tmp_path / 'new', '--resume', tmp_path / 'weights.pth', status=2)
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
