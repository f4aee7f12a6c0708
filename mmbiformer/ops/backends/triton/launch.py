"""From tensors to launches: which way, which tiles, which grid."""

from collections.abc import Sequence
from math import log, prod

import torch
import triton
from torch import Tensor

from ...regions import num_regions
from .backward import grad_of_key_and_value, grad_of_query
from .forward import attend
from .routes import count_routes, invert_routes


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
        tuple[Tensor, Tensor]: Output (B, Hq, Wq, Cv), contiguous, and the float32 logarithms to
        base 2 of the softmax's denominators, (B, heads, Hq * Wq).
    """
    batch, height, width, _ = query.shape
    out = query.new_empty(batch, height, width, value.shape[3])
    lse = query.new_empty(batch, num_heads, height * width, dtype=torch.float32)
    call = Call(query, key, value, routes, num_heads, region_size, key_region_size, scale)
    with torch.cuda.device_of(query):
        tensors = query, key, value, call.routes, call.counts(), out, lse
        call.launch(attend, tensors, (query, key, value), by_query=True)
    return out, lse


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    routes: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    region_size: Sequence[int],
    key_region_size: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, from those of :func:`forward`'s output."""
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    delta = torch.empty_like(lse)
    call = Call(query, key, value, routes, num_heads, region_size, key_region_size, scale)
    maps = query, key, value, grad_out
    with torch.cuda.device_of(query):
        counts = call.counts()
        if not call.one_pass:
            tensors = query, key, value, call.routes, counts, out, lse, grad_out, grads[0], delta
            call.launch(grad_of_query, tensors, maps, by_query=True)
        inverse = call.inverse()
        tensors = query, key, value, *inverse, counts, out, lse, delta, grad_out, *grads
        call.launch(grad_of_key_and_value, tensors, maps, by_query=False, ONE_PASS=call.one_pass)
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
        self.sizes = *query.shape[1:3], *region_size, *key.shape[1:3], *key_region_size, self.topk
        self.ragged = not (divides(region_size, query) and divides(key_region_size, key))
        self.tokens, self.key_tokens = prod(region_size), prod(key_region_size)
        # Tensor cores take 16 rows: where regions hold fewer, the rest of a tile would be idle, and
        # it can be cheaper to let all tokens attend to all, by how often their regions are routed.
        idle = max(16, self.tokens) / self.tokens
        self.all = self.key_regions <= self.topk * idle
        # Where all keys of a query are in one tile, one kernel makes all gradients.
        self.one_pass = self.topk == 1 and not self.all and self.tiling(by_query=False)[1] == 1

    def launch(
        self,
        kernel: triton.JITFunction,
        tensors: Sequence[Tensor],
        maps: Sequence[Tensor],
        by_query: bool,
        **constants: bool,
    ) -> None:
        """Run a kernel with one program per tile of a query region, or key region, and head.

        Args:
            kernel: One of the attention kernels.
            tensors: Its tensors, in order.
            maps: The maps among them whose strides it takes.
            by_query: Whether programs go by query region.
            constants: Further constants of the kernel.
        """
        regions, tiles, meta = self.tiling(by_query)
        if self.batch:
            kernel[(self.batch * regions * tiles * self.num_heads,)](
                *tensors,
                *(stride for x in maps for stride in x.stride()),
                *self.sizes,
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

    def tiling(self, by_query: bool) -> tuple[int, int, dict[str, int]]:
        """Regions of a launch, tiles of each, and the kernel's tile and how many warps share it."""
        if self.all:
            regions = 1
            queries, keys = self.regions * self.tokens, self.key_regions * self.key_tokens
        elif by_query:
            regions, queries, keys = self.regions, self.tokens, self.topk * self.key_tokens
        else:  # queries: on average
            regions, queries, keys = self.key_regions, self.topk * self.tokens, self.key_tokens
        largest = 64 if max(self.dims) * self.element_size <= 128 else 32
        rows, columns = (min(padded(n), largest) for n in (queries, keys))
        if self.all and not by_query:
            # Counts take registers: with 64 columns they spill on compute capability 8.0.
            columns = min(columns, 32)
        tiles = triton.cdiv(queries, rows) if by_query else triton.cdiv(keys, columns)
        warps = 4 if rows == 64 else 2
        meta = dict(BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, num_warps=warps, num_stages=2)
        return regions, tiles, meta

    def counts(self) -> Tensor:
        """How often each key region is listed for each query region, (B, Rq, Rk).

        Only needed, and only counted, where all tokens attend to all.
        """
        if not (self.all and self.batch):
            return self.routes
        shape = self.batch, self.regions, self.key_regions
        counts = torch.empty(shape, dtype=torch.int32, device=self.routes.device)
        count_routes[(self.batch * self.regions,)](
            self.routes,
            counts,
            self.topk,
            self.key_regions,
            BLOCK_ROUTES=triton.next_power_of_2(self.topk),
            BLOCK_REGIONS=64,
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
        invert_routes[(self.batch * (self.key_regions + 1),)](
            self.routes,
            listing,
            starts,
            self.regions,
            self.topk,
            self.key_regions,
            BLOCK=min(1024, triton.next_power_of_2(self.regions * self.topk)),
        )
        return listing, starts


def divides(region_size: Sequence[int], x: Tensor) -> bool:
    """Whether all regions of a map are whole."""
    return x.shape[1] % region_size[0] == 0 and x.shape[2] % region_size[1] == 0


def padded(n: int) -> int:
    """The next power of two that tensor cores take as the side of a tile."""
    return max(16, triton.next_power_of_2(n))
