"""Several processes on CPU: by the scripts, as a user starts them, and as forks of this process."""

import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from mmbiformer.commands.runner import build_model
from mmbiformer.shapes import ShapesSpec, make_shapes
from mmbiformer.weights.read import read_checkpoint
from tests.helpers.configs import ROOT, write_toy, write_toy_maskrcnn
from tests.helpers.in_process import run_tool, train
from tests.helpers.processes import free_port, train_together
from tests.helpers.toy_training import assert_equal, config_text, in_processes

SPEC = ShapesSpec(size=(64, 64), shape_size=(10, 50), objects=(2, 4), distractors=(0, 1))
# No stochastic depth, BatchNorm frozen, a fixed order, and SGD: Adam would turn the rounding
# errors in gradients that are zero, such as those of the keys' bias, into steps.
CLASSIFICATION = """
model['backbone'].update(norm_eval=True)
load = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
data = dict(data_root='{data}', pipeline=load)
train_dataloader = dict(batch_size=4, dataset=data, sampler=dict(shuffle=False), **no_workers)
val_dataloader = dict(batch_size=4, dataset=data, **no_workers)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 3))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
optim_wrapper = dict(_delete_=True, optimizer=dict(type='SGD', lr=0.05, momentum=0.9))
param_scheduler = []
"""
RANDOM = """
model['backbone'].update(drop_path_rate=0.2)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
"""
SEGMENTATION = """
model.update(data_preprocessor=dict(size=(64, 64)))
train_dataloader = dict(batch_size=2, dataset=dict(data_root='{data}'), **no_workers)
train_cfg = dict(max_iters=2)
default_hooks = dict(checkpoint=dict(interval=2, save_best=None))
"""


def start(*command, **environment):
    """Start a command.

    Its output goes to a file: a pipe that nobody reads, while another process is waited for, would
    stop it.
    """
    output = tempfile.TemporaryFile('w+')  # noqa: SIM115  closed with the process's object
    own = dict(PYTHON=sys.executable, PYTHONWARNINGS='ignore', PORT=free_port())
    process = subprocess.Popen(
        list(map(str, command)),
        env=os.environ | own | dict(OMP_NUM_THREADS='1') | environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
    )
    process.output = output
    return process


def finish(process):
    """Give what a command printed; it must end by itself, without an error."""
    try:
        process.wait(timeout=240)
    finally:
        process.kill()
    process.output.seek(0)
    out = process.output.read()
    assert process.returncode == 0, out[-6000:]
    return out


def weights(work):
    return read_checkpoint((work / 'last_checkpoint').read_text())['state_dict']


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope='module')
def classified(tmp_path_factory):
    """Five steps of two processes with two images each: config, folder, log."""
    folder = tmp_path_factory.mktemp('classification')
    spec = ShapesSpec(size=(64, 64), objects=(1, 1), shape_size=(30, 60), spread=0.2)
    make_shapes(folder / 'data', 20, 6, spec=spec, progress=False, format='imagenet')
    changes = CLASSIFICATION.format(data=folder / 'data')
    config = write_toy(folder, 'demo/biformer_t_shapes', changes)
    options = '--cfg-options', 'train_dataloader.batch_size=2'
    log, _ = train_together(config, [folder / 'two'] * 2, *options)
    return config, folder, log


def test_two_processes_equal_one(classified):
    config, folder, _ = classified
    train(config, folder / 'one')
    one, two = weights(folder / 'one'), weights(folder / 'two')
    torch.manual_seed(0)
    before = build_model(Config.fromfile(config)).state_dict()
    assert one.keys() == two.keys() == before.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6)
    name = 'backbone.stages.3.0.mlp.fc2.weight'
    assert (one[name] - before[name]).abs().max() > 1e-3


@pytest.fixture(scope='module')
def tested(classified):
    """The output of tools/dist_test.sh, with the threads that each process has at its exit."""
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


@pytest.mark.parametrize(
    ('count', 'ema'),
    [
        (2, dict(type='EMAHook', momentum=0.2, update_buffers=True)),
        (2, dict(type='mmbiformer.SideEMAHook', update_buffers=True)),
        (4, None),
    ],
)
def test_all_processes_validate_the_checkpoint(count, ema, tmp_path):
    hooks = [dict(type='ValidatedHook', priority='LOWEST'), *([ema] if ema else [])]
    in_processes(tmp_path, count=count, custom_hooks=hooks, train_cfg__max_epochs=2)
    for epoch in (1, 2):
        saved = read_checkpoint(tmp_path / f'epoch_{epoch}.pth')['state_dict']
        for rank in range(count):
            validated = torch.load(tmp_path / f'validated_{epoch}_{rank}.pt', weights_only=True)
            assert_equal({**saved}, {**validated})


@METRICS.register_module()
class MeanScore(BaseMetric):
    """Changes with every bit of the weights and buffers, or nearly so."""

    def process(self, data_batch, data_samples):
        self.results += [float(sample['pred_score'].max()) for sample in data_samples]

    def compute_metrics(self, results):
        return dict(mean_score=1e4 * sum(results) / len(results))


def test_logged_figures_are_those_of_the_checkpoint(classified):
    """With BatchNorm in training."""
    config, folder, _ = classified
    norm = folder / 'norm.py'
    norm.write_text(
        f"_base_ = './{config.name}'\n"
        'model = dict(backbone=dict(norm_eval=False))\n'
        'train_dataloader = dict(batch_size=2)\n'
        "val_evaluator = dict(_delete_=True, type='MeanScore')\n"
        'test_evaluator = val_evaluator\n'
    )
    log, _ = train_together(norm, [folder / 'norm'] * 2)
    tested = run_tool('test', norm, folder / 'norm/epoch_1.pth', '--work-dir', folder / 'norm')
    figures = re.findall(r'mean_score: \S+', log)
    assert len(figures) == 1
    assert re.findall(r'mean_score: \S+', tested) == figures


def test_no_thread_of_the_group_is_left_at_exit(tested):
    """One that still runs can abort the process while the interpreter shuts down."""
    names = re.findall('THREADS (.*)', tested)
    assert len(names) >= 2
    assert not any('gloo' in one for one in names), names


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_two_processes_repeat_themselves(task, tmp_path):
    """With random augmentation and stochastic depth, and whether there is a sanity run or not."""
    data = tmp_path / 'data'
    if task == 'detection':
        make_shapes(data, 8, 0, spec=SPEC, progress=False)
        config = write_toy_maskrcnn(tmp_path, RANDOM + 'train_cfg = dict(max_epochs=1)\n')
    else:
        make_shapes(data, 8, 0, spec=SPEC, progress=False, format='ade20k')
        changes = RANDOM + SEGMENTATION.format(data=data)
        config = write_toy(tmp_path, 'demo/sfpn_biformer_t_shapes', changes)
    for run, options in (('first', []), ('second', ['--no-sanity-run'])):
        log, _ = train_together(config, [tmp_path / run] * 2, *options)
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


def test_two_nodes_equal_two_processes(one_epoch, tmp_path):
    """By tools/dist_train.sh on each."""
    config, _ = one_epoch
    options = ('--cfg-options', 'train_cfg.max_epochs=1', 'randomness.seed=0')
    command = ('tools/dist_train.sh', config, 1, '--work-dir', tmp_path / 'nodes', *options)
    shared = dict(NNODES='2', PORT=free_port(), PYTHONPATH=str(ROOT))
    nodes = [start(*command, NODE_RANK=rank, **shared) for rank in '01']
    try:
        # The second first: if it fails, the first would wait for it.
        logs = [finish(node) for node in reversed(nodes)]
    finally:
        for node in nodes:
            node.kill()
    assert sum('Epoch(train)' in log for log in logs) == 1
    train_together(config, [tmp_path / 'two'] * 2, *options)
    assert_same(weights(tmp_path / 'nodes'), weights(tmp_path / 'two'))


RESUME = ('--resume', '--no-validate', '--cfg-options', 'train_cfg.max_epochs=2')


def test_resumed_by_another_number_of_processes(one_epoch, tmp_path):
    config, source = one_epoch
    work = shutil.copytree(source, tmp_path / 'work')
    log, _ = train_together(config, [work] * 2, *RESUME)
    assert log.count('is of 1 processes, this run has 2') == 1
    meta = read_checkpoint(work / 'epoch_2.pth')['meta']
    assert (meta['epoch'], meta['iter']) == (2, 4 + 2)


def test_nodes_of_which_one_has_no_checkpoint(one_epoch, tmp_path):
    """As with disks of their own: one would start anew, and the others would wait for it."""
    config, source = one_epoch
    shutil.copytree(source, tmp_path / '0')
    for log in train_together(config, [tmp_path / '0', tmp_path / '1'], *RESUME, status=2):
        assert 'the processes are not at the same point: at iterations 4, 0. They must' in log
    assert not [*tmp_path.glob('*/epoch_2.pth')]
