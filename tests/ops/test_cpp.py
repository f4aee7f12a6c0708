"""The fused C++ attention: equal to the reference, and to the bit from run to run."""

import contextlib
import logging
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmbiformer.ops import BACKENDS, routed_attention, schema
from mmbiformer.ops.backends.cpp import library
from tests.helpers.attention import CASES, LAYOUTS, Case, check_budget, error, run

FITTING = {
    name: case
    for name, case in CASES.items()
    if not any(dim % 8 for dim in (case.head_dim, case.value_dim or 8))
}
LARGE = {  # several tiles of queries and of keys, and the rest of both
    'stage 1': Case(query=(56, 56), region=(8, 8), topk=1, head_dim=32),
    'stage 2': Case(query=(28, 28), region=(4, 4), topk=4, head_dim=32, heads=4),
    'stage 3': Case(query=(14, 14), region=(2, 2), topk=16, head_dim=32, heads=8),
    '13x21 tokens a region': Case(query=(40, 50), region=(13, 21), topk=2, head_dim=16),
    '4x6 tokens a region': Case(query=(25, 42), region=(4, 6), topk=16, head_dim=32),
    '129 keys': Case(query=(9, 129), region=(3, 43), topk=1, head_dim=24),
    '33 queries': Case(query=(11, 9), region=(11, 3), key=(7, 7), key_region=(7, 7), topk=1),
    '36 queries': Case(query=(12, 9), region=(12, 3), topk=2),
    '20 queries, 128 channels': Case(query=(8, 15), region=(4, 5), topk=3, head_dim=128),
    'wide values': Case(query=(9, 9), region=(4, 4), topk=2, head_dim=8, value_dim=40),
}


def attend(tensors, options):
    return routed_attention(*tensors, **options, backend='cpp')


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('twice', [False, True])
@pytest.mark.parametrize('case', [*FITTING.values(), *LARGE.values()], ids=[*FITTING, *LARGE])
def test_error_budget(case, twice, dtype, factor=1):
    q, k, v, routes = case.tensors(dtype)
    if twice:
        routes = torch.cat([routes, routes[..., :1]], 2)
    found, cotangent = run([factor * q, k, v, routes], case.options(), 'cpp')
    check_budget(found, [factor * q, k, v, routes], case.options(), cotangent)


@pytest.mark.parametrize('factor', [30, 1e4])
def test_large_logits(factor):
    test_error_budget(LARGE['4x6 tokens a region'], False, torch.float32, factor)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['plain', 'ragged', 'one image', 'other keys, ragged'])
def test_any_layout(name, layout, dtype):
    case = FITTING[name]
    *maps, routes = case.tensors(dtype)
    expected, cotangent = run([*maps, routes], case.options(), 'cpp')
    maps = [LAYOUTS[layout](x) for x in maps]
    found, _ = run([*maps, routes], case.options(), 'cpp', LAYOUTS[layout](cotangent))
    assert all(map(torch.equal, found, expected))


def test_gradients_of_a_constant():
    """``sum`` sends back one number, seen as a map."""
    case = LARGE['36 queries']
    *maps, routes = case.tensors(torch.float32)
    expected, _ = run([*maps, routes], case.options(), 'cpp', torch.ones(2, 12, 9, 16))
    maps = [x.requires_grad_() for x in maps]
    grads = torch.autograd.grad(attend([*maps, routes], case.options()).sum(), maps)
    assert all(map(torch.equal, grads, expected[1:]))


def test_bfloat16_is_rounded_once():
    """Weights that are all equal give the mean of the values, computed in float32."""
    *maps, routes = Case(query=(8, 8), region=(4, 4), topk=2, head_dim=32).tensors(torch.bfloat16)
    query = torch.zeros_like(maps[0])
    options = Case(query=(8, 8), region=(4, 4), topk=2, head_dim=32).options()
    rounded = attend([query, *maps[1:], routes], options)
    exact = attend([x.float() for x in (query, *maps[1:])] + [routes], options)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize('special', [float('nan'), float('inf'), -0.0, 8e37, 1e-40])
def test_bfloat16_of_special_numbers(special):
    case = Case(query=(4, 4), region=(2, 2), topk=1, head_dim=8)
    *maps, routes = case.tensors(torch.bfloat16)
    maps[2].fill_(special)
    out = attend([*maps, routes], case.options())
    expected = torch.full_like(out, special)
    assert torch.allclose(out.float(), expected.float(), rtol=1e-2, equal_nan=True)


def test_output_is_the_callers():
    *maps, routes = Case().tensors(torch.float32)
    out = attend([*(x.requires_grad_() for x in maps), routes], Case().options())
    assert out.is_contiguous()
    out.mul_(2)  # a view made in an autograd.Function would raise here


@pytest.fixture
def threads():
    """Sets how many threads PyTorch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('count', [2, 5, 16])
@pytest.mark.parametrize('name', ['stage 1', 'stage 3', '4x6 tokens a region'])
@pytest.mark.parametrize('batch', [1, 3])
def test_bit_equal_from_run_to_run(batch, name, count, threads):
    """With any number of threads; with few images several threads share one."""
    case = Case(**vars(LARGE[name]) | dict(batch=batch))
    tensors = case.tensors(torch.float32)
    threads(1)
    alone, cotangent = run(tensors, case.options(), 'cpp')
    threads(count)
    first, _ = run(tensors, case.options(), 'cpp', cotangent)
    second, _ = run(tensors, case.options(), 'cpp', cotangent)
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b)


@pytest.fixture
def deterministic():
    """PyTorch's deterministic mode, in which new tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('name', ['stage 3', '4x6 tokens a region', '33 queries'])
def test_all_is_written(name, deterministic, monkeypatch):
    case = LARGE[name]
    tensors = case.tensors(torch.float32)
    assert torch.empty(3).isnan().all()
    expected, cotangent = run(tensors, case.options(), 'cpp')
    monkeypatch.setattr(schema, 'unfilled_memory', contextlib.nullcontext)
    found, _ = run(tensors, case.options(), 'cpp', cotangent)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize('name', ['plain', 'ragged'])
def test_operator(name):
    """Its shapes, strides and gradients are as declared."""
    case = FITTING[name]
    *maps, routes = case.tensors(torch.float32)
    maps = [x.requires_grad_() for x in maps]
    settings = case.heads, case.region, case.region, 0.3
    torch.library.opcheck(schema.fused_attention, (*maps, routes, *settings, 'cpp'))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('which', [0, 1, 2])
def test_numbers_that_are_not_finite_are_passed_on(which, value):
    """To the queries that meet them, as in the reference, and to no others."""
    case = LARGE['stage 2']
    *maps, routes = case.tensors(torch.float32)
    maps[which][1, 9, 3, 40] = value
    expected = routed_attention(*maps, routes, **case.options(), backend='reference')
    found = attend([*maps, routes], case.options())
    assert not expected.isfinite().all()
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found.isnan(), expected.isnan())
    assert error(found[found.isfinite()], expected[found.isfinite()].double()) < 1e-5


def test_keys_that_are_hidden():
    """Logits of -inf, of whole blocks of keys and more; a query that sees no key gets NaN."""
    case = Case(query=(9, 129), region=(3, 43), topk=3, heads=1)
    q, k, v, routes = case.tensors(torch.float32)
    q = torch.cat([torch.ones_like(q[..., :1]), q[..., 1:]], 3)
    k[:, :, :86, 0] = -torch.inf
    routes = torch.tensor([[0, 1, 2], [0, 1, 4]])[torch.arange(18) % 2].view(2, 9, 3)
    expected = routed_attention(q, k, v, routes, **case.options(), backend='reference')
    assert expected.isnan().any()
    assert not expected.isnan().all()
    found = attend([q, k, v, routes], case.options())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_empty_map():
    q = torch.ones(2, 0, 3, 8, requires_grad=True)
    k = torch.ones(2, 4, 4, 8, requires_grad=True)
    routes = torch.zeros(2, 0, 1, dtype=torch.int64)
    attend([q, k, k, routes], dict(num_heads=1, region_size=(2, 2))).sum().backward()
    assert not k.grad.any()


@pytest.mark.parametrize('wrong', [-1, 16, 2**40])
def test_routes_to_no_region(wrong):
    """In graphs nothing looks before; the kernels must not read beyond the maps."""
    q, k, v, routes = Case().tensors(torch.float32)
    routes[1, 15, 2] = wrong
    with pytest.raises(IndexError, match='numbers that no key region has'):
        schema.fused_attention(q, k, v, routes, 2, (2, 2), (2, 2), 1.0, 'cpp')


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize('operator', [False, True])
def test_nothing_that_follows_has_a_gradient(operator):
    q, k, v, routes = Case().tensors(torch.float32)
    q.requires_grad_()
    if operator:
        out, _ = schema.fused_attention(q, k, v, routes, 2, (2, 2), (2, 2), 1.0, 'cpp')
    else:
        out = attend([q, k, v, routes], Case().options())
    NoGradient.apply(out).sum().backward()
    assert q.grad is None or not q.grad.any()


def test_threads_leave_the_setting_as_it_was():
    """Whichever ends first."""
    setting = torch.utils.deterministic
    first, second = schema.unfilled_memory(), schema.unfilled_memory()
    assert setting.fill_uninitialized_memory
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not setting.fill_uninitialized_memory
    second.__exit__(None, None, None)
    assert setting.fill_uninitialized_memory


def test_nothing_is_read_beyond_the_maps():
    """Each map ends where memory begins that may not be read, in a process that may crash."""
    code = """
import ctypes, mmap, torch
from mmbiformer.ops import routed_attention

def guarded(*shape, dtype=torch.float32):
    x = torch.randn(shape) if dtype == torch.float32 else torch.randint(6, shape)
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    last = ctypes.c_void_p(address + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(last, mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - size
    mine = torch.frombuffer(memory, dtype=dtype, count=x.numel(), offset=offset)
    return mine.view(shape).copy_(x)

torch.manual_seed(0)
for heads, dim, region in ((1, 8, (3, 4)), (3, 24, (3, 4)), (2, 40, (4, 5))):
    q, k, v = (guarded(2, 7, 9, heads * dim).requires_grad_() for _ in range(3))
    rows, cols = -(-7 // region[0]), -(-9 // region[1])
    routes = guarded(2, rows * cols, 2, dtype=torch.int64) % (rows * cols)
    out = routed_attention(
        q, k, v, routes, num_heads=heads, region_size=region, backend='cpp'
    )
    out.backward(guarded(*out.shape))
print('read nothing else')
"""
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert ran.stdout == 'read nothing else\n', (ran.returncode, ran.stderr)


class Subclass(torch.Tensor):
    pass


def test_reasons():
    q, k, v, _ = Case().tensors(torch.float32)
    why_not = BACKENDS['cpp'].why_not
    assert why_not(q, k, v, 2) is None
    assert 'tensors are on meta' in why_not(*(x.to('meta') for x in (q, k, v)), 2)
    assert 'torch.bfloat16' in why_not(q, k, v.bfloat16(), 2)
    assert 'heads of 4 channels' in why_not(q, k, v, 4)
    assert 'heads of 12 channels' in why_not(q, k, torch.ones(2, 8, 8, 24), 2)
    assert why_not(torch.nn.Parameter(q), k, v, 2) is None
    assert 'subclass of tensors' in why_not(q.as_subclass(Subclass), k, v, 2)
    with FlopCounterMode(display=False) as counter:
        assert 'tracer' in why_not(q, k, v, 2)
        routed_attention(*Case().tensors(torch.float32), num_heads=2, region_size=(2, 2))
    assert counter.get_total_flops() > 0
    seen = []
    torch.func.vmap(lambda x: seen.append(why_not(x, x, x, 2)) or x)(q[None])
    assert 'transform' in seen[0]


def test_auto_goes_on_without_it(monkeypatch, caplog):
    tensors, options = Case().tensors(torch.float32), Case().options()
    expected = routed_attention(*tensors, **options, backend='reference')
    with caplog.at_level(logging.DEBUG, logger='mmbiformer.ops'):
        routed_attention(*tensors, **options)
        assert "'cpp'" not in caplog.text
        monkeypatch.setattr(library, '_load', lambda: (None, 'there is no C++ compiler'))
        torch.testing.assert_close(routed_attention(*tensors, **options), expected)
    assert "'cpp': there is no C++ compiler" in caplog.text
    with pytest.raises(RuntimeError, match="'cpp' cannot run here: there is no C\\+\\+ compiler"):
        attend(tensors, options)
