"""Any call: backends agree whatever the sizes, the dtype and the memory layout."""

import math

import pytest
import torch
from hypothesis import strategies as st

from mmbiformer.ops import BACKENDS, num_regions, route_regions, routed_attention
from tests.helpers.attention import LAYOUTS, run
from tests.helpers.properties import DTYPES, MEMORY, backends_for, check_any, counts, topks


@st.composite
def calls(draw):
    """Arguments of one call.

    Maps have at most 24 x 24 tokens. Larger ones are not of another kind, and 48 x 48 regions of
    one token, all gathered for each of them, would take 12 GB.
    """
    sides, region_sides = st.integers(1, 24), st.integers(1, 8)
    query = draw(st.tuples(sides, sides))
    region = draw(st.tuples(region_sides, region_sides))
    key, key_region = query, region
    if draw(st.booleans()):
        key = draw(st.tuples(sides, sides))
        key_region = draw(st.tuples(region_sides, region_sides))
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 32]))
    return dict(
        query=query,
        region=region,
        key=key,
        key_region=key_region,
        topk=draw(topks(math.prod(num_regions(key, key_region)))),
        heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, 5])),
        batch=draw(st.integers(0, 3)),
        dtype=draw(DTYPES),
        layout=draw(MEMORY),
        grad=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        repeat=draw(st.booleans()),
    )


def magnitudes(q, k, v, cotangent, case, routes):
    """Bounds on the terms that are summed up in the output and in each gradient.

    With P the probabilities and D = dO V', the gradients are dV = P' dO, dQ = s P (D - delta) K and
    dK = s (P (D - delta))' Q. Rounding is relative to these terms, also where they cancel.
    """
    q, k, v, do = (x.abs().max().item() if x.numel() else 0.0 for x in (q, k, v, cotangent))
    scale = case['head_dim'] ** -0.5
    # How many queries may attend to one key, counting a region as often as it is listed.
    attended = routes.shape[1] * routes.shape[2] * math.prod(case['region'])
    through = 2 * do * v * case['value_dim'] * scale
    return [v, through * k, through * q * attended, do * attended]


def check_call(case):
    """Each backend errs at most twice as much as the reference, and a rounding of the terms.

    Errors are deviations from the reference in float64.
    """
    dtype, grad = case['dtype'], case['grad']
    q = torch.randn(case['batch'], *case['query'], case['heads'] * case['head_dim'])
    k = torch.randn(case['batch'], *case['key'], case['heads'] * case['head_dim'])
    v = torch.randn(case['batch'], *case['key'], case['heads'] * case['value_dim'])
    maps = [LAYOUTS[case['layout']](x.to(dtype)) for x in (q, k, v)]
    routes = route_regions(maps[0], maps[1], case['topk'], case['region'], case['key_region'])
    if case['repeat']:
        routes = torch.cat([routes, routes[..., :1]], -1)
    options = dict(
        num_heads=case['heads'], region_size=case['region'], key_region_size=case['key_region']
    )
    cotangent = torch.randn(case['batch'], *case['query'], v.shape[-1]).to(dtype)
    exact, _ = run([*(x.double() for x in maps), routes], options, 'reference', cotangent, grad)
    plain, _ = run([*maps, routes], options, 'reference', cotangent, grad)
    assert exact[0].shape == (case['batch'], *case['query'], v.shape[-1])
    sizes = magnitudes(*maps, cotangent, case, routes)
    sizes = [sizes[0], *(size for size, wanted in zip(sizes[1:], grad, strict=True) if wanted)]
    # PyTorch's attention on CPU takes exponentials to 20 bits in float32.
    unit = max(torch.finfo(dtype).eps, 2**-20 if dtype != torch.float64 else 0)
    for backend in BACKENDS:
        if backend == 'reference' or BACKENDS[backend].why_not(*maps, 1) is not None:
            continue
        found, _ = run([*maps, routes], options, backend, cotangent, grad)
        for a, b, c, size in zip(found, plain, exact, sizes, strict=True):
            assert a.dtype == dtype and a.shape == c.shape
            assert a.isfinite().all() and b.isfinite().all()
            if a.numel():
                theirs = (b.double() - c).abs().max().item()
                ours = (a.double() - c).abs().max().item()
                assert ours <= 2 * theirs + 8 * unit * size


@counts(120, 800)
def test_backends_agree(count):
    check_any(count, check_call, calls())


def check_gradients(backend, size, region, topk):
    topk = min(topk, math.prod(num_regions(size, region)))
    maps = [torch.randn(1, *size, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    routes = route_regions(*maps[:2], topk, region)
    torch.autograd.gradcheck(
        lambda *x: routed_attention(*x, routes, num_heads=2, region_size=region, backend=backend),
        maps,
    )


@pytest.mark.parametrize('backend', ['sdpa', 'reference'])
def test_gradcheck(backend):
    sizes = (st.tuples(st.integers(1, most), st.integers(1, most)) for most in (4, 3))
    check_any(5, check_gradients, st.just(backend), *sizes, st.integers(1, 3))


def check_edges(case):
    """Maps are windows of larger ones with NaN around."""
    channels = case['heads'] * case['head_dim']
    maps, windows = [], []
    for size in (case['query'], case['key'], case['key']):
        big = torch.full((case['batch'], size[0] + 9, size[1] + 9, channels), math.nan)
        window = big[:, : size[0], : size[1]]
        window.copy_(torch.randn(window.shape))
        windows.append(window)
        maps.append(window.contiguous())
    options = dict(region_size=case['region'], key_region_size=case['key_region'])
    routes = route_regions(*windows[:2], case['topk'], **options)
    assert torch.equal(routes, route_regions(*maps[:2], case['topk'], **options))
    for backend in backends_for(maps[0]):
        found, expected = (
            routed_attention(*x, routes, num_heads=case['heads'], backend=backend, **options)
            for x in (windows, maps)
        )
        torch.testing.assert_close(found, expected)


@counts(40)
def test_nothing_beyond_the_edge_is_read(count):
    check_any(count, check_edges, calls())
