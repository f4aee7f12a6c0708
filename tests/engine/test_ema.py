"""The average of the weights that is kept beside them."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmbiformer.weights.read import read_checkpoint

MOMENTUM = 0.25


class Toy(BaseModel):
    """A weight that each step moves by -1, and a buffer that counts the steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer('count', torch.zeros(1))
        self.seen = []

    def forward(self, inputs, mode):
        if mode == 'loss':
            self.count += 1
            return dict(loss=self.weight.sum())
        self.seen.append(self.weight.item())
        return [0]


def run_toy(folder, epochs, **kwargs):
    loader = dict(
        batch_size=1,
        num_workers=0,
        dataset=[dict(inputs=0)] * 3,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    runner = Runner(
        model=Toy(),
        work_dir=str(folder),
        default_scope='mmengine',
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[],
        val_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        custom_hooks=[dict(type='mmbiformer.SideEMAHook', momentum=MOMENTUM, update_buffers=True)],
        experiment_name=f'{folder.name}_{epochs}',
        **kwargs,
    )
    runner.train()
    return runner


def test_average_is_kept_at_the_side(tmp_path):
    """Evaluated and saved are the raw weights; the average goes on after a resume."""
    model = run_toy(tmp_path / 'whole', 2).model
    assert model.seen == [-3] * 3 + [-6] * 3
    run_toy(tmp_path / 'parts', 1)
    run_toy(tmp_path / 'parts', 2, resume=True)
    # MMEngine starts the average from the weights after the first step.
    average = -1.0
    for weight in (-2, -3, -4, -5, -6):
        average += MOMENTUM * (weight - average)
    for folder in ('whole', 'parts'):
        checkpoint = read_checkpoint(tmp_path / folder / 'epoch_2.pth')
        assert checkpoint['state_dict']['weight'].item() == -6
        assert checkpoint['ema_at_side'] is True
        assert checkpoint['ema_state_dict']['module.weight'].item() == pytest.approx(average)
        assert checkpoint['ema_state_dict']['module.count'].item() == pytest.approx(-average)
