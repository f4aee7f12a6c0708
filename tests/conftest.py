"""Settings of all tests."""

import pytest
import torch
from torch.utils.data import _utils

# PyTorch waits so many seconds for each worker of a data loader that is collected as garbage, as
# those of the trainings in this process are.
_utils.MP_STATUS_CHECK_INTERVAL = 0.5

# Each worker takes one file after another. Those that take long come first, so that no worker is
# left alone with one at the end.
FIRST = 'test_distributed', 'test_triton', 'export/', 'integration/', 'tools/', 'configs/'


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Sort the files."""

    def position(item):
        path = f'{item.path.parent.name}/{item.path.name}'
        return next((i for i, part in enumerate(FIRST) if part in path), len(FIRST))

    items.sort(key=position)
