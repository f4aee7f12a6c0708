"""Routed attention: the definition, PyTorch's attention on CPU against it, and the choice made."""

import logging
from itertools import product

import pytest
import torch

from mmbiformer.ops import attention, route_regions, routed_attention
from mmbiformer.ops.backends import sdpa
from tests.helpers.attention import CASES, LAYOUTS, Case, assert_close, check_budget, run

# The fused kernels do not take float64; they have test_triton and test_cpp.
ON_CPU = ['sdpa', 'reference']


def by_hand(q, k, v, routes, heads, region, key_region):
    """One token after another, straight from the definition."""
    batch, height, width, _ = q.shape
    cols, key_cols = -(-width // region[1]), -(-k.shape[2] // key_region[1])
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, y, x in product(range(batch), range(height), range(width)):
        tokens = [
            (b, i, j)
            for number in routes[b, y // region[0] * cols + x // region[1]].tolist()
            for i, j in product(range(k.shape[1]), range(k.shape[2]))
            if i // key_region[0] * key_cols + j // key_region[1] == number
        ]
        ks, vs = (torch.stack([m[at] for at in tokens]).unflatten(-1, (heads, -1)) for m in (k, v))
        qs = q[b, y, x].unflatten(-1, (heads, -1))
        logits = (qs * ks).sum(-1) * qs.shape[-1] ** -0.5
        out[b, y, x] = (logits.softmax(0)[..., None] * vs).sum(0).flatten()
    return out


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('name', ['plain', 'ragged', 'other keys, ragged', 'oblong'])
def test_definition(name, backend):
    """Regions that are listed twice count twice."""
    case = CASES[name]
    q, k, v, routes = case.tensors()
    routes = torch.cat([routes, routes[..., :1]], 2)
    expected = by_hand(q, k, v, routes, case.heads, case.region, case.key_region or case.region)
    found = routed_attention(q, k, v, routes, **case.options(), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('way', ['_attend_in_pieces', '_attend_under_mask'])
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_both_ways_on_cpu_equal_reference(case, way, monkeypatch):
    """Whichever the sizes would have chosen, forward and backward."""
    if way == '_attend_in_pieces' and (case.value_dim is not None or not case.batch):
        way = '_attend_gathered'  # runs where pieces cannot
    for each in ('_attend_in_pieces', '_attend_under_mask'):
        monkeypatch.setattr(sdpa, each, getattr(sdpa, way))
    *maps, routes = case.tensors()
    routes = torch.cat([routes, routes[..., :1]], 2)
    expected, cotangent = run([*maps, routes], case.options(), 'reference')
    found, _ = run([*maps, routes], case.options(), 'sdpa', cotangent)
    assert_close(found, expected)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(
    ('size', 'region'),
    [
        ((8, 24), (8, 1)),
        ((24, 24), (1, 8)),
        ((32, 16), (4, 16)),
        ((6, 7), (6, 7)),
        ((9, 5), (2, 3)),
        ((6, 1), (1, 1)),
    ],
)
def test_any_layout(size, region, layout, monkeypatch):
    """Also where regions of a map, head by head, are a view of it."""
    monkeypatch.setattr(sdpa, '_attend_under_mask', sdpa._attend_in_pieces)
    kinds = ((torch.float64, 1e-10), (torch.float32, 1e-5))
    for batch, heads, (dtype, tolerance) in product((1, 2), (1, 2), kinds):
        case = Case(query=size, region=region, topk=1, batch=batch, heads=heads)
        *maps, routes = case.tensors(dtype)
        exact = [x.double() for x in maps]
        expected, cotangent = run([*exact, routes], case.options(), 'reference')
        maps = [LAYOUTS[layout](x) for x in maps]
        found, _ = run([*maps, routes], case.options(), 'sdpa', LAYOUTS[layout](cotangent))
        assert_close(found, expected, tolerance)


@pytest.mark.parametrize('strips', [1, 3])
@pytest.mark.parametrize(
    'name', ['large regions, one route', 'ragged, one route', 'hub, ragged', 'one image']
)
def test_pieces_make_the_whole(name, strips, monkeypatch):
    case = CASES[name]
    tensors = case.tensors()
    expected, cotangent = run(tensors, case.options(), 'reference')
    a_strip = -(-case.query[1] // case.region[1]) * case.topk * 2 * tensors[1].element_size()
    a_strip *= case.region[0] * case.region[1] * case.heads * case.head_dim
    monkeypatch.setattr(sdpa, 'PIECE_BYTES', strips * a_strip)
    sizes, plain = [], sdpa._operands

    def note(q, *args):
        sizes.append(len(q))
        return plain(q, *args)

    monkeypatch.setattr(sdpa, '_operands', note)
    found, _ = run(tensors, case.options(), 'sdpa', cotangent)
    assert sizes[0] == strips
    assert len(sizes) > 2  # forward and backward
    assert_close(found, expected)


@pytest.mark.parametrize('pieces', [(1, 2**30), (2**30, 1)])
def test_pieces_are_those_of_the_forward_pass(pieces, monkeypatch):
    """Even if the size of a piece has changed since, as in a compiled backward pass."""
    *maps, routes = Case(query=(32, 32), region=(8, 8), topk=2).tensors()
    options = dict(num_heads=2, region_size=(8, 8), backend='sdpa')
    maps = [x.requires_grad_() for x in maps]
    expected = torch.autograd.grad(routed_attention(*maps, routes, **options).sum(), maps)
    monkeypatch.setattr(sdpa, 'PIECE_BYTES', pieces[0])
    out = routed_attention(*maps, routes, **options)
    monkeypatch.setattr(sdpa, 'PIECE_BYTES', pieces[1])
    assert_close(torch.autograd.grad(out.sum(), maps), expected)


def test_no_piece_is_kept(monkeypatch):
    """Pieces kept for the backward pass would hold the memory around them."""
    monkeypatch.setattr(sdpa, 'PIECE_BYTES', 1)
    *maps, routes = Case(query=(32, 32), region=(8, 8), topk=2).tensors()
    maps, kept = [x.requires_grad_() for x in maps], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        routed_attention(*maps, routes, num_heads=2, region_size=(8, 8), backend='sdpa')
    assert kept == [x.shape for x in (*maps, routes, maps[0])] + [(2 * 16, 2, 64)]


def test_autocast_leaves_the_backward_pass_alone():
    case = Case(query=(16, 16), region=(8, 8), topk=2)
    *maps, routes = case.tensors(torch.float32)
    maps = [x.requires_grad_() for x in maps]
    out = routed_attention(*maps, routes, **case.options(), backend='sdpa')
    expected = torch.autograd.grad(out.sum(), maps, retain_graph=True)
    with torch.autocast('cpu'):
        found = torch.autograd.grad(out.sum(), maps)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'name', ['plain', 'large regions', 'ragged', 'head dim 24', 'hub', 'one image']
)
def test_error_budget(name, dtype):
    """PyTorch's fused attention on CPU takes exponentials to 20 bits, also in float32."""
    tensors, options = CASES[name].tensors(dtype), CASES[name].options()
    found, cotangent = run(tensors, options, 'sdpa')
    check_budget(found, tensors, options, cotangent, max(torch.finfo(dtype).eps, 2**-20))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])
def test_logits_beyond_half_precision(dtype, region):
    """Products of 16 numbers of 300 exceed 65504, where a matrix product in float16 overflows."""
    q, k, v = (300 * torch.randn(1, 16, 16, 32) for _ in range(3))
    assert (q[..., :16].flatten(0, 2) @ k[..., :16].flatten(0, 2).T).abs().max() > 65504
    maps = [x.to(dtype) for x in (q, k, v / 300)]
    tensors = [*maps, route_regions(*maps[:2], 2, region)]
    found, _ = run(tensors, dict(num_heads=2, region_size=region), 'auto')
    assert all(x.isfinite().all() for x in found)


def test_backward_is_deterministic():
    case = Case(query=(32, 32), region=(8, 8), topk=3, hub=True)
    tensors = case.tensors(torch.float32)
    first, cotangent = run(tensors, case.options(), 'sdpa')
    second, _ = run(tensors, case.options(), 'sdpa', cotangent)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('size', [(32, 16), (30, 15)])
def test_output_is_the_callers(backend, size):
    """It may be changed in place; and torch.func gives what autograd gives."""
    *maps, routes = Case(query=size, region=(8, 8), topk=1).tensors()
    options = dict(num_heads=2, region_size=(8, 8), backend=backend)
    q = maps[0].requires_grad_()
    routed_attention(q, *maps[1:], routes, **options).mul_(2)
    (2 * routed_attention(q, *maps[1:], routes, **options)).sum().backward()

    def twice(q):
        return 2 * routed_attention(q, *maps[1:], routes, **options).sum()

    torch.testing.assert_close(torch.func.grad(twice)(q.detach()), q.grad)
    with torch.no_grad():
        found = torch.func.vmap(twice)(torch.stack([q, 2 * q]))
    torch.testing.assert_close(found, torch.stack([twice(q), twice(2 * q)]).detach())


@pytest.mark.parametrize('backend', ['auto', *ON_CPU])
@pytest.mark.parametrize('wrong', [-1, 16, 2**40])
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])  # gathered, and all under a mask
def test_routes_to_no_region(region, wrong, backend):
    case = Case(query=tuple(4 * n for n in region), region=region)
    *maps, routes = case.tensors()
    routes[0, 15, 2] = wrong
    with pytest.raises(IndexError, match=r'no key region has: regions are numbered from 0 to 15'):
        routed_attention(*maps, routes, **case.options(), backend=backend)


class Absent:
    """A backend that cannot run."""

    @staticmethod
    def why_not(query, key, value, num_heads):
        return 'it is not installed'


def test_explicit_backend_never_falls_back(caplog, monkeypatch):
    tensors, options = Case().tensors(), Case().options()
    expected = routed_attention(*tensors, **options, backend='reference')
    monkeypatch.setattr(attention, 'BACKENDS', {'absent': Absent, **attention.BACKENDS})
    with pytest.raises(RuntimeError, match="'absent' cannot run here: it is not installed"):
        routed_attention(*tensors, **options, backend='absent')
    with caplog.at_level(logging.DEBUG, logger='mmbiformer.ops'):
        found = routed_attention(*tensors, **options)
    assert 'it is not installed' in caplog.text
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"backend='fast' is unknown; choose one of .*'sdpa'"):
        routed_attention(*tensors, **options, backend='fast')


def test_shapes_must_fit():
    q, k, v, routes = Case().tensors()
    options = dict(num_heads=2, region_size=(2, 2))
    with pytest.raises(ValueError, match=r'must be maps \(B, H, W, C\)'):
        routed_attention(q[0], k, v, routes, **options)
    with pytest.raises(ValueError, match='share batch and channels'):
        routed_attention(q[..., :8], k, v, routes, **options)
    with pytest.raises(ValueError, match='multiples of num_heads=3'):
        routed_attention(q, k, v, routes, num_heads=3, region_size=(2, 2))
    with pytest.raises(ValueError, match='on one device; got cpu, meta, cpu, cpu'):
        routed_attention(q, k.to('meta'), v, routes, **options)
    with pytest.raises(ValueError, match='on one device; got cpu, cpu, cpu, meta'):
        routed_attention(q, k, v, routes.to('meta'), **options)
    for wrong in (routes[:, :15], routes[..., :0], routes.int()):
        with pytest.raises(ValueError, match=r'routes must be int64 .*\(2, 16, k >= 1\)'):
            routed_attention(q, k, v, wrong, **options)
    with pytest.raises(ValueError, match='must be positive'):
        routed_attention(q, k, v, routes, num_heads=0, region_size=(2, 2))


def test_scale_is_a_number():
    """Else it would get no gradient, and nobody would notice."""
    scale = torch.tensor(0.1, requires_grad=True)
    tensors, options = Case().tensors(), Case().options()
    with pytest.raises(ValueError, match=r'scale must be a number.*multiply the query'):
        routed_attention(*tensors, **options, scale=scale)
    found = routed_attention(*tensors, **options, scale=scale.detach())
    assert torch.equal(found, routed_attention(*tensors, **options, scale=scale.item()))
