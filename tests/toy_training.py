"""A training that takes seconds: a toy backbone, random images, nothing but MMEngine.

The loss depends on every random number generator: Python's, numpy's and torch's, in the data loader
and in the model.
"""

import os
import random
import time

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS

ARCH = dict(depths=(1, 1), embed_dims=(32, 32), mlp_ratio=1, topks=(1, 2))
CONFIG = """
default_scope = 'mmengine'
custom_imports = dict(imports=['toy_training', 'mmbiformer.models'], allow_failed_imports=False)
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


@DATASETS.register_module()
class ToyDataset(BaseDataset):
    """Eight images, each drawn anew. TOY_FAULT=kind:n does harm at the n-th image.

    With kind file that image is read from TOY_IMAGE, as the hosts' pipelines read it.
    """

    def __init__(self, **kwargs):
        self.count = 0
        super().__init__(**kwargs)

    def load_data_list(self):
        if os.environ.get('TOY_FAULT') == 'annotations':
            raise KeyError('bbox')
        return [dict(number=i) for i in range(8)]

    def prepare_data(self, idx):
        self.count += 1
        kind, _, at = os.environ.get('TOY_FAULT', '').partition(':')
        if kind in ('killed', 'rank', 'file', 'nan') and self.count == int(at):
            if kind == 'killed' or (kind == 'rank' and os.environ['RANK'] == '1'):
                os.kill(os.getpid(), 9)
            if kind == 'rank':
                return self.prepare_data(idx)
            if kind == 'file':
                from mmcv.transforms import LoadImageFromFile

                LoadImageFromFile()(dict(img_path=os.environ['TOY_IMAGE']))
            return dict(inputs=torch.full((3, 32, 32), torch.nan), number=idx)
        noise = torch.randn(3, 32, 32) + float(np.random.rand()) + random.random()
        return dict(inputs=noise * (idx + 1), number=idx)


@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self, backbone, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        # So that writing a checkpoint takes a while.
        size = int(os.environ.get('TOY_BALLAST', 0))
        self.register_buffer('ballast', torch.zeros(size, dtype=torch.uint8))

    def forward(self, inputs, number, mode='tensor'):
        x = torch.stack(inputs) if isinstance(inputs, list) else inputs
        time.sleep(float(os.environ.get('TOY_SLEEP', 0)))
        outs = self.backbone(x)
        if mode == 'loss':
            return dict(loss=sum((out - torch.rand(1)).square().mean() for out in outs))
        return [out.mean() for out in outs]


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Draws random numbers, which training must not notice.

    TOY_FAULT=validation:n kills the process at the n-th batch of all validations.
    """

    count = 0

    def process(self, data_batch, data_samples):
        self.count += 1
        if os.environ.get('TOY_FAULT') == f'validation:{self.count}':
            os.kill(os.getpid(), 9)
        self.results.append(float(torch.rand(1)) + random.random() + float(np.random.rand()))

    def compute_metrics(self, results):
        return dict(toy=float(len(results)) + results[0])
