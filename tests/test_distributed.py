"""Two processes on CPU, started as a user starts them: tools/dist_train.sh, tools/dist_test.sh."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from in_process import train
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from toy_training import config_text

from mmbiformer.datasets import SEGMENTATION_CLASSES, ShapesSpec, make_shapes
from mmbiformer.engine.checks import build_model
from mmbiformer.engine.fake_data import fake_batch
from mmbiformer.models import biformer, debiformer
from mmbiformer.safe_load import safe_load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob('configs/**/*.py')
    if '_base_' not in path.parts
)
SPEC = ShapesSpec(size=(64, 64), shape_size=(10, 50), objects=(2, 4), distractors=(0, 1))
COMMON = """
custom_imports = dict(imports=['mmbiformer.models'], allow_failed_imports=False)
arch = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128), mlp_ratio=1)
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = test_cfg = dict()
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
log_level = 'INFO'
randomness = dict(seed=0)
"""
# No stochastic depth, BatchNorm frozen, a fixed order, and SGD: Adam would turn the rounding
# errors in gradients that are zero, such as those of the keys' bias, into steps.
CLASSIFICATION = (
    COMMON
    + """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(num_classes=7, mean=[127.5] * 3, std=[60.0] * 3),
    backbone=dict(type='mmbiformer.BiFormer', arch=arch, region_grid=4, final_norm=True,
                  norm_eval=True),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=7, in_channels=128,
              loss=dict(type='CrossEntropyLoss')),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='CustomDataset', data_root='{data}', data_prefix='train', pipeline=pipeline),
)
val_dataloader = dict(train_dataloader, dataset=dict(train_dataloader['dataset'],
                                                     data_prefix='val'))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1, 3))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
"""
)
SEGMENTATION = (
    COMMON
    + """
default_scope = 'mmseg'
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64), mean=[127.5] * 3,
                           std=[60.0] * 3),
    backbone=dict(type='mmbiformer.BiFormer', arch=arch, region_grid=4, drop_path_rate=0.2),
    neck=dict(type='FPN', in_channels=[32, 64, 96, 128], out_channels=32, num_outs=4),
    decode_head=dict(type='FPNHead', in_channels=[32] * 4, in_index=[0, 1, 2, 3],
                     feature_strides=[4, 8, 16, 32], channels=32, num_classes={classes},
                     norm_cfg=norm_cfg),
    test_cfg=dict(mode='whole'),
)
sync_bn = 'torch'
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset', data_root='{data}', reduce_zero_label=True,
        metainfo=dict(classes={names}),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                  dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')],
    ),
)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
val_cfg = test_cfg = None
"""
)
DETECTION = """
_base_ = '{root}/configs/demo/maskrcnn_biformer_t_shapes.py'
data_root = '{data}/'
model = dict(backbone=dict(
    _delete_=True, type='mmbiformer.BiFormer', drop_path_rate=0.2,
    arch=dict(depths=(1, 1, 1, 1), embed_dims=(64, 128, 256, 512), mlp_ratio=1)))
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root=data_root))
train_cfg = dict(max_epochs=1)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
"""


def start(*command, **environment):
    """A command with one thread a process, its output kept.

    In a file: a pipe that nobody reads, while another process is waited for, would stop it.
    """
    output = tempfile.TemporaryFile('w+')  # noqa: SIM115  closed with the process's object
    process = subprocess.Popen(
        list(map(str, command)),
        env=dict(
            os.environ,
            OMP_NUM_THREADS='1',
            PYTHON=sys.executable,
            PYTHONWARNINGS='ignore',
            PORT=str(free_port()),
        )
        | environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    process.output = output
    return process


def finish(process, status=0):
    """What a command printed; it must end by itself with this exit status."""
    try:
        process.wait(timeout=240)
    finally:
        process.kill()
    process.output.seek(0)
    out = process.output.read()
    assert process.returncode == status, out[-6000:]
    return out


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def weights(work):
    return safe_load(work / 'epoch_1.pth')['state_dict']


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope='module')
def classified(tmp_path_factory):
    """Five steps of two processes with two images each: config, work folder, log."""
    folder = tmp_path_factory.mktemp('classification')
    spec = ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(30, 60), spread=0.2)
    make_shapes(folder / 'data', 20, 6, spec=spec, progress=False, format='imagenet')
    config = folder / 'config.py'
    config.write_text(CLASSIFICATION.format(data=folder / 'data'))
    two = ('tools/dist_train.sh', config, 2, '--work-dir', folder / 'two')
    log = finish(start(*two, '--cfg-options', 'train_dataloader.batch_size=2'))
    return config, folder, log


def test_two_processes_equal_one(classified):
    config, folder, _ = classified
    finish(start(sys.executable, 'tools/train.py', config, '--work-dir', folder / 'one'))
    one, two = weights(folder / 'one'), weights(folder / 'two')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    before = MODELS.build(cfg.model).state_dict()
    assert one.keys() == two.keys() == before.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)
    name = 'backbone.stages.3.0.mlp.fc2.weight'
    assert (one[name] - before[name]).abs().max() > 1e-3


def test_two_nodes_equal_two_processes(classified):
    config, folder, _ = classified
    port = str(free_port())
    command = ('tools/dist_train.sh', config, 1, '--work-dir', folder / 'nodes')
    command += ('--cfg-options', 'train_dataloader.batch_size=2')
    nodes = [start(*command, NNODES='2', NODE_RANK=rank, PORT=port) for rank in '01']
    try:
        # The second first: if it fails, the first would wait for it.
        logs = [finish(node) for node in reversed(nodes)]
    finally:
        for node in nodes:
            node.kill()
    assert sum('Epoch(train)' in log for log in logs) == 1
    assert_same(weights(folder / 'nodes'), weights(folder / 'two'))


@pytest.fixture(scope='module')
def tested(classified):
    """What two processes print that evaluate, and of each the threads that it has at its exit."""
    config, folder, _ = classified
    (folder / 'sitecustomize.py').write_text(
        'import atexit, glob\n'
        "names = lambda: [open(name).read() for name in glob.glob('/proc/self/task/*/comm')]\n"
        "atexit.register(lambda: print('THREADS', *map(str.strip, names()), flush=True))\n"
    )
    command = ('tools/dist_test.sh', config, folder / 'two' / 'epoch_1.pth', 2)
    return finish(start(*command, '--work-dir', folder / 'test', PYTHONPATH=str(folder)))


def test_evaluation_by_two_processes(classified, tested):
    _, _, log = classified
    figures = re.findall(r'accuracy/top[13]: \S+', log)
    assert len(figures) == 2
    assert re.findall(r'accuracy/top[13]: \S+', tested) == figures


def test_no_thread_of_the_group_is_left_at_exit(tested):
    """One that is can abort the process while the interpreter comes down."""
    names = re.findall('THREADS (.*)', tested)
    assert len(names) >= 2
    assert not any('gloo' in one for one in names), names


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_two_processes_repeat_themselves(task, tmp_path):
    config = tmp_path / 'config.py'
    if task == 'detection':
        make_shapes(tmp_path / 'data', 8, 0, spec=SPEC, progress=False)
        config.write_text(DETECTION.format(root=ROOT, data=tmp_path / 'data'))
    else:
        make_shapes(tmp_path / 'data', 12, 0, spec=SPEC, progress=False, format='ade20k')
        names = SEGMENTATION_CLASSES
        config.write_text(
            SEGMENTATION.format(data=tmp_path / 'data', names=names, classes=len(names))
        )
    for run in ('first', 'second'):
        log = finish(start('tools/dist_train.sh', config, 2, '--work-dir', tmp_path / run))
        reverted = log.count('with BatchNorm in each process instead of SyncBN')
        assert reverted == (task == 'segmentation')
        assert log.count('2 processes on CPU with the backend gloo') == 1
    assert_same(weights(tmp_path / 'first'), weights(tmp_path / 'second'))


@pytest.fixture(scope='module')
def one_epoch(tmp_path_factory):
    """A toy config, and the work folder of one process."""
    folder = tmp_path_factory.mktemp('toy')
    config = folder / 'toy.py'
    config.write_text(config_text())
    options = ('--no-validate', '--cfg-options', 'train_cfg.max_epochs=1')
    train(config, folder / 'work', *options)
    return config, folder / 'work'


TOY = dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))
RESUME = ('--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=2')


def test_resumed_by_another_number_of_processes(one_epoch, tmp_path):
    config, source = one_epoch
    work = shutil.copytree(source, tmp_path / 'work')
    log = finish(start('tools/dist_train.sh', config, 2, '--work-dir', work, *RESUME, **TOY))
    assert log.count('is of 1 processes, this run has 2: random numbers and the order of') == 1
    meta = safe_load(work / 'epoch_2.pth')['meta']
    assert (meta['epoch'], meta['iter']) == (2, 4 + 2)


def test_nodes_of_which_one_has_no_checkpoint(one_epoch, tmp_path):
    """As with disks of their own: it would start anew, and the others wait for it at the end."""
    config, source = one_epoch
    shutil.copytree(source, tmp_path / '0')
    port = str(free_port())
    nodes = [
        start(
            *('tools/dist_train.sh', config, 1, '--work-dir', tmp_path / rank, *RESUME),
            **dict(TOY, NNODES='2', NODE_RANK=rank, PORT=port),
        )
        for rank in '01'
    ]
    try:
        logs = [finish(node, status=1) for node in reversed(nodes)]
    finally:
        for node in nodes:
            node.kill()
    for log in logs:
        assert 'the processes are not at the same point: at iterations 4, 0. They must' in log
    assert not [*tmp_path.glob('*/epoch_2.pth')]


@pytest.mark.parametrize('config', CONFIGS)
def test_every_parameter_is_used(config):
    """In one step; DistributedDataParallel would stop at the next. Blocks are all alike."""
    cfg = Config.fromfile(ROOT / config)
    backbone = cfg.model.backbone
    family = debiformer if backbone.type == 'mmbiformer.DeBiFormer' else biformer
    arch = dict(family.ARCHS[backbone.arch], depths=(1, 1, 1, 1))
    backbone.update(arch=arch, drop_path_rate=0.0)
    size = (112, 112) if 'nchw' in config else (64, 64)  # the least that it takes
    if 'rcnn' in (cfg.model.get('train_cfg') or {}):
        cfg.model.train_cfg.rcnn.sampler.num = 16
    if 'size' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.size = size  # images would be padded to it
    model = build_model(cfg).train()
    data = model.data_preprocessor(fake_batch(cfg, 2, size), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []


@pytest.mark.parametrize(
    ('tool', 'args'),
    [
        ('dist_train.sh', ['configs/biformer_s_in1k.py']),
        ('dist_train.sh', ['configs/biformer_s_in1k.py', '--amp']),
        ('dist_test.sh', ['configs/biformer_s_in1k.py', '2']),
        ('slurm_train.sh', ['gpu', 'job', 'configs/biformer_s_in1k.py']),
        ('slurm_test.sh', ['gpu', 'job', 'configs/biformer_s_in1k.py']),
    ],
)
def test_scripts_say_how_they_are_called(tool, args):
    process = start(f'tools/{tool}', *args)
    out = finish(process, status=2)
    assert 'usage: ' in out


@pytest.mark.parametrize(
    ('gpus', 'expected'),
    [
        ('16', '--ntasks 16 --ntasks-per-node 8 --gres gpu:8'),
        ('2', '--ntasks 2 --ntasks-per-node 2 --gres gpu:2'),
    ],
)
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_slurm_scripts(tool, gpus, expected, tmp_path):
    """What they ask srun for; there is no Slurm here."""
    for name in ('srun', 'python3'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    out = finish(
        start(
            f'tools/slurm_{tool}.sh',
            *('gpu', 'job', 'config.py', 'place', '--cfg-options', 'a.b=[1, 2]'),
            PATH=f'{tmp_path}:{os.environ["PATH"]}',
            GPUS=gpus,
            SRUN_ARGS='--time 2-0',
            PYTHON='python3',
        )
    )
    place = '--work-dir place' if tool == 'train' else 'place'
    first, command = out.splitlines()
    assert first == '-c import yapf.yapflib.yapf_api'
    assert command == (
        f'--partition gpu --job-name job {expected} --cpus-per-task 5 --kill-on-bad-exit=1 '
        f'--time 2-0 python3 -u tools/{tool}.py config.py {place} --launcher slurm '
        '--cfg-options a.b=[1, 2]'
    )


def test_slurm_needs_gpus(tmp_path):
    """One message instead of a missing variable or driver."""
    make_shapes(tmp_path / 'data', 2, 1, progress=False)
    config = tmp_path / 'config.py'
    config.write_text(DETECTION.format(root=ROOT, data=tmp_path / 'data'))
    process = start(
        *(sys.executable, 'tools/train.py', config, '--launcher', 'slurm'),
        *('--work-dir', tmp_path / 'work'),
        CUDA_VISIBLE_DEVICES='',
    )
    out = finish(process, status=2)
    assert 'tools/dist_train.sh' in out
    assert 'Traceback' not in out
