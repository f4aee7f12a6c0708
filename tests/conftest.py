"""Settings of all tests."""

import sys
from pathlib import Path

import pytest
import torch

# Of several workers (make test) none should be left alone with a file that takes a minute or two.
LONGEST = 'distributed', 'triton', 'faults', 'checkpoint', 'configs', 'export', 'graphs'

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """The files that take longest come first."""
    order = {f'test_{name}.py': i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
