"""Random numbers that go on where they were."""

import random

import numpy as np
import pytest
import torch

from mmbiformer.engine.hooks.random_state import random_state, set_random_state
from mmbiformer.errors import CheckpointError


def draw():
    np.random.normal()  # leaves a second number for the next call
    return random.random(), np.random.normal(), torch.rand(1).item()


def test_goes_on(tmp_path):
    """Also from a file, which PyTorch's own strict reader takes."""
    draw()
    state = random_state()
    expected = draw()
    assert draw() != expected
    torch.save(state, tmp_path / 'state.pth')
    for saved in (state, torch.load(tmp_path / 'state.pth', weights_only=True)):
        set_random_state(saved)
        assert draw() == expected


@pytest.mark.parametrize('position', [-1, 625])
def test_damaged_state(position):
    """Nothing is set."""
    state = random_state()
    kind, keys, _, *rest = state['numpy']
    random.random()
    before = random_state()
    with pytest.raises(CheckpointError, match=f'position {position} of 624'):
        set_random_state(dict(state, numpy=(kind, keys, position, *rest)))
    assert str(random_state()) == str(before)
