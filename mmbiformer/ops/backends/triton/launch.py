"""From tensors to launches: which kernels, which tiles, which grid."""

import functools
from collections.abc import Sequence
from math import log, prod

import torch
import triton
from torch import Tensor

from ...regions import num_regions
from ...settings import Settings
from . import LARGEST_IMAGE, span, too_far
from .backward import grad_of_key_and_value, grad_of_query
from .forward import attend
from .routes import count_routes, invert_routes

# For each side of a program's own tile: the other side, warps, and pipeline stages. These were the
# fastest on an H200 with 32 channels a head in bfloat16.
TILES = dict(
    attend={16: (64, 1, 2), 32: (64, 1, 2), 64: (32, 4, 2)},
    grad_of_query={16: (16, 1, 2), 32: (64, 2, 2), 64: (32, 4, 2)},
    grad_of_key_and_value={16: (16, 1, 2), 32: (32, 1, 2), 64: (64, 4, 2)},
)
# Where all tokens attend to all: both sides, warps and stages.
TILES_OF_ALL = dict(
    attend=(128, 32, 4, 3), grad_of_query=(64, 32, 4, 3), grad_of_key_and_value=(32, 32, 1, 2)
)
COUNT_BLOCK = 128


def forward(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """See :func:`mmbiformer.ops.schema.fused_attention`."""
    batch, height, width, _ = query.shape
    if reason := too_far(query, key, value):  # a graph may have been compiled for smaller ones
        raise RuntimeError(f'the fused attention cannot run: {reason}')
    plan = plan_of(query, key, value, routes, settings)
    with torch.cuda.device_of(query):
        routes = routes.contiguous()
        out = query.new_empty(batch, height, width, value.shape[3])
        stats = query.new_empty(batch, settings.num_heads, 2, height * width, dtype=torch.float32)
        tensors = query, key, value, routes, plan.counts(routes), out, stats
        plan.launch(attend, tensors, (query, key, value))
    return out, stats


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    stats: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mmbiformer.ops.schema.fused_attention_backward`."""
    plan = plan_of(query, key, value, routes, settings)
    if span(grad_out) > LARGEST_IMAGE:
        grad_out = grad_out.contiguous()
    maps = query, key, value, grad_out
    with torch.cuda.device_of(query):
        routes = routes.contiguous()
        grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
        delta = torch.empty_like(stats[:, :, 0])
        counts = plan.counts(routes)
        if not plan.one_pass:
            tensors = query, key, value, routes, counts, out, stats, grad_out, grads[0], delta
            plan.launch(grad_of_query, tensors, maps)
        inverse = plan.inverse(routes)
        tensors = query, key, value, *inverse, counts, stats, delta, grad_out, *grads
        plan.launch(grad_of_key_and_value, tensors, maps)
    return grads


def plan_of(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, settings: Settings
) -> 'Plan':
    """The plan of a call, made once for each geometry: making it takes longer than a launch."""
    shapes = query.shape, key.shape, value.shape, routes.shape
    return _cached_plan(*shapes, query.element_size(), settings)


class Plan:
    """The geometry of a call, and how each kernel works on it.

    Args:
        query: Shape of the queries, (B, Hq, Wq, C).
        key: Shape of the keys, (B, Hk, Wk, C).
        value: Shape of the values, (B, Hk, Wk, Cv).
        routes: Shape of the routes, (B, Rq, k).
        element_size: Bytes of a number in the maps.
        settings: Heads, region sizes and scale.
    """

    def __init__(
        self,
        query: torch.Size,
        key: torch.Size,
        value: torch.Size,
        routes: torch.Size,
        element_size: int,
        settings: Settings,
    ) -> None:
        self.num_heads, region_size, key_region_size, scale = settings
        self.batch, self.regions, self.topk = routes
        self.key_regions = prod(num_regions(key[1:3], key_region_size))
        self.dims = query[3] // self.num_heads, value[3] // self.num_heads
        self.scales = scale, scale / log(2)  # for exponentials to base 2, rounded once
        self.element_size = element_size
        columns = num_regions(query[1:3], region_size)[1]
        key_columns = num_regions(key[1:3], key_region_size)[1]
        self.key_sizes = *key[1:3], *key_region_size, key_columns
        self.key_inverses = inverses(key_region_size, key_columns)
        self.inverses = *inverses(region_size, columns), *self.key_inverses
        self.sizes = (
            *(*query[1:3], *region_size, self.regions, columns),
            *(*key[1:3], *key_region_size, self.key_regions, key_columns),
            self.topk,
        )
        self.ragged = not (divides(region_size, query) and divides(key_region_size, key))
        self.tokens, self.key_tokens = prod(region_size), prod(key_region_size)
        # Tensor cores take 16 rows. If regions hold fewer, the rest of a tile would be idle, and it
        # can be cheaper to let all tokens attend to all, weighted by how often they are routed.
        cheaper = self.tokens < 16 and self.key_regions * self.tokens <= 16 * self.topk
        # Counts are in half precision, exact up to 2048.
        self.all = cheaper and self.topk <= 2048
        key_total = self.key_regions * self.key_tokens
        self.counted = triton.cdiv(key_total, COUNT_BLOCK) * COUNT_BLOCK if self.all else 0
        names = 'attend', 'grad_of_query', 'grad_of_key_and_value'
        self.tilings = {name: self.tiling(name) for name in names}
        # If one tile holds all keys of a query, one kernel computes all gradients.
        _, tiles, constants = self.tilings['grad_of_key_and_value']
        self.one_pass = self.topk == 1 and not self.all and tiles == 1
        constants['ONE_PASS'] = self.one_pass

    def launch(
        self, kernel: triton.JITFunction, tensors: Sequence[Tensor], maps: Sequence[Tensor]
    ) -> None:
        """Run a kernel with one program per tile of a query region, or key region, and head.

        Args:
            kernel: One of the attention kernels.
            tensors: Its tensors, in order.
            maps: The maps among the tensors whose strides it takes.
        """
        regions, tiles, constants = self.tilings[kernel.__name__]
        if self.batch:
            kernel[(regions * tiles * self.num_heads, self.batch)](
                *tensors,
                *(stride for x in maps for stride in x.stride()),
                *self.sizes,
                self.counted,
                tiles,
                *self.inverses,
                *self.scales,
                **constants,
            )

    def tiling(self, kernel: str) -> tuple[int, int, dict[str, int]]:
        """Regions of a launch, tiles of each, and the kernel's constants."""
        by_query = kernel != 'grad_of_key_and_value'
        if self.all:
            regions = 1
            queries, keys = self.regions * self.tokens, self.key_regions * self.key_tokens
        elif by_query:
            regions, queries, keys = self.regions, self.tokens, self.topk * self.key_tokens
        else:  # queries: on average
            regions, queries, keys = self.key_regions, self.topk * self.tokens, self.key_tokens
        # Tiles must fit into registers: wider heads mean fewer tokens and more warps. Float32 is
        # multiplied without tensor cores, which takes twice as many warps.
        wider = max(1, padded(max(self.dims)) * self.element_size // 64)
        wider *= self.element_size // 2
        most = max(32, 128 // wider)
        if self.all:
            rows, columns, warps, stages = TILES_OF_ALL[kernel]
        else:
            own = min(padded(queries if by_query else keys), 64, most)
            other, warps, stages = TILES[kernel][own]
            rows, columns = (own, other) if by_query else (other, own)
        one_tile = kernel == 'attend' and keys <= min(64, most)
        if one_tile:  # needs no running maximum and nothing loaded ahead
            columns, stages = 64, 1
        rows, columns = min(rows, most, padded(queries)), min(columns, most, padded(keys))
        # If each tile along the list holds exactly one region, the region is looked up once.
        one_region = columns == self.key_tokens if by_query else rows == self.tokens
        one_region &= not self.all
        constants = dict(
            HEADS=self.num_heads,
            DIM=self.dims[0],
            VALUE_DIM=self.dims[1],
            BLOCK_DIM=padded(self.dims[0]),
            BLOCK_VALUE_DIM=padded(self.dims[1]),
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
            ALL=self.all,
            RAGGED=self.ragged,
            ROWS_MASKED=self.ragged or (queries if self.all else self.tokens) % rows != 0,
            MASKED=self.ragged or keys % columns != 0,
            ONE_REGION=one_region,
            num_warps=min(8, warps * wider),
            num_stages=stages,
        )
        if kernel == 'attend':
            constants['ONE_TILE'] = one_tile
        tiles = triton.cdiv(queries, rows) if by_query else triton.cdiv(keys, columns)
        return regions, tiles, constants

    def counts(self, routes: Tensor) -> Tensor:
        """How often each key is listed for each query region, (B, Rq, tokens in regions).

        Counted only if all tokens attend to all; nothing else needs it.
        """
        if not (self.all and self.batch):
            return routes
        shape = self.batch, self.regions, self.counted
        counts = torch.empty(shape, dtype=torch.float16, device=routes.device)
        count_routes[(self.batch * self.regions, self.counted // COUNT_BLOCK)](
            routes,
            counts,
            self.topk,
            *self.key_sizes,
            *self.key_inverses,
            BLOCK_ROUTES=16,
            BLOCK=COUNT_BLOCK,
            num_warps=1,
        )
        return counts

    def inverse(self, routes: Tensor) -> tuple[Tensor, Tensor]:
        """Query regions by the key region they are routed to, and the start of each region's list.

        Made unless all tokens attend to all, which does not need it.
        """
        if self.all or not self.batch:
            return routes, routes
        listing = torch.empty_like(routes, dtype=torch.int32)
        shape = self.batch, self.key_regions + 1
        starts = torch.empty(shape, dtype=torch.int32, device=routes.device)
        block = min(1024, triton.next_power_of_2(self.regions * self.topk))
        invert_routes[(self.batch * (self.key_regions + 1),)](
            routes,
            listing,
            starts,
            self.regions,
            self.topk,
            self.key_regions,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
        return listing, starts


_cached_plan = functools.lru_cache(maxsize=1024)(Plan)


def divides(region_size: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether all regions of a map (B, H, W, C) are whole."""
    return shape[1] % region_size[0] == 0 and shape[2] % region_size[1] == 0


def inverses(region_size: Sequence[int], columns: int) -> tuple[float, float, float]:
    """One over each of: a region's tokens, its width, the number of regions in a row."""
    return 1 / prod(region_size), 1 / region_size[1], 1 / columns


def padded(n: int) -> int:
    """The next power of two, at least the 16 that tensor cores take as the side of a tile."""
    return max(16, triton.next_power_of_2(n))
