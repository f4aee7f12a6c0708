"""A training that takes a second: a toy backbone, random images, nothing but MMEngine.

The loss depends on every random number generator, Python's, NumPy's and PyTorch's, in the data
loader and in the model.
"""

import itertools
import multiprocessing
import os
import random
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner

import mmbiformer.models  # noqa: F401  (early: processes of `in_processes` begin with it)
from mmbiformer.engine.hooks.resume import find_whole_checkpoint
from mmbiformer.weights.read import read_checkpoint

ARCH = dict(depths=(1, 1), embed_dims=(32, 32), mlp_ratio=1, topks=(1, 2))
NUMBERS = itertools.count()
# What a first training imports, so that each process need not do it again.
PRELOADED = [__name__, 'matplotlib.backends.backend_agg', 'mmcv.ops', 'yapf.yapflib.yapf_api']
CONFIG = """
default_scope = 'mmengine'
custom_imports = dict(imports=['tests.helpers.toy_training', 'mmbiformer.models'],
                      allow_failed_imports=False)
model = dict(type='ToyModel', backbone=dict(type='mmbiformer.BiFormer', arch={arch},
             region_grid=2, drop_path_rate=0.5))
train_dataloader = dict(batch_size=2, num_workers=WORKERS, persistent_workers=WORKERS > 0,
                        sampler=dict(type='SAMPLER', shuffle=True), dataset=dict(type='ToyDataset'))
val_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler'),
                      dataset=dict(type='ToyDataset'))
val_evaluator = dict(type='ToyMetric')
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, T_max=40)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
""".replace('{arch}', repr(ARCH))
EPOCHS = """
train_cfg = dict(by_epoch=True, max_epochs=6)
default_hooks.update(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2,
                                     save_best='toy', rule='greater'))
"""
ITERATIONS = """
train_cfg = dict(by_epoch=False, max_iters=24, val_interval=6)
default_hooks.update(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4,
                                     max_keep_ckpts=2))
"""


def config_text(by_epoch=True, workers=0):
    text = CONFIG + (EPOCHS if by_epoch else ITERATIONS)
    text = text.replace('WORKERS', str(workers))
    return text.replace('SAMPLER', 'DefaultSampler' if by_epoch else 'InfiniteSampler')


def fault(kind, count):
    """Kill this process if TOY_FAULT says so; TOY_FAULT=step:3 kills it at its third step."""
    if os.environ.get('TOY_FAULT') == f'{kind}:{count}':
        os.kill(os.getpid(), 9)


@DATASETS.register_module()
class ToyDataset(BaseDataset):
    """Eight images, each drawn anew."""

    def load_data_list(self):
        return [dict(number=i) for i in range(8)]

    def prepare_data(self, idx):
        noise = torch.randn(3, 32, 32) + float(np.random.rand()) + random.random()
        return dict(inputs=noise * (idx + 1), number=idx)


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self, backbone, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.scale = torch.nn.Parameter(torch.ones(()))  # stands for a head
        self.steps = 0

    def forward(self, inputs, number, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        outs = self.backbone(x)
        if mode == 'loss':
            self.steps += 1
            fault('step', self.steps)
            return dict(
                loss=sum((self.scale * out - torch.rand(1)).square().mean() for out in outs)
            )
        return [out.mean() for out in outs]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Draws random numbers, which training must not notice."""

    count = 0

    def process(self, data_batch, data_samples):
        self.count += 1
        fault('validation', self.count)
        self.results.append(float(torch.rand(1)) + random.random() + float(np.random.rand()))

    def compute_metrics(self, results):
        return dict(toy=float(len(results)) + results[0])


@METRICS.register_module()
class RisingMetric(ToyMetric):
    """Two figures that are better at each validation."""

    def compute_metrics(self, results):
        return dict(toy=time.time(), other=time.time())


@HOOKS.register_module()
class ValidatedHook(Hook):
    """Keeps what each process validates, by epoch and process."""

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        weights = getattr(runner.model, 'module', runner.model).state_dict()
        torch.save(weights, f'{runner.work_dir}/validated_{runner.epoch}_{runner.rank}.pt')


def toy_runner(work, by_epoch=True, workers=0, resume=None, runner=Runner, **settings):
    """A runner of MMEngine's own classes with our checkpoint hook.

    Args:
        work: The work folder.
        resume: A checkpoint, or 'auto' for the last whole one in the work folder.
        runner: The class.
        **settings: Changes to the config; a double underscore stands for a dot.
    """
    cfg = Config.fromstring(config_text(by_epoch, workers), '.py')
    cfg.default_hooks.checkpoint.type = 'mmbiformer.CheckpointHook'
    cfg.randomness = dict(seed=3)
    cfg.merge_from_dict({name.replace('__', '.'): value for name, value in settings.items()})
    cfg.work_dir = str(work)
    # MMEngine keeps one logger and message hub a name for the whole process.
    cfg.experiment_name = f'toy_{next(NUMBERS)}'
    cfg.load_from = find_whole_checkpoint(work)[0] if resume == 'auto' else resume
    cfg.resume = cfg.load_from is not None
    return runner.from_cfg(cfg)


def toy_train(work, *args, **kwargs):
    """Train; give the runner at the end."""
    runner = toy_runner(work, *args, **kwargs)
    runner.train()
    return runner


def in_processes(*args, count=1, fault='', status=0, **kwargs):
    """Run :func:`toy_train` in processes of its own, which must end with this exit status."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_run, args=(rank, count, f'{folder}/meet', fault, args, kwargs), daemon=False
            )
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            process.kill()
    assert [process.exitcode for process in processes] == [status] * count


def _run(rank, count, meeting_place, fault_name, args, kwargs):
    os.environ.update(TOY_FAULT=fault_name, OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{meeting_place}', rank=rank, world_size=count
        )
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
        kwargs = dict(kwargs, launcher='pytorch', model_wrapper_cfg=wrapper)
    renames, replace = itertools.count(1), os.replace

    def replacing(*paths):
        fault('writing', next(renames))  # the file has its content, but not its name yet
        replace(*paths)

    with mock.patch('os.replace', replacing):
        toy_train(*args, **kwargs)


def last(work):
    """The last checkpoint of a run."""
    return read_checkpoint((work / 'last_checkpoint').read_text())


def assert_same_end(work, reference):
    """Assert that two runs ended equal to the last bit."""
    ends = last(work), last(reference)
    for key in ('state_dict', 'optimizer', 'param_schedulers', 'random_state'):
        assert_equal(ends[0][key], ends[1][key], key)
    assert_equal(ends[0].get('ema_state_dict'), ends[1].get('ema_state_dict'))
    for key in ('early_stopping', 'gradients'):
        assert_equal(ends[0]['run_state'][key], ends[1]['run_state'][key], key)


def assert_equal(a, b, name=''):
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
