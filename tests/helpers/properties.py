"""Any input: cases that hypothesis draws, the same ones in every run."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention
from mmbiformer.ops import BACKENDS, regions
from tests.helpers.attention import LAYOUTS

GRIDS = st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 8), st.integers(1, 8)))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
MEMORY = st.sampled_from([*LAYOUTS])


def counts(fast, slow=None):
    """Parametrises a test with the number of cases to draw, and with more if slow tests run."""
    more = [] if slow is None else [pytest.param(slow, marks=pytest.mark.slow)]
    return pytest.mark.parametrize('count', [fast, *more])


def check_any(count, check, *strategies):
    """Run a check on so many drawn cases."""
    options = settings(max_examples=count, derandomize=True, deadline=None, database=None)
    options(given(*strategies)(check))()


def topks(regions, most=8):
    """Numbers of regions to route to: a few, or all."""
    return st.one_of(st.integers(1, min(regions, most)), st.just(regions))


def num_of(grid):
    """Regions of a grid, an int or a pair."""
    return math.prod((grid, grid) if isinstance(grid, int) else grid)


def backends_for(x):
    """The backends that can run maps like this one, the reference last."""
    return [name for name in BACKENDS if BACKENDS[name].why_not(x, x, x, 1) is None]


def use_backend(net, backend):
    for module in net.modules():
        if isinstance(module, (BiLevelRoutingAttention, DeformableAgentAttention)):
            module.backend = backend


def filled(value):
    """Lets regions be padded with ``value`` instead of zero."""

    def pad(x, widths):
        return F.pad(x, widths, value=value if x.is_floating_point() else 0)

    return mock.patch.object(regions, 'F', SimpleNamespace(pad=pad))


def check_masked(net, x, value):
    """Places beyond the edge may hold 0 or ``value``: results are the same to the last bit."""
    for backend in backends_for(x):
        use_backend(net, backend)
        found = []
        for poison in (0.0, value):
            with filled(poison), torch.no_grad():
                found.append([*as_tuple(net(x))])
        if backend == 'reference':  # others pad the output's gradient as well, where 0 is meant
            for poison, results in zip((0.0, value), found, strict=True):
                net.zero_grad()
                with filled(poison):
                    loss = sum(out.square().sum() for out in as_tuple(net(x)))
                if loss.requires_grad:
                    loss.backward()
                results += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        assert all(map(torch.equal, *found))


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)
