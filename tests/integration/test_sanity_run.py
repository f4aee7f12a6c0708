"""The sanity run before training leaves nothing behind."""

import json

import pytest

from tests.helpers.in_process import train
from tests.helpers.toy_training import ToyModel, assert_same_end, config_text

LENGTHS = {
    True: ['train_cfg.max_epochs=2'],
    False: ['train_cfg.max_iters=8', 'train_cfg.val_interval=4'],
}
CLOCK_AND_MEMORY = {'time', 'data_time', 'memory'}


def records(work):
    """What a run logged, without what no two runs have in common."""
    (log,) = work.glob('*/vis_data/scalars.json')
    lines = map(json.loads, log.read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCK_AND_MEMORY} for line in lines]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_training_is_the_same_to_the_last_bit(by_epoch, workers, tmp_path, monkeypatch):
    """Random images, stochastic depth, BatchNorm; by iterations the sampler has no end."""
    config, steps = tmp_path / 'toy.py', []
    config.write_text(config_text(by_epoch, workers))

    def counted(model, *args, train_step=ToyModel.train_step, **kwargs):
        steps.append(work)
        return train_step(model, *args, **kwargs)

    monkeypatch.setattr(ToyModel, 'train_step', counted)
    works = {tmp_path / 'with': [], tmp_path / 'without': ['--no-sanity-run']}
    for work, options in works.items():
        train(config, work, *options, '--cfg-options', 'randomness.seed=3', *LENGTHS[by_epoch])
    assert [steps.count(work) for work in works] == [9, 8]
    assert_same_end(*works)
    first, second = map(records, works)
    assert first == second
    assert len(first) == 8 + 2  # steps and validations
