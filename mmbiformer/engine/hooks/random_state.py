"""The state of a process's random number generators."""

import random
from typing import Any

import numpy as np
import torch

from ...errors import CheckpointError


def random_state() -> dict[str, Any]:
    """Read the state of Python's, NumPy's and PyTorch's generators.

    Returns:
        dict[str, Any]: The states as plain data and tensors: ``python``, ``numpy``, ``torch`` and,
        where there is a GPU, ``cuda``, that of the current device.
    """
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(), numpy=(kind, keys.tolist(), *rest), torch=torch.get_rng_state()
    )
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a state that :func:`random_state` read.

    Args:
        state: The state. Its tensors may be on any device.

    Raises:
        CheckpointError: If NumPy's position is out of range, which NumPy does not check.
    """
    kind, keys, position, *rest = state['numpy']
    if not 0 <= position <= len(keys):
        raise CheckpointError(f'damaged random state: position {position} of {len(keys)} in NumPy')
    random.setstate(state['python'])
    np.random.set_state((kind, keys, position, *rest))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
