"""Bi-directional cross-attention: the definition, each backend against it, and the choice made."""

import contextlib
import ctypes
import logging
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmbiformer.ops import BIDIRECTIONAL_BACKENDS, bidirectional_attention
from mmbiformer.ops.backends.cpp import library
from mmbiformer.ops.bidirectional import cpp
from mmbiformer.ops.choice import choose
from tests.helpers.attention import assert_close, error

# Batch, latents, tokens, heads, channels of a head, and of a head's values.
SIZES = {
    'plain': (2, 64, 196, 6, 32, 32),
    'one latent': (2, 1, 70, 2, 8, 8),
    'one token': (2, 9, 1, 2, 8, 8),
    'one of each': (1, 1, 1, 1, 8, 8),
    '65 latents, one part': (1, 65, 512, 2, 24, 24),
    'two parts': (2, 7, 513, 1, 40, 40),
    'three parts': (1, 33, 1025, 2, 64, 64),
    'narrow values': (2, 12, 130, 2, 40, 8),
    'wide values': (2, 12, 130, 2, 8, 64),
    'few tokens, 128 latents': (3, 128, 65, 1, 32, 16),
    'no image': (0, 3, 5, 2, 8, 8),
}
sizes = pytest.mark.parametrize('size', SIZES.values(), ids=SIZES)
both = pytest.mark.parametrize('backend', ['cpp', 'sdpa'])


def tensors_of(size, dtype=torch.float32):
    """References and values of latents, of tokens, and the number of heads."""
    batch, latents, tokens, heads, dim, value_dim = size
    shapes = [(n, heads * c) for n in (latents, tokens) for c in (dim, value_dim)]
    made = [torch.randn(batch, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return made, heads


def run(tensors, heads, backend, cotangents=None, **kwargs):
    """Both outputs, the gradients of the four tensors, and the outputs' own gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outs = bidirectional_attention(*leaves, num_heads=heads, backend=backend, **kwargs)
    if cotangents is None:
        cotangents = [torch.randn_like(out) for out in outs]
    grads = torch.autograd.grad(outs, leaves, [c.to(outs[0].dtype) for c in cotangents])
    return [*outs, *grads], cotangents


def check_budget(tensors, heads, backend, least=0.0):
    """At most twice the error that the reference makes in the same precision."""
    found, cotangents = run(tensors, heads, backend)
    plain, _ = run(tensors, heads, 'reference', cotangents)
    exact, _ = run([x.double() for x in tensors], heads, 'reference', cotangents)
    # Where a softmax is over one logit, its references have gradients of 0.
    largest = max((c.norm().item() for c in exact), default=0)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.isfinite().all()
        if c.norm() > 1e-9 * largest:
            assert error(a, c) <= 2 * max(error(b, c), least)
        else:
            assert (a.double() - c).norm() <= 1e-5 * largest


def by_hand(tensors, heads, scale):
    """One pair of a latent and a token after another, straight from the definition."""
    latent_r, latent_v, token_r, token_v = (x.unflatten(2, (heads, -1)) for x in tensors)
    (batch, count), tokens = latent_r.shape[:2], token_r.shape[1]
    pairs = [*product(range(batch), range(count), range(tokens), range(heads))]
    weights = torch.zeros(batch, count, tokens, heads, dtype=torch.float64)
    for b, i, j, h in pairs:
        weights[b, i, j, h] = math.exp(scale * latent_r[b, i, h].dot(token_r[b, j, h]))
    outs = latent_v.new_zeros(latent_v.shape), token_v.new_zeros(token_v.shape)
    for b, i, j, h in pairs:
        outs[0][b, i, h] += weights[b, i, j, h] / weights[b, i, :, h].sum() * token_v[b, j, h]
        outs[1][b, j, h] += weights[b, i, j, h] / weights[b, :, j, h].sum() * latent_v[b, i, h]
    return [out.flatten(2) for out in outs]


@pytest.mark.parametrize('scale', [None, 0.3])
@pytest.mark.parametrize('backend', ['reference', 'sdpa'])
def test_definition(backend, scale):
    tensors, heads = tensors_of((2, 3, 5, 2, 4, 3), torch.float64)
    found = bidirectional_attention(*tensors, num_heads=heads, scale=scale, backend=backend)
    assert_close(found, by_hand(tensors, heads, scale or 0.5), 1e-12)


@both
@sizes
def test_error_budget(size, backend):
    # PyTorch's attention on CPU takes exponentials to 20 bits. A softmax over a single logit has a
    # gradient of 0, which the reference alone meets exactly.
    alone = 1 in size[1:3]
    least = 2**-18 if alone else 2**-20 if backend == 'sdpa' else 0
    check_budget(*tensors_of(size), backend, least)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['plain', 'two parts', 'narrow values', 'one token'])
def test_half_precision(name, dtype):
    check_budget(*tensors_of(SIZES[name], dtype), 'sdpa', torch.finfo(dtype).eps)


@both
@pytest.mark.parametrize('name', ['plain', 'three parts'])
def test_large_logits(name, backend):
    """Up to 80 and more, where exponentials would overflow; and ties of the largest."""
    (latent_r, latent_v, token_r, token_v), heads = tensors_of(SIZES[name])
    latent_r, token_r = 5 * latent_r, 5 * token_r
    dim = latent_r.shape[2] // heads
    assert (latent_r[..., :dim] @ token_r[..., :dim].mT / dim**0.5).abs().max() > 80
    latent_r[:, 1::2] = latent_r[:, : latent_r.shape[1] // 2 * 2 : 2]
    token_r[:, 1::2] = token_r[:, : token_r.shape[1] // 2 * 2 : 2]
    tensors = [latent_r, latent_v, token_r, token_v]
    check_budget(tensors, heads, backend, 2**-16 if backend == 'sdpa' else 0)


@both
def test_hidden_tokens(backend):
    """Logits of -inf hide a token, or a whole part of them, from all latents but one."""
    (latent_r, latent_v, token_r, token_v), _ = tensors_of((1, 9, 1100, 1, 8, 8))
    latent_r[..., 0], token_r[..., 0] = 1, 0
    latent_r[:, 4, 0] = 0.0
    token_r[:, :600, 0] = -1e38  # times 0 it is 0
    latent_r[..., 0] *= 1e5
    tensors = latent_r, latent_v, token_r, token_v
    assert (latent_r @ token_r.mT).isinf().any()
    found = bidirectional_attention(*tensors, num_heads=1, backend=backend)
    expected = bidirectional_attention(*tensors, num_heads=1, backend='reference')
    assert expected[0].isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('which', range(4))
def test_numbers_that_are_not_finite_are_passed_on(which, value):
    """To the outputs that meet them, as in the reference, and to no others."""
    tensors, heads = tensors_of(SIZES['two parts'])
    tensors[which][1, 4, 3] = value
    found = bidirectional_attention(*tensors, num_heads=heads, backend='cpp')
    expected = bidirectional_attention(*tensors, num_heads=heads, backend='reference')
    assert not all(x.isfinite().all() for x in expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()], rtol=1e-4, atol=1e-5)


LAYOUTS = {
    'packed': lambda x: torch.cat([x + 1, x, x], 2)[..., x.shape[2] : 2 * x.shape[2]],
    'channels not adjacent': lambda x: x.mT.contiguous().mT,
    'every other row': lambda x: x.repeat_interleave(2, 1)[:, ::2],
    'rows first': lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    'unaligned': lambda x: torch.cat([x[..., :1], x], 2)[..., 1:],
    'one for the batch': lambda x: x[:1].expand_as(x),
    'a constant': lambda x: x[:1, :1, :1].expand_as(x),  # as ``sum`` sends back
}


@both
@pytest.mark.parametrize('layout', LAYOUTS)
def test_any_layout(layout, backend):
    tensors, heads = tensors_of((2, 9, 530, 2, 16, 8))
    _, cotangents = run(tensors, heads, backend)
    tensors, cotangents = ([*map(LAYOUTS[layout], xs)] for xs in (tensors, cotangents))
    found, _ = run(tensors, heads, backend, cotangents)
    tensors, cotangents = ([x.contiguous() for x in xs] for xs in (tensors, cotangents))
    expected, _ = run(tensors, heads, backend, cotangents)
    assert_close(found, expected, 0 if backend == 'cpp' else 1e-5)


@pytest.fixture
def threads():
    """Sets how many threads PyTorch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('name', ['plain', 'two parts', 'three parts'])
def test_bit_equal_from_run_to_run(name, threads):
    """With any number of threads."""
    tensors, heads = tensors_of(SIZES[name])
    threads(1)
    expected, cotangents = run(tensors, heads, 'cpp')
    for count in (1, 2, 4):
        threads(count)
        for _ in range(2):
            found, _ = run(tensors, heads, 'cpp', cotangents)
            assert all(map(torch.equal, found, expected))


@pytest.fixture
def deterministic():
    """PyTorch's deterministic mode, in which new tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('name', ['plain', 'three parts', 'narrow values'])
def test_all_is_written(name, deterministic, monkeypatch):
    tensors, heads = tensors_of(SIZES[name])
    assert torch.empty(3).isnan().all()
    expected, cotangents = run(tensors, heads, 'cpp')
    monkeypatch.setattr(cpp, 'unfilled_memory', contextlib.nullcontext)
    found, _ = run(tensors, heads, 'cpp', cotangents)
    assert all(map(torch.equal, found, expected))
    repeated, _ = run(tensors, heads, 'sdpa', cotangents)
    assert_close(repeated, found, 1e-4)


@pytest.mark.parametrize('operator', [False, True])
@pytest.mark.parametrize('used', [0, 1])
def test_one_output_unused(used, operator):
    """Its gradient is then None, and counts as zeros."""
    tensors, heads = tensors_of(SIZES['narrow values'])
    leaves = [x.requires_grad_() for x in tensors]
    grads = []
    for backend in ('cpp', 'reference'):
        if operator and backend == 'cpp':
            outs = cpp.bidirectional_attention(*leaves, heads, 40**-0.5)
        else:
            outs = bidirectional_attention(*leaves, num_heads=heads, backend=backend)
        loss = outs[used].sin().sum()
        grads.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    assert_close(*grads, 1e-5)


def test_outputs_are_the_callers():
    """Tokens may be changed in place; the latents' are kept for the backward pass, as softmax's."""
    tensors, heads = tensors_of(SIZES['narrow values'])
    leaves = [x.requires_grad_() for x in tensors]
    outs = bidirectional_attention(*leaves, num_heads=heads, backend='cpp')
    assert all(out.is_contiguous() for out in outs)
    outs[1].mul_(2).sum().backward()  # a view made in an autograd.Function would raise here


def test_gradcheck():
    tensors, heads = tensors_of((1, 2, 3, 2, 2, 1), torch.float64)
    leaves = [x.requires_grad_() for x in tensors]

    def attend(*leaves):
        return bidirectional_attention(*leaves, num_heads=heads, backend='reference')

    torch.autograd.gradcheck(attend, leaves)
    torch.autograd.gradgradcheck(attend, leaves)


def test_operators():
    """Their shapes, strides and gradients are as declared."""
    tensors, heads = tensors_of((2, 9, 20, 2, 16, 8))
    leaves = [x.requires_grad_() for x in tensors]
    checks = 'test_schema', 'test_faketensor', 'test_autograd_registration'
    torch.library.opcheck(cpp.bidirectional_attention, (*leaves, heads, 0.3), test_utils=checks)
    with torch.no_grad():
        latents, tokens, stats = cpp.bidirectional_attention(*tensors, heads, 0.3)
        kept = *(x.detach() for x in tensors), latents, stats
        arguments = (torch.randn_like(latents), torch.randn_like(tokens), *kept, heads, 0.3)
        torch.library.opcheck(cpp.bidirectional_attention_backward, arguments, test_utils=checks)


@both
def test_compiles_to_one_graph(backend):
    """For any number of tokens."""

    def loss(*leaves):
        outs = bidirectional_attention(*leaves, num_heads=2, backend=backend)
        return sum(out.sin().sum() for out in outs)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    for tokens in (40, 530):
        leaves = [x.requires_grad_() for x in tensors_of((2, 9, tokens, 2, 16, 8))[0]]
        for x in leaves[2:]:
            torch._dynamo.mark_dynamic(x, 1)
        expected = torch.autograd.grad(loss(*leaves), leaves)
        assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected, 1e-4)


class Exchange(torch.nn.Module):
    def forward(self, *tensors):
        return bidirectional_attention(*tensors, num_heads=2)


@pytest.mark.parametrize('strict', [False, True])
def test_exports_for_all_sizes_and_without_this_project(strict):
    tensors, _ = tensors_of((2, 9, 40, 2, 16, 8))
    auto = torch.export.Dim.DYNAMIC
    axes = {0: auto}, {0: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}
    program = torch.export.export(Exchange(), tuple(tensors), dynamic_shapes=(axes,), strict=strict)
    assert 'mmbiformer' not in program.graph_module.code
    others, _ = tensors_of((3, 9, 521, 2, 16, 8))
    assert_close(program.module()(*others), Exchange()(*others), 1e-5)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_gradients_of_each_image(backend):
    tensors, heads = tensors_of((3, 4, 7, 2, 8, 8))

    def loss(*image):
        each = [x[None] for x in image]
        outs = bidirectional_attention(*each, num_heads=heads, backend=backend)
        return sum(out.sin().sum() for out in outs)

    found = torch.func.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    outs = bidirectional_attention(*leaves, num_heads=heads)
    expected = torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize('backend', ['auto', 'sdpa', 'reference'])
def test_autocast(backend):
    """Projections come in bfloat16; float32 and bfloat16 may meet, as in PyTorch's attention."""
    tensors, heads = tensors_of(SIZES['narrow values'])
    expected, cotangents = run(tensors, heads, 'reference')
    for x in (tensors, [y.bfloat16() for y in tensors]):
        with torch.autocast('cpu', torch.bfloat16):
            found, _ = run(x, heads, backend, cotangents)
        for a, b in zip(found, expected, strict=True):
            assert error(a, b.double()) < 0.03


def test_reasons():
    tensors, heads = tensors_of((1, 3, 5, 2, 8, 16))
    reason = cpp.why_not
    assert reason(*tensors, num_heads=heads) is None
    assert reason(torch.nn.Parameter(tensors[0]), *tensors[1:], num_heads=heads) is None
    assert 'tensors are on meta' in reason(*(x.to('meta') for x in tensors), num_heads=heads)
    assert 'torch.bfloat16' in reason(*tensors[:3], tensors[3].bfloat16(), num_heads=heads)
    assert 'heads of 4 channels' in reason(*tensors, num_heads=4)
    assert 'heads of 12 channels' in reason(*tensors[:3], torch.ones(1, 5, 24), num_heads=2)
    for name in ('sdpa', 'reference'):
        meta = [x.to('meta') for x in tensors]
        assert BIDIRECTIONAL_BACKENDS[name].why_not(*meta, num_heads=heads) is None
    assert choose(BIDIRECTIONAL_BACKENDS, 'auto', *tensors, heads) is cpp
    subclass = tensors[0].as_subclass(type('Subclass', (torch.Tensor,), {}))
    assert 'subclass of tensors' in reason(subclass, *tensors[1:], num_heads=heads)
    seen = []
    torch.func.vmap(lambda x: seen.append(reason(x, x, x, x, num_heads=2)) or x)(tensors[0][None])
    assert 'transform' in seen[0]
    with FlopCounterMode(display=False) as counter:
        assert 'tracer' in reason(*tensors, num_heads=heads)
        bidirectional_attention(*tensors, num_heads=heads, backend='reference')
    # Two products of references, as a matrix of scores has 3 x 5 entries of 2 heads.
    assert counter.get_total_flops() == 2 * 3 * 5 * 2 * (8 + 16 + 16)


def test_auto_goes_on_without_it(monkeypatch, caplog):
    tensors, heads = tensors_of((1, 3, 5, 2, 8, 8))
    expected = bidirectional_attention(*tensors, num_heads=np.int64(heads), backend='cpp')
    with caplog.at_level(logging.DEBUG, logger='mmbiformer.ops'):
        bidirectional_attention(*tensors, num_heads=heads)
        assert "'cpp'" not in caplog.text
        monkeypatch.setattr(library, '_load', lambda: (None, 'there is no C++ compiler'))
        assert_close(bidirectional_attention(*tensors, num_heads=heads), expected, 1e-5)
    assert "'cpp': there is no C++ compiler" in caplog.text
    with pytest.raises(RuntimeError, match="'cpp' cannot run here: there is no C\\+\\+ compiler"):
        bidirectional_attention(*tensors, num_heads=heads, backend='cpp')


ONE = torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ('tensors', 'kwargs', 'message'),
    [
        ((ONE[0], ONE, ONE, ONE), {}, r'must be \(B, N or L, C\); got \[\(3, 8\), \(1, 3, 8\)'),
        ((ONE, ONE[:, :2], ONE, ONE), {}, r'\(B, L, Cv\).* got \[\(1, 3, 8\), \(1, 2, 8\)'),
        ((ONE, ONE, ONE, ONE[:, :2]), {}, r'\(B, N, C\)'),
        ((ONE[..., :4], ONE, ONE, ONE), {}, r'\(B, N, C\)'),
        ((ONE, ONE[..., :4], ONE, ONE), {}, r'\(B, N, Cv\)'),
        ((ONE, ONE, ONE.repeat(2, 1, 1), ONE.repeat(2, 1, 1)), {}, r'\(B, N, C\)'),
        ((ONE[:, :0], ONE[:, :0], ONE, ONE), {}, 'at least one latent, token and channel'),
        ((ONE, ONE, ONE[:, :0], ONE[:, :0]), {}, 'at least one latent, token and channel'),
        ((ONE,) * 4, dict(num_heads=3), '8 and 8 channels must be multiples of num_heads=3'),
        ((ONE,) * 4, dict(num_heads=0), 'multiples of num_heads=0'),
        ((ONE, ONE, ONE, ONE.to('meta')), {}, 'on one device; got cpu, cpu, cpu, meta'),
        ((ONE,) * 4, dict(backend='fast'), "backend='fast' is unknown; choose one of .*'sdpa'"),
    ],
)
def test_arguments(tensors, kwargs, message):
    with pytest.raises(ValueError, match=message):
        bidirectional_attention(*tensors, **{'num_heads': 1, **kwargs})


def peak_bytes(begin_anew=False):
    if begin_anew:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    (line,) = (x for x in Path('/proc/self/status').read_text().splitlines() if 'VmHWM' in x)
    return int(line.split()[1]) << 10


@pytest.mark.slow
def test_time_and_memory_grow_linearly(threads):
    """One token of 50,000 costs at most 1.3 times what one of 3,136 does, forward and backward."""
    threads(1)
    costs = {}
    for count in (3136, 50_000):
        tensors, heads = tensors_of((1, 64, count, 6, 32, 32))
        leaves, times = [x.requires_grad_() for x in tensors], []
        for _ in range(600_000 // count):
            before, start = peak_bytes(begin_anew=True), time.process_time()
            outs = bidirectional_attention(*leaves, num_heads=heads, backend='cpp')
            torch.autograd.grad(outs, leaves, outs)
            times.append(time.process_time() - start)
            memory = peak_bytes() - before
            del outs
        costs[count] = min(times) / count, memory / count
    for few, many in zip(*costs.values(), strict=True):
        assert 0 < many <= 1.3 * few, costs
