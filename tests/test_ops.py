"""Routed attention: every backend equals the reference, on awkward shapes and in every dtype."""

import logging
from dataclasses import dataclass

import pytest
import torch
from mmengine.utils import digit_version

from mmbiformer.ops import BACKENDS, region_means, route_regions, routed_attention
from mmbiformer.ops.backends import sdpa

OLD_TORCH = digit_version(torch.__version__) < digit_version('2.5')


@dataclass
class Case:
    """One call; sizes are height and width in tokens."""

    query: tuple[int, int] = (8, 8)
    region: tuple[int, int] = (2, 2)
    key: tuple[int, int] | None = None  # the query's map
    key_region: tuple[int, int] | None = None
    topk: int = 3
    heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # head_dim
    batch: int = 2
    hub: bool = False  # every region is routed to the first ones, none to the last

    def tensors(self, dtype=torch.float64):
        key_size = self.key or self.query
        channels = self.heads * self.head_dim
        value_channels = self.heads * (self.value_dim or self.head_dim)
        q = torch.randn(self.batch, *self.query, channels, dtype=torch.float64)
        k = torch.randn(self.batch, *key_size, channels, dtype=torch.float64)
        v = torch.randn(self.batch, *key_size, value_channels, dtype=torch.float64)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        routes = route_regions(q, k, self.topk, self.region, self.key_region)
        if self.hub:
            routes = torch.arange(self.topk).expand_as(routes)
        return q, k, v, routes

    def options(self):
        return dict(num_heads=self.heads, region_size=self.region, key_region_size=self.key_region)


CASES = {
    'plain': Case(),
    'one route': Case(topk=1),
    'all routes': Case(topk=16),
    'large regions': Case(query=(16, 16), region=(8, 8), topk=2),
    'large regions, one route': Case(query=(24, 16), region=(8, 8), topk=1, heads=1),
    'oblong': Case(query=(6, 20), region=(3, 5), topk=2),
    'one token a region': Case(query=(4, 5), region=(1, 1), topk=7),
    'one region': Case(query=(5, 3), region=(5, 3), topk=1),
    'ragged': Case(query=(13, 17), region=(4, 5), topk=3),
    'ragged, one route': Case(query=(31, 33), region=(8, 8), topk=1),
    'ragged, last row of one token': Case(query=(9, 8), region=(4, 4), topk=2),
    'head dim 24': Case(heads=3, head_dim=24),
    'head dim 40': Case(query=(16, 16), region=(8, 4), head_dim=40, topk=2),
    'head dim 100': Case(heads=1, head_dim=100),
    'other keys': Case(query=(6, 6), region=(3, 3), key=(10, 14), key_region=(2, 7), topk=4),
    'other keys, ragged': Case(query=(7, 5), region=(3, 3), key=(11, 9), key_region=(4, 4), topk=2),
    'other value width': Case(value_dim=12),
    'hub': Case(query=(16, 16), region=(4, 4), topk=2, hub=True),
    'hub, ragged': Case(query=(15, 14), region=(4, 4), topk=2, hub=True),
    'one image': Case(batch=1, query=(28, 28), region=(4, 4), topk=4),
    'no image': Case(batch=0),
}
# Fused kernels know no float64; they have test_triton and test_cpp.
ON_CPU = [name for name in BACKENDS if name not in ('triton', 'cpp')]
FAST = [name for name in ON_CPU if name != 'reference']


def run(tensors, options, backend, cotangent=None):
    """Output, and the gradients of query, key and value."""
    *maps, routes = tensors
    maps = [x.detach().clone().requires_grad_() for x in maps]
    out = routed_attention(*maps, routes, **options, backend=backend)
    if cotangent is None:
        cotangent = torch.randn_like(out)
    return [out, *torch.autograd.grad(out, maps, cotangent.to(out.dtype))], cotangent


def error(found, expected):
    """Largest deviation, relative to the largest value."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_backend_equals_reference(case, backend):
    tensors = case.tensors()
    expected, cotangent = run(tensors, case.options(), 'reference')
    found, _ = run(tensors, case.options(), backend, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('way', ['_attend_in_pieces', '_attend_under_mask'])
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_both_ways_on_cpu_equal_reference(case, way, monkeypatch):
    """Whichever the sizes would have chosen, forward and backward."""
    if way == '_attend_in_pieces' and (case.value_dim is not None or not case.batch):
        way = '_attend_gathered'  # what runs where pieces cannot
    for each in ('_attend_in_pieces', '_attend_under_mask'):
        monkeypatch.setattr(sdpa, each, getattr(sdpa, way))
    *maps, routes = case.tensors()
    routes = torch.cat([routes, routes[..., :1]], 2)  # listed twice
    expected, cotangent = run([*maps, routes], case.options(), 'reference')
    found, _ = run([*maps, routes], case.options(), 'sdpa', cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


LAYOUTS = {
    'NHWC': lambda x: x,
    'NCHW': lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    'WHC': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'packed': lambda x: torch.cat([x, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]],
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('heads', [1, 2])
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize(
    ('size', 'region'),
    [
        ((8, 24), (8, 1)),
        ((24, 24), (1, 8)),
        ((32, 16), (4, 16)),
        ((6, 7), (6, 7)),
        ((9, 5), (2, 3)),
    ],
)
def test_any_layout(size, region, batch, heads, layout, monkeypatch):
    """Also where regions of a map, head by head, are a view of it."""
    monkeypatch.setattr(sdpa, '_attend_under_mask', sdpa._attend_in_pieces)
    case = Case(query=size, region=region, topk=1, batch=batch, heads=heads)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        *maps, routes = case.tensors(dtype)
        maps = [LAYOUTS[layout](x).detach() for x in maps]
        exact = [x.double() for x in maps]
        expected, cotangent = run([*exact, routes], case.options(), 'reference')
        q, k, v = (x.requires_grad_() for x in maps)
        out = routed_attention(q, k, v, routes, **case.options(), backend='sdpa')
        found = [out, *torch.autograd.grad(out, (q, k, v), cotangent.to(dtype))]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_pieces_are_those_of_the_forward_pass(monkeypatch):
    """Whatever has changed since, as in a compiled backward pass."""
    *maps, routes = Case(query=(32, 32), region=(8, 8), topk=2).tensors()
    options = dict(num_heads=2, region_size=(8, 8), backend='sdpa')
    maps = [x.requires_grad_() for x in maps]
    expected = torch.autograd.grad(routed_attention(*maps, routes, **options).sum(), maps)
    for before, after in (({}, dict(PIECE_BYTES=1)), (dict(PIECE_BYTES=1), {})):
        with monkeypatch.context() as patch:
            for name, value in before.items():
                patch.setattr(sdpa, name, value)
            out = routed_attention(*maps, routes, **options)
        with monkeypatch.context() as patch:
            for name, value in after.items():
                patch.setattr(sdpa, name, value)
            for a, b in zip(torch.autograd.grad(out.sum(), maps), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


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
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'name', ['plain', 'large regions', 'ragged', 'head dim 24', 'hub', 'one image']
)
def test_error_budget(name, dtype, backend):
    """At most twice the error that the reference itself makes in that precision.

    PyTorch's fused attention on CPU takes exponentials to 20 bits, so float32 has no finer budget.
    """
    if backend == 'sdpa' and dtype == torch.float16 and OLD_TORCH:
        pytest.xfail("torch 2.4's own attention on CPU errs by 2.6 roundings, not by 2")
    case = CASES[name]
    *maps, routes = case.tensors(dtype)
    exact, cotangent = run([*(x.double() for x in maps), routes], case.options(), 'reference')
    plain, _ = run([*maps, routes], case.options(), 'reference', cotangent)
    found, _ = run([*maps, routes], case.options(), backend, cotangent)
    rounding = max(torch.finfo(dtype).eps, 2**-20)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.dtype == dtype
        assert error(a, c) <= 2 * max(error(b, c), rounding)


def by_hand(q, k, v, routes, heads, region, key_region):
    """One token after another, straight from the definition."""
    batch, height, width, _ = q.shape
    cols, key_cols = -(-width // region[1]), -(-k.shape[2] // key_region[1])
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                mine = routes[b, y // region[0] * cols + x // region[1]].tolist()
                tokens = [
                    (i, j)
                    for i in range(k.shape[1])
                    for j in range(k.shape[2])
                    if i // key_region[0] * key_cols + j // key_region[1] in mine
                ]
                ks = torch.stack([k[b, i, j] for i, j in tokens]).unflatten(-1, (heads, -1))
                vs = torch.stack([v[b, i, j] for i, j in tokens]).unflatten(-1, (heads, -1))
                qs = q[b, y, x].unflatten(-1, (heads, -1))
                logits = (qs * ks).sum(-1) * qs.shape[-1] ** -0.5
                out[b, y, x] = (logits.softmax(0)[..., None] * vs).sum(0).flatten()
    return out


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('name', ['plain', 'ragged', 'other keys, ragged', 'oblong'])
def test_definition(name, backend):
    case = CASES[name]
    q, k, v, routes = case.tensors()
    expected = by_hand(q, k, v, routes, case.heads, case.region, case.key_region or case.region)
    found = routed_attention(q, k, v, routes, **case.options(), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('region', [(1, 2), (4, 4)])
def test_gradcheck(backend, region):
    case = Case(query=(5, 4), region=region, topk=1, head_dim=3, batch=1)
    q, k, v, routes = case.tensors()
    maps = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(
        lambda *x: routed_attention(*x, routes, **case.options(), backend=backend), maps
    )


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])
def test_slices_of_a_packed_projection(backend, region):
    packed = torch.randn(2, 16, 16, 3 * 16, dtype=torch.float64)
    q, k, v = packed.chunk(3, -1)
    routes = route_regions(q, k, 2, region)
    options = dict(num_heads=2, region_size=region, backend=backend)
    found = routed_attention(q, k, v, routes, **options)
    expected = routed_attention(*(x.contiguous() for x in (q, k, v)), routes, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('backend', ON_CPU)
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])
def test_repeated_route_counts_twice(backend, region):
    q, k, v, routes = Case(query=(32, 16), region=region, topk=1).tensors()
    routes = torch.cat([routes, routes, (routes + 1) % routes.shape[1]], -1)
    options = dict(num_heads=2, region_size=region)
    found = routed_attention(q, k, v, routes, **options, backend=backend)
    torch.testing.assert_close(
        found, routed_attention(q, k, v, routes, **options, backend='reference')
    )
    once = routed_attention(q, k, v, routes[..., 1:], **options, backend=backend)
    assert not torch.allclose(found, once)


@pytest.mark.parametrize('backend', FAST)
def test_backward_is_deterministic(backend):
    case = Case(query=(32, 32), region=(8, 8), topk=3, hub=True)
    tensors = case.tensors(torch.float32)
    first, cotangent = run(tensors, case.options(), backend)
    second, _ = run(tensors, case.options(), backend, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_region_means_count_what_exists():
    x = torch.arange(15.0).reshape(1, 3, 5, 1)
    means = region_means(x, (2, 2))
    expected = torch.tensor([3.0, 5.0, 6.5, 10.5, 12.5, 14.0]).reshape(1, 6, 1)
    torch.testing.assert_close(means, expected)


def test_routing_is_made_in_float32():
    x = torch.randn(1, 32, 32, 64, dtype=torch.bfloat16)
    means = region_means(x, (16, 16))
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, region_means(x.float(), (16, 16)))
    with torch.autocast('cpu', torch.bfloat16):
        routes = route_regions(x, x, 2, (16, 16))
    assert torch.equal(routes, route_regions(x.float(), x.float(), 2, (16, 16)))
    assert region_means(x.double(), (16, 16)).dtype == torch.float64


def test_routing_by_affinity():
    q = torch.tensor([1.0, 0.0]).repeat(1, 4, 4, 1)
    k = torch.zeros(1, 4, 4, 2)
    k[:, :2, 2:, 0] = 1  # region 1
    k[:, 2:, :2, 0] = 2  # region 2
    assert route_regions(q, k, 2, (2, 2)).tolist() == [[[2, 1]] * 4]


@pytest.mark.parametrize('topk', [0, 17])
def test_topk_must_fit(topk):
    x = torch.zeros(1, 8, 8, 4)
    with pytest.raises(ValueError, match=rf'topk={topk} .* 16 regions .* choose 1 <= topk <= 16'):
        route_regions(x, x, topk, (2, 2))


def test_unknown_backend():
    q, k, v, routes = Case().tensors()
    with pytest.raises(ValueError, match=r"backend='fast' is unknown; choose one of .*'sdpa'"):
        routed_attention(q, k, v, routes, num_heads=2, region_size=(2, 2), backend='fast')


class Absent:
    """A backend that cannot run."""

    @staticmethod
    def why_not(query, key, value, num_heads):
        return 'it is not installed'


def test_explicit_backend_never_falls_back(caplog):
    case = Case()
    tensors = case.tensors()
    expected = routed_attention(*tensors, **case.options(), backend='reference')
    others = list(BACKENDS.items())
    BACKENDS.clear()
    BACKENDS.update({'absent': Absent, **dict(others)})
    try:
        with pytest.raises(RuntimeError, match="'absent' cannot run here: it is not installed"):
            routed_attention(*tensors, **case.options(), backend='absent')
        with caplog.at_level(logging.DEBUG, logger='mmbiformer.ops'):
            found = routed_attention(*tensors, **case.options())
        assert 'it is not installed' in caplog.text
        torch.testing.assert_close(found, expected)
    finally:
        del BACKENDS['absent']


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
    with pytest.raises(ValueError, match=r'scale must be a number.*multiply the query'):
        routed_attention(*Case().tensors(), **Case().options(), scale=scale)
    tensors, options = Case().tensors(), Case().options()
    found = routed_attention(*tensors, **options, scale=scale.detach())
    assert torch.equal(found, routed_attention(*tensors, **options, scale=scale.item()))


@pytest.mark.parametrize('backend', ['auto', *ON_CPU])
@pytest.mark.parametrize('wrong', [-1, 16, 2**40])
@pytest.mark.parametrize('region', [(2, 2), (8, 8)])  # gathered, and all under a mask
def test_routes_to_no_region(region, wrong, backend):
    case = Case(query=tuple(4 * n for n in region), region=region)
    *maps, routes = case.tensors()
    routes[0, 15, 2] = wrong
    with pytest.raises(IndexError, match='numbers that no key region has: they go from 0 to 15'):
        routed_attention(*maps, routes, **case.options(), backend=backend)


@pytest.mark.parametrize('backend', ON_CPU)
def test_channels_that_are_no_neighbours(backend):
    """Regions of one token of a map stored as NCHW: the smallest that PyTorch's kernel misread."""
    q, k, v = (torch.randn(1, 6, 1, 32).double().permute(0, 2, 3, 1) for _ in range(3))
    routes = route_regions(q, k, 1, (1, 1))
    found = routed_attention(q, k, v, routes, num_heads=2, region_size=(1, 1), backend=backend)
    assert torch.equal(found, v.flatten(1, 2)[:, routes[0, :, 0]].unflatten(1, (1, 32)))


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
