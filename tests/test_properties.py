"""Any input: what holds whatever the sizes, the dtype, the memory layout and the options.

The cases are drawn by hypothesis, the same ones in every run. Those marked slow draw more.
"""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmbiformer.layers import BiLevelRoutingAttention, DeformableAgentAttention
from mmbiformer.models import BiFormer, DeBiFormer, debiformer
from mmbiformer.models.biformer import ARCHS
from mmbiformer.ops import BACKENDS, agents, num_regions, regions, route_regions, routed_attention

FAST = [name for name in BACKENDS if name != 'reference']
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PADDINGS = ['input', 'projected', 'mask']
AGENT_PADDINGS = ['input', 'mask']
LAYOUTS = ['plain', 'channels first', 'every other', 'slice', 'offset']


def cases(count):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def laid_out(x, layout):
    """The same numbers, otherwise in memory; the axes are (B, ·, ·, ·)."""
    if layout == 'channels first':
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if layout == 'every other':
        return x.repeat_interleave(2, 2)[:, :, ::2]
    if layout == 'slice':
        return torch.cat([x, x + 1, x], -1).chunk(3, -1)[0]
    if layout == 'offset':
        return torch.cat([x[:1], x])[1:] if len(x) else x
    return x.contiguous()


# ---- The operator.


@st.composite
def calls(draw):
    """Arguments of one call.

    Maps of more than 24 x 24 tokens are of no other kind, and 48 x 48 regions of one token each,
    all gathered for each of them, would take 12 GB.
    """
    largest = 24

    def size(most):
        return draw(st.tuples(st.integers(1, most), st.integers(1, most)))

    query = size(largest)
    region = size(8)
    other_key = draw(st.booleans())
    key, key_region = (size(largest), size(8)) if other_key else (query, region)
    regions = math.prod(num_regions(key, key_region))
    head_dim = draw(st.sampled_from([1, 3, 8, 16, 32]))
    return dict(
        query=query,
        region=region,
        key=key,
        key_region=key_region,
        topk=draw(st.one_of(st.integers(1, min(regions, 8)), st.just(regions))),
        heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, 5])),
        batch=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        grad=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        repeat=draw(st.booleans()),
    )


def run(maps, routes, options, backend, cotangent, grad):
    """Output, and the gradients of those maps that want one."""
    maps = [x.detach().requires_grad_(wanted) for x, wanted in zip(maps, grad, strict=True)]
    out = routed_attention(*maps, routes, **options, backend=backend)
    assert out.requires_grad == any(grad)
    wanted = [x for x in maps if x.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, cotangent)] if wanted else [out]


def magnitudes(q, k, v, cotangent, case, routes):
    """Bounds on the terms that are summed up in the output and in each gradient.

    With P the probabilities and D = dO V', the gradients are dV = P' dO, dQ = s P (D - delta) K and
    dK = s (P (D - delta))' Q: rounding is relative to these terms, also where they cancel.
    """
    q, k, v, do = (x.abs().max().item() if x.numel() else 0.0 for x in (q, k, v, cotangent))
    scale = case['head_dim'] ** -0.5
    # How many queries may attend to one key, counting a region as often as it is listed.
    attended = routes.shape[1] * routes.shape[2] * math.prod(case['region'])
    through = 2 * do * v * case['value_dim'] * scale
    return [v, through * k, through * q * attended, do * attended]


def check_call(case):
    dtype = case['dtype']
    q = torch.randn(case['batch'], *case['query'], case['heads'] * case['head_dim'])
    k = torch.randn(case['batch'], *case['key'], case['heads'] * case['head_dim'])
    v = torch.randn(case['batch'], *case['key'], case['heads'] * case['value_dim'])
    maps = [laid_out(x.to(dtype), case['layout']) for x in (q, k, v)]
    routes = route_regions(maps[0], maps[1], case['topk'], case['region'], case['key_region'])
    if case['repeat']:
        routes = torch.cat([routes, routes[..., :1]], -1)
    options = dict(
        num_heads=case['heads'], region_size=case['region'], key_region_size=case['key_region']
    )
    cotangent = torch.randn(case['batch'], *case['query'], v.shape[-1]).to(dtype)
    grad = case['grad']
    exact = run([x.double() for x in maps], routes, options, 'reference', cotangent.double(), grad)
    plain = run(maps, routes, options, 'reference', cotangent, grad)
    assert exact[0].shape == (case['batch'], *case['query'], v.shape[-1])
    sizes = magnitudes(*maps, cotangent, case, routes)
    sizes = [sizes[0], *(size for size, wanted in zip(sizes[1:], grad, strict=True) if wanted)]
    # PyTorch's attention on CPU takes exponentials to 20 bits in float32.
    unit = max(torch.finfo(dtype).eps, 2**-20 if dtype != torch.float64 else 0)
    for backend in FAST:
        if BACKENDS[backend].why_not(*maps, 1) is not None:
            continue
        found = run(maps, routes, options, backend, cotangent, grad)
        for a, b, c, size in zip(found, plain, exact, sizes, strict=True):
            assert a.dtype == dtype and a.shape == c.shape
            assert a.isfinite().all() and b.isfinite().all()
            if a.numel():
                theirs = (b.double() - c).abs().max().item()
                ours = (a.double() - c).abs().max().item()
                assert ours <= 2 * theirs + 8 * unit * size


@cases(120)
@given(calls())
def test_backends_agree(case):
    """Each stays within its budget: twice the reference's own error, and a rounding of the terms.

    Errors are deviations from the reference in float64.
    """
    check_call(case)


@pytest.mark.slow
@cases(800)
@given(calls())
def test_backends_agree_on_more(case):
    check_call(case)


@cases(10)
@given(
    st.sampled_from([*BACKENDS]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
)
def test_gradcheck(backend, size, region, topk):
    topk = min(topk, math.prod(num_regions(size, region)))
    maps = [torch.randn(1, *size, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    routes = route_regions(*maps[:2], topk, region)
    if BACKENDS[backend].why_not(*maps, 1) is None:
        torch.autograd.gradcheck(
            lambda *x: routed_attention(
                *x, routes, num_heads=2, region_size=region, backend=backend
            ),
            maps,
        )


# ---- The layer.


GRIDS = st.one_of(st.integers(1, 8), st.tuples(st.integers(1, 8), st.integers(1, 8)))


@st.composite
def layers(draw):
    grid = draw(GRIDS)
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    padding = draw(st.sampled_from(PADDINGS))
    least = (rows, cols) if padding == 'projected' else (1, 1)
    return dict(
        padding=padding,
        region_grid=grid,
        topk=draw(st.one_of(st.integers(1, min(rows * cols, 6)), st.just(rows * cols))),
        size=draw(st.tuples(*(st.integers(n, 40) for n in least))),
        batch=draw(st.integers(0, 2)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@cases(60)
@given(layers())
def test_layer(case):
    """Any map: backends agree to the last digits of float64, also in gradients."""
    x = torch.randn(case['batch'], *case['size'], 8, dtype=torch.float64)
    x = laid_out(x, case['layout'])
    attn = BiLevelRoutingAttention(
        8, 2, case['topk'], case['region_grid'], padding=case['padding']
    ).double()
    found = []
    for attn.backend in BACKENDS:
        attn.zero_grad(set_to_none=True)
        if BACKENDS[attn.backend].why_not(x, x, x, 1) is not None:
            continue
        leaf = x.detach().requires_grad_()
        out = attn(leaf)
        assert out.shape == x.shape and out.isfinite().all()
        out.square().sum().backward()
        found.append([out, leaf.grad, *(p.grad for p in attn.parameters())])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@cases(40)
@given(layers(), st.integers(1, 40))
def test_top_k_beyond_the_regions(case, more):
    """One message, when the layer is built or, where only the map tells, when it is run."""
    rows, cols = num_regions((8, 8), (1, 1))
    options = dict(region_grid=(8, 8), padding=case['padding'])
    if case['padding'] == 'projected':
        attn = BiLevelRoutingAttention(8, 2, rows * cols + more, **options)
        with pytest.raises(ValueError, match=rf'topk={64 + more} does not fit the 64 regions'):
            attn(torch.zeros(1, 8, 8, 8))
    else:
        with pytest.raises(ValueError, match=rf'topk={64 + more} does not fit the 64 regions'):
            BiLevelRoutingAttention(8, 2, rows * cols + more, **options)


def filled(value):
    """Lets regions be padded with ``value`` instead of zero."""

    def pad(x, widths):
        return F.pad(x, widths, value=value if x.is_floating_point() else 0)

    return mock.patch.object(regions, 'F', SimpleNamespace(pad=pad))


def check_masked(net, x, value):
    """What lies beyond the edge, 0 or ``value``: results are the same to the last bit."""
    for backend in BACKENDS:
        if BACKENDS[backend].why_not(x, x, x, 1) is not None:
            continue
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
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def use_backend(net, backend):
    for module in net.modules():
        if isinstance(module, (BiLevelRoutingAttention, DeformableAgentAttention)):
            module.backend = backend


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)


@cases(40)
@given(layers(), st.floats(-1e6, 1e6))
def test_masked_padding_has_no_influence(case, value):
    """Whatever lies beyond the edge."""
    x = torch.randn(case['batch'], *case['size'], 8, dtype=torch.float64)
    attn = BiLevelRoutingAttention(8, 2, case['topk'], case['region_grid'], padding='mask')
    check_masked(attn.double(), x, value)


@st.composite
def agent_layers(draw, largest=24):
    """A deformable agent attention and its input."""
    grid = draw(GRIDS)
    regions = math.prod((grid, grid) if isinstance(grid, int) else grid)
    return dict(
        kwargs=dict(
            num_heads=4,
            topk=draw(st.one_of(st.integers(1, min(regions, 6)), st.just(regions))),
            num_groups=draw(st.sampled_from([1, 2, 4])),
            stride=draw(st.integers(1, 9)),
            offset_kernel=draw(st.sampled_from([1, 3, 5, 9])),
            table_size=draw(st.integers(2, 9)),
            mlp_ratio=draw(st.sampled_from([1, 1.5])),
            region_grid=grid,
            padding=draw(st.sampled_from(AGENT_PADDINGS)),
        ),
        size=draw(st.tuples(st.integers(1, largest), st.integers(1, largest))),
        batch=draw(st.integers(0, 3)),
        layout=draw(st.sampled_from(LAYOUTS)),
        reach=draw(st.sampled_from([0.0, 1.0, 100.0])),
    )


def agent_layer(case, **kwargs):
    """The attention of a case, and its input; with a reach of 100 agents leave the map."""
    attn = DeformableAgentAttention(8, **{**case['kwargs'], **kwargs}).double()
    with torch.no_grad():
        attn.offset.head.weight.mul_(case['reach'])
    x = torch.randn(case['batch'], *case['size'], 8, dtype=torch.float64)
    return attn, laid_out(x, case['layout'])


def check_agent_layer(case):
    attn, x = agent_layer(case)
    # The last with the smallest number of logits at a time: row by row.
    limit, found = agents.LOGITS_ON_CPU, []
    for attn.backend, least in [*((name, limit) for name in BACKENDS), ('reference', 1)]:
        attn.zero_grad(set_to_none=True)
        if BACKENDS[attn.backend].why_not(x, x, x, 1) is not None:
            continue
        leaf = x.detach().requires_grad_()
        with mock.patch.object(agents, 'LOGITS_ON_CPU', least):
            out = attn(leaf)
            assert out.shape == x.shape and out.isfinite().all()
            out.square().sum().backward()
        found.append([out, leaf.grad, *(p.grad for p in attn.parameters())])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if len(x):
        torch.testing.assert_close(attn(x[:1]), found[0][0][:1], rtol=1e-9, atol=1e-9)


@cases(30)
@given(agent_layers())
def test_agent_layer(case):
    """Any map: backends agree in outputs and gradients, and an image is alone in its batch."""
    check_agent_layer(case)


@pytest.mark.slow
@cases(150)
@given(agent_layers(48))
def test_more_agent_layers(case):
    check_agent_layer(case)


@cases(20)
@given(agent_layers(), st.floats(-1e6, 1e6))
def test_agents_see_no_masked_padding(case, value):
    check_masked(*agent_layer(case, padding='mask'), value)


@cases(40)
@given(calls())
def test_nothing_beyond_the_edge_is_read(case):
    """Maps that are windows of larger ones with NaN around: kernels must not read past the edge."""
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
    for backend in BACKENDS:
        if BACKENDS[backend].why_not(*maps, 1) is None:
            found, expected = (
                routed_attention(*x, routes, num_heads=case['heads'], backend=backend, **options)
                for x in (windows, maps)
            )
            torch.testing.assert_close(found, expected)


# ---- Whole backbones.


@st.composite
def common_options(draw, stages):
    """Arguments of every backbone, after the number of stages that are built."""
    final_norm = draw(st.booleans())
    out_indices = None
    if not final_norm:
        out_indices = tuple(sorted(draw(st.sets(st.integers(0, stages - 1), min_size=1))))
        stages = out_indices[-1] + 1
    return stages, dict(
        final_norm=final_norm,
        out_indices=out_indices,
        drop_path_rate=draw(st.sampled_from([0.0, 0.3])),
        frozen_stages=draw(st.integers(-1, stages)),
        norm_eval=draw(st.booleans()),
        with_cp=draw(st.booleans()),
    )


@st.composite
def images(draw, least, largest):
    """A backbone's input, and how the backbone is run on it."""
    least_sides = draw(st.sampled_from([()] * 4 + [(0,), (1,), (0, 1)]))
    size = [
        n if axis in least_sides else draw(st.integers(n, max(n, largest)))
        for axis, n in enumerate(least)
    ]
    return dict(
        least=tuple(least),
        size=tuple(size),
        batch=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from(DTYPES)),
        memory=draw(st.sampled_from(LAYOUTS)),
        train=draw(st.booleans()),
        grad=draw(st.booleans()),
    )


@st.composite
def backbones(draw, archs=(), largest=300):
    """A BiFormer's arguments and its input."""
    grid = draw(GRIDS)
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    layout = draw(st.sampled_from(['conv', 'swin']))
    padding = draw(st.sampled_from([*PADDINGS, None]))
    if archs:
        arch = draw(st.sampled_from(archs))
        grid = draw(st.sampled_from([4, 7, 8]))
        rows = cols = grid
        layout = ARCHS[arch].get('layout', 'conv')
        own = ARCHS[arch].get('padding', 'input')
        stages, topks = 4, (1, 4, 16, None)
    else:
        stages = draw(st.integers(1, 4))
        most = rows * cols
        topks = draw(
            st.lists(
                st.one_of(st.none(), st.integers(1, min(most, 8)), st.just(most)),
                min_size=stages,
                max_size=stages,
            )
        )
        own = draw(st.sampled_from(PADDINGS))
        arch = dict(
            depths=(1,) * stages,
            embed_dims=(32, 64, 32, 64)[:stages],
            mlp_ratio=draw(st.sampled_from([1, 1.5])),
            topks=tuple(topks),
            layout=layout,
            lepe_source=draw(st.sampled_from(['input', 'value'])),
            padding=own,
        )
    stages, options = draw(common_options(stages))
    # The least sides, as the docstring of BiFormer states them.
    least = [1, 1] if layout == 'conv' else [2 ** (stages + 1)] * 2
    routed = [i for i, topk in enumerate(topks[:stages]) if topk]
    if (padding or own) == 'projected' and routed:
        stride = 2 ** (routed[-1] + 2)
        for i, n in enumerate((rows, cols)):
            least[i] = max(least[i], stride * (n - 1) + 1 if layout == 'conv' else stride * n)
    return dict(
        model=BiFormer,
        kwargs=dict(arch=arch, region_grid=grid, padding=padding, **options),
        layout=layout,
        **draw(images(least, largest)),
    )


@st.composite
def debiformers(draw, archs=(), largest=300, paddings=AGENT_PADDINGS):
    """A DeBiFormer's arguments and its input."""
    if archs:
        arch = draw(st.sampled_from(archs))
        grid = draw(st.sampled_from([7, 8, (7, 9)]))
        stages = 4
    else:
        grid = draw(GRIDS)
        regions = math.prod((grid, grid) if isinstance(grid, int) else grid)
        stages = draw(st.integers(1, 4))
        topk = st.one_of(st.integers(1, min(regions, 8)), st.just(regions))
        dims = (32, 64, 96, 64)[:stages]

        def each(values):
            return draw(st.tuples(*[values] * stages))

        arch = dict(
            depths=(1,) * stages,
            embed_dims=dims,
            mlp_ratios=each(st.sampled_from([1, 1.5])),
            agent_mlp_ratios=each(st.sampled_from([1, 1.5])),
            topks=each(st.one_of(st.none(), topk)),
            agent_topks=each(topk),
            groups=tuple(draw(st.sampled_from([1, dim // 32])) for dim in dims),
            # Finer than here, agents of a 300 px image would take gigabytes.
            strides=tuple(draw(st.integers(least, 9)) for least in (4, 2, 1, 1)[:stages]),
            offset_kernels=each(st.sampled_from([1, 3, 5, 9])),
            table_sizes=each(st.integers(2, 9)),
        )
    _, options = draw(common_options(stages))
    padding = draw(st.sampled_from(paddings))
    return dict(
        model=DeBiFormer,
        kwargs=dict(arch=arch, region_grid=grid, padding=padding, **options),
        layout='conv',
        **draw(images((1, 1), largest)),
    )


def check_backbone(case):
    # On CPUs with bfloat16 instructions, strided convolutions by oneDNN (PyTorch 2.11) are wrong in
    # output or gradient for some maps that become one token wide.
    with torch.backends.mkldnn.flags(enabled=case['dtype'] != torch.bfloat16):
        run_backbone(case)


def run_backbone(case):
    net = case['model'](**case['kwargs']).to(case['dtype']).train(case['train'])
    assert net.min_size == case['least']
    x = torch.randn(case['batch'], *case['size'], 3)
    x = laid_out(x.to(case['dtype']), case['memory']).permute(0, 3, 1, 2)
    for axis, least in enumerate(case['least']):
        small = x.narrow(2 + axis, 0, least - 1)
        with pytest.raises(ValueError, match=r'too small, this model needs at least'):
            net(small)
    x.requires_grad_(case['grad'])

    batch_norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    stages = len(net.stages)
    swin = case['layout'] == 'swin'
    sizes = [
        [n // 2 ** (i + 2) if swin else -(-n // 2 ** (i + 2)) for n in case['size']]
        for i in range(stages)
    ]
    if case['batch'] == 1 and any(m.training for m in batch_norms):
        # Statistics of one position alone: PyTorch says so itself.
        try:
            outs = net(x)
        except ValueError as error:
            assert 'Expected more than 1 value per channel when training' in str(error)
            assert sizes[-1] == [1, 1] or sizes[-2] == [1, 1]
            return
    else:
        outs = net(x)
    expected = [stages - 1] if case['kwargs']['final_norm'] else case['kwargs']['out_indices']
    assert len(outs) == len(expected)
    for out, i in zip(outs, expected, strict=True):
        assert out.dtype == case['dtype']
        assert [len(out), *out.shape[2:]] == [case['batch'], *sizes[i]]
        assert out.isfinite().all()
    loss = sum(out.float().square().mean() if len(out) else out.float().sum() for out in outs)
    if loss.requires_grad:
        loss.backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        if case['grad']:
            assert x.grad.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in net.buffers())

    if case['dtype'] == torch.float64 and case['batch']:
        check_backends(net.eval(), x.detach())


def check_backends(net, x):
    """Every backend gives the same maps, and an image does not depend on its batch."""
    with torch.no_grad():
        expected = net(x)
        alone = net(x[:1])
        for backend in BACKENDS:
            if BACKENDS[backend].why_not(x, x, x, 1) is not None:
                continue
            use_backend(net, backend)
            for a, b in zip(net(x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for a, b in zip(alone, expected, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-8, atol=1e-8)


@cases(30)
@given(backbones())
def test_backbone(case):
    check_backbone(case)


@pytest.mark.slow
@cases(400)
@given(backbones())
def test_more_backbones(case):
    check_backbone(case)


@cases(6)
@given(backbones(archs=['tiny', 'stl_nchw'], largest=64))
def test_released_arch(case):
    check_backbone(case)


@pytest.mark.slow
@cases(60)
@given(backbones(archs=[*ARCHS], largest=300))
def test_released_archs(case):
    check_backbone(case)


@cases(30)
@given(debiformers())
def test_debiformer(case):
    check_backbone(case)


@pytest.mark.slow
@cases(500)
@given(debiformers())
def test_more_debiformers(case):
    check_backbone(case)


@cases(2)
@given(debiformers(archs=['tiny'], largest=64))
def test_released_debiformer(case):
    check_backbone(case)


@pytest.mark.slow
@cases(30)
@given(debiformers(archs=[*debiformer.ARCHS]))
def test_released_debiformers(case):
    check_backbone(case)


def check_masked_debiformer(case, value):
    net = DeBiFormer(**case['kwargs']).double().eval()
    check_masked(net, torch.randn(case['batch'], 3, *case['size'], dtype=torch.float64), value)


@cases(10)
@given(debiformers(largest=100, paddings=['mask']), st.floats(-1e6, 1e6))
def test_debiformer_sees_no_masked_padding(case, value):
    """Whatever lies beyond the edges of its maps, in every layer at once."""
    check_masked_debiformer(case, value)


@pytest.mark.slow
@cases(60)
@given(debiformers(paddings=['mask']), st.floats(-1e6, 1e6))
def test_more_debiformers_see_no_masked_padding(case, value):
    check_masked_debiformer(case, value)


@cases(40)
@given(debiformers(), st.sampled_from(['topks', 'agent_topks']), st.integers(-2, 40))
def test_debiformer_top_k_beyond_the_regions(case, which, topk):
    """One message, when the model is built."""
    grid = case['kwargs']['region_grid']
    regions = math.prod((grid, grid) if isinstance(grid, int) else grid)
    topk = topk if topk < 1 else regions + topk
    arch = case['kwargs']['arch']
    arch = {**arch, which: (topk, *arch[which][1:])}
    with pytest.raises(ValueError, match=rf'topk={topk} does not fit the {regions} regions'):
        DeBiFormer(**{**case['kwargs'], 'arch': arch})


@pytest.mark.parametrize('shape', [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_no_images(shape):
    net = BiFormer(arch=dict(depths=(1,), embed_dims=(32,), mlp_ratio=1, topks=(1,)))
    with pytest.raises(ValueError, match=r'images must have the shape \(B, 3, H, W\), got'):
        net(torch.zeros(shape))
