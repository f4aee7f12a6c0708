"""From tensors to launches: which way, which tiles, which grid."""

import contextlib
from collections.abc import Iterator, Sequence
from math import log, prod

import torch
import triton
from torch import Tensor

from ...regions import num_regions
from .backward import grad_of_key_and_value, grad_of_query
from .forward import attend
from .routes import count_routes, invert_routes

# By the side of a program's own tile: the other side, warps, and stages of loading ahead. The
# fastest of those timed on an H200 with 32 channels a head in bfloat16.
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend; for the arguments see :func:`mmbiformer.ops.routed_attention`.

    Returns:
        tuple[Tensor, Tensor]: Output (B, Hq, Wq, Cv), contiguous, and in float32 each row's largest
        logit and one over its sum of exponentials, (B, heads, 2, Hq * Wq).
    """
    batch, height, width, _ = query.shape
    call = Call(query, key, value, routes, num_heads, region_size, key_region_size, scale)
    with torch.cuda.device_of(query), unfilled_memory():
        out = query.new_empty(batch, height, width, value.shape[3])
        stats = query.new_empty(batch, num_heads, 2, height * width, dtype=torch.float32)
        tensors = query, key, value, call.routes, call.counts(), out, stats
        call.launch(attend, tensors, (query, key, value))
    return out, stats


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    stats: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, from those of :func:`forward`'s output."""
    call = Call(query, key, value, routes, num_heads, region_size, key_region_size, scale)
    maps = query, key, value, grad_out
    with torch.cuda.device_of(query), unfilled_memory():
        grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
        delta = torch.empty_like(stats[:, :, 0])
        counts = call.counts()
        if not call.one_pass:
            tensors = query, key, value, call.routes, counts, out, stats, grad_out, grads[0], delta
            call.launch(grad_of_query, tensors, maps)
        inverse = call.inverse()
        tensors = query, key, value, *inverse, counts, stats, delta, grad_out, *grads
        call.launch(grad_of_key_and_value, tensors, maps, ONE_PASS=call.one_pass)
    return grads


class Call:
    """One call's geometry and everything its launches share."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        routes: Tensor,
        num_heads: int,
        region_size: Sequence[int],
        key_region_size: Sequence[int],
        scale: float,
    ) -> None:
        self.routes = routes.contiguous()
        self.batch, self.regions, self.topk = routes.shape
        self.key_regions = prod(num_regions(key.shape[1:3], key_region_size))
        self.dims = query.shape[3] // num_heads, value.shape[3] // num_heads
        self.num_heads, self.scale = num_heads, scale
        self.element_size = query.element_size()
        columns = num_regions(query.shape[1:3], region_size)[1]
        key_columns = num_regions(key.shape[1:3], key_region_size)[1]
        self.key_sizes = *key.shape[1:3], *key_region_size, key_columns
        self.sizes = (
            *(*query.shape[1:3], *region_size, self.regions, columns),
            *(*key.shape[1:3], *key_region_size, self.key_regions, key_columns),
            self.topk,
        )
        self.ragged = not (divides(region_size, query) and divides(key_region_size, key))
        self.tokens, self.key_tokens = prod(region_size), prod(key_region_size)
        # Tensor cores take 16 rows: where regions hold fewer, the rest of a tile would be idle, and
        # it can be cheaper to let all tokens attend to all, by how often their regions are routed.
        cheaper = self.tokens < 16 and self.key_regions * self.tokens <= 16 * self.topk
        # Counts are in half precision, exact up to 2048.
        self.all = cheaper and self.topk <= 2048
        key_total = self.key_regions * self.key_tokens
        self.counted = triton.cdiv(key_total, COUNT_BLOCK) * COUNT_BLOCK if self.all else 0
        # Where all keys of a query are in one tile, one kernel makes all gradients.
        alone = self.tiling('grad_of_key_and_value')[1] == 1
        self.one_pass = self.topk == 1 and not self.all and alone

    def launch(
        self,
        kernel: triton.JITFunction,
        tensors: Sequence[Tensor],
        maps: Sequence[Tensor],
        **constants: bool,
    ) -> None:
        """Run a kernel with one program per tile of a query region, or key region, and head.

        Args:
            kernel: One of the attention kernels.
            tensors: Its tensors, in order.
            maps: The maps among them whose strides it takes.
            constants: Further constants of the kernel.
        """
        regions, tiles, meta = self.tiling(kernel.__name__)
        if self.batch:
            kernel[(regions * tiles * self.num_heads, self.batch)](
                *tensors,
                *(stride for x in maps for stride in x.stride()),
                *self.sizes,
                self.counted,
                tiles,
                self.num_heads,
                self.scale,
                self.scale / log(2),  # for exponentials to base 2, rounded once
                DIM=self.dims[0],
                VALUE_DIM=self.dims[1],
                BLOCK_DIM=padded(self.dims[0]),
                BLOCK_VALUE_DIM=padded(self.dims[1]),
                ALL=self.all,
                RAGGED=self.ragged,
                **constants,
                **meta,
            )

    def tiling(self, kernel: str) -> tuple[int, int, dict[str, int]]:
        """Regions of a launch, tiles of each, and the kernel's tile and how it is worked on."""
        by_query = kernel != 'grad_of_key_and_value'
        if self.all:
            regions = 1
            queries, keys = self.regions * self.tokens, self.key_regions * self.key_tokens
        elif by_query:
            regions, queries, keys = self.regions, self.tokens, self.topk * self.key_tokens
        else:  # queries: on average
            regions, queries, keys = self.key_regions, self.topk * self.tokens, self.key_tokens
        # Tiles must fit into registers: the wider a token's head, the fewer tokens, the more warps.
        # Float32 is multiplied without tensor cores, which takes twice as many.
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
        if one_tile:  # no running maximum, and nothing to load ahead
            columns, stages = 64, 1
        rows, columns = min(rows, most, padded(queries)), min(columns, most, padded(keys))
        meta = dict(
            BLOCK_ROWS=rows,
            BLOCK_COLUMNS=columns,
            num_warps=min(8, warps * wider),
            num_stages=stages,
        )
        meta['MASKED'] = self.ragged or keys % columns != 0
        if kernel == 'attend':
            meta['ONE_TILE'] = one_tile
        tiles = triton.cdiv(queries, rows) if by_query else triton.cdiv(keys, columns)
        return regions, tiles, meta

    def counts(self) -> Tensor:
        """How often each key is listed for each query region, (B, Rq, tokens in regions).

        Only needed, and only counted, where all tokens attend to all.
        """
        if not (self.all and self.batch):
            return self.routes
        shape = self.batch, self.regions, self.counted
        counts = torch.empty(shape, dtype=torch.float16, device=self.routes.device)
        count_routes[(self.batch * self.regions, self.counted // COUNT_BLOCK)](
            self.routes,
            counts,
            self.topk,
            *self.key_sizes,
            BLOCK_ROUTES=16,
            BLOCK=COUNT_BLOCK,
            num_warps=1,
        )
        return counts

    def inverse(self) -> tuple[Tensor, Tensor]:
        """Query regions by the key region they are routed to, and where each one's list starts.

        Only needed, and only made, where tokens do not all attend to all.
        """
        if self.all or not self.batch:
            return self.routes, self.routes
        listing = torch.empty_like(self.routes, dtype=torch.int32)
        shape = self.batch, self.key_regions + 1
        starts = torch.empty(shape, dtype=torch.int32, device=self.routes.device)
        block = min(1024, triton.next_power_of_2(self.regions * self.topk))
        invert_routes[(self.batch * (self.key_regions + 1),)](
            self.routes,
            listing,
            starts,
            self.regions,
            self.topk,
            self.key_regions,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
        return listing, starts


def divides(region_size: Sequence[int], x: Tensor) -> bool:
    """Whether all regions of a map are whole."""
    return x.shape[1] % region_size[0] == 0 and x.shape[2] % region_size[1] == 0


def padded(n: int) -> int:
    """The next power of two that tensor cores take as the side of a tile."""
    return max(16, triton.next_power_of_2(n))


@contextlib.contextmanager
def unfilled_memory() -> Iterator[None]:
    """Leave new tensors as they are in deterministic mode, where PyTorch fills them with NaN.

    The kernels write all of what they return; filling it first would cost as much again.
    """
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
