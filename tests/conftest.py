"""Settings of all tests."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers whatever ran before."""
    torch.manual_seed(0)
