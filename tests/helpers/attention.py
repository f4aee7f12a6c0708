"""Calls of the routed attention, and comparison with the reference."""

from dataclasses import dataclass

import torch

from mmbiformer.ops import route_regions, routed_attention


@dataclass
class Case:
    """One call; sizes are height and width in tokens."""

    query: tuple[int, int] = (8, 8)
    region: tuple[int, int] = (2, 2)
    key: tuple[int, int] | None = None  # the query's size
    key_region: tuple[int, int] | None = None
    topk: int = 3
    heads: int = 2
    head_dim: int = 8
    value_dim: int | None = None  # head_dim
    batch: int = 2
    hub: bool = False  # every region is routed to the first ones, none to the last

    def tensors(self, dtype=torch.float64):
        """Queries, keys, values and routes."""
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

# The same numbers, laid out in memory in another way; the axes are (B, ·, ·, ·).
LAYOUTS = {
    'contiguous': lambda x: x.contiguous(),
    'channels first': lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    'columns first': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    'every other': lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    'slice': lambda x: torch.cat([x + 1, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]],
    'offset': lambda x: torch.cat([x[:1], x])[1:] if len(x) else x,
    'unaligned': lambda x: torch.cat([x[..., :1], x], 3)[..., 1:],
}


def run(tensors, options, backend, cotangent=None, grad=(True, True, True)):
    """Output and gradients of those of query, key and value that want one, and the cotangent."""
    *maps, routes = tensors
    maps = [x.detach().requires_grad_(wanted) for x, wanted in zip(maps, grad, strict=True)]
    out = routed_attention(*maps, routes, **options, backend=backend)
    assert out.requires_grad == any(grad)
    if cotangent is None:
        cotangent = torch.randn_like(out)
    wanted = [x for x in maps if x.requires_grad]
    grads = torch.autograd.grad(out, wanted, cotangent.to(out.dtype)) if wanted else ()
    return [out, *grads], cotangent


def error(found, exact):
    """Length of the deviation, relative to the exact."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def check_budget(found, tensors, options, cotangent, least=0.0):
    """At most twice the error that the reference makes in the same precision.

    Errors are deviations from the reference in float64. The budget is at least twice ``least``.
    """
    *maps, routes = tensors
    exact, _ = run([*(x.double() for x in maps), routes], options, 'reference', cotangent)
    plain, _ = run([*maps, routes], options, 'reference', cotangent)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.numel():
            assert error(a, c) <= 2 * max(error(b, c), least)


def assert_close(found, expected, tolerance=1e-10):
    """Equal to so many digits, also relative to the largest numbers."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
