"""The random numbers of workers."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from mmbiformer.engine.hooks.data_order import seed_workers
from tests.helpers.toy_training import ToyDataset


@pytest.mark.parametrize('persistent', [False, True])
def test_workers_are_seeded_by_iteration(persistent):
    loader = DataLoader(ToyDataset(), num_workers=2, persistent_workers=persistent)

    def data_at(iteration):
        seed_workers(loader, SimpleNamespace(seed=1, iter=iteration, rank=0))
        return torch.cat([batch['inputs'] for batch in loader])

    first, later, again = map(data_at, (0, 4, 0))
    assert torch.equal(first, again)
    assert not torch.isclose(first, later).any(-1).all()
    assert not torch.equal(first[0], first[1])  # from two workers
