"""Attention to agents, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from mmbiformer.ops import agent_attention, agents


def operands(size=(7, 9), num_agents=6, groups=2, heads=4, batch=2, dtype=torch.float64):
    q = torch.randn(batch, *size, 32, dtype=dtype)
    k, v = torch.randn(2, batch, num_agents, 32, dtype=dtype)
    positions = torch.rand(batch, groups, num_agents, 2, dtype=dtype) * 2 - 1
    positions[:, :, 0], positions[:, :, 1, 0] = 1, -1  # on the border
    table = torch.randn(heads, 7, 5, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, positions, table)]


def attend(q, k, v, positions, table):
    rows, columns = (torch.linspace(-1, 1, n, dtype=positions.dtype) for n in q.shape[1:3])
    return agent_attention(q, k, v, positions, table, rows=rows, columns=columns, scale=0.3)


def attend_plainly(q, k, v, positions, table):
    """The whole bias at once, by ``grid_sample``."""
    (batch, *size, dim), (heads, *table_size), groups = q.shape, table.shape, positions.shape[1]
    tokens = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=q.dtype) for n in size), indexing='ij')
    tokens = torch.stack(tokens, -1).flatten(0, 1)[:, None]
    grid = ((tokens - positions[:, :, None]) / 2).flip(-1).flatten(0, 1)
    tables = table.expand(batch, -1, -1, -1).reshape(-1, heads // groups, *table_size)
    bias = (
        F.grid_sample(tables, grid, align_corners=True).unflatten(0, (batch, groups)).flatten(1, 2)
    )
    q, k, v = (x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = (0.3 * q @ k.mT + bias).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, *size, dim)


@pytest.mark.parametrize('limit', [1, 500, 2**20])
def test_output_and_gradients(limit, monkeypatch):
    """Output and every gradient, whether row by row or at once."""
    monkeypatch.setattr(agents, 'LOGITS_ON_CPU', limit)
    inputs = operands()
    cotangent = torch.randn(2, 7, 9, 32, dtype=torch.float64)
    found, expected = attend(*inputs), attend_plainly(*inputs)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), expected)
    *grads, position, table = torch.autograd.grad(found, inputs, cotangent)
    *expected_grads, expected_position, expected_table = torch.autograd.grad(
        expected, inputs, cotangent
    )
    torch.testing.assert_close([*grads, table], [*expected_grads, expected_table])
    # On the border grid_sample differentiates towards a neighbour outside, which is 0.
    torch.testing.assert_close(position[:, :, 2:], expected_position[:, :, 2:])


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (6, 1)])
def test_thin_maps(size):
    out = attend(*operands(size))
    assert out.shape == (2, *size, 32)
    assert out.isfinite().all()


def test_never_holds_the_whole_bias(monkeypatch):
    monkeypatch.setattr(agents, 'LOGITS_ON_CPU', 2 * 4 * 6 * 9)
    most = 0

    def watch(*args):
        nonlocal most
        out = einsum(*args)
        most = max(most, out.numel())
        return out

    einsum = torch.einsum
    monkeypatch.setattr(torch, 'einsum', watch)
    attend(*operands())
    assert most <= 2 * 4 * 6 * 9  # one row of seven


def test_not_a_number_is_no_index():
    """fp16 training overflows now and then; on CUDA a wrong index would end the process."""
    q, k, v, positions, table = operands()
    with torch.no_grad():
        positions[0, 0, 0] = torch.nan
    out = attend(q, k, v, positions, table)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(table=torch.zeros(4, 1, 5)), r'2 or more.*got \(4, 1, 5\)'),
        (dict(table=torch.zeros(5, 5, 5)), '32 channels a multiple of the heads'),
        (dict(table=torch.zeros(1, 5, 5)), 'of 2 groups'),
        (dict(table=torch.zeros(5, 5)), r'got \(5, 5\)'),
        (dict(positions=torch.zeros(2, 2, 6, 2).half()), 'in float64; got torch.float16'),
    ],
)
def test_arguments(wrong, message):
    names = 'query', 'key', 'value', 'positions', 'table'
    given = {**dict(zip(names, operands(), strict=True)), **wrong}
    with pytest.raises(ValueError, match=message):
        attend(*(given[name] for name in names))
