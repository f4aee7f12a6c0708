"""Kernels over the routes alone: which regions are routed here, and how often."""

import triton
import triton.language as tl

from .tiles import place_tokens, quotient


@triton.jit(do_not_specialize=('regions', 'topk', 'key_regions'))
def invert_routes(routes, listing, starts, regions, topk, key_regions, BLOCK: tl.constexpr):
    """List for each key region the query regions routed to it, in order and with repetitions.

    One program runs for each image and key region, and one more past the last region. Key region r
    of an image owns ``listing[starts[r]:starts[r + 1]]``. Each program counts the entries before
    its own, so neither sorting nor atomics are needed.
    """
    image = (tl.program_id(0) // (key_regions + 1)).to(tl.int64)
    mine = tl.program_id(0) % (key_regions + 1)
    routes += image * regions * topk
    listing += image * regions * topk
    before = 0
    for start in range(0, regions * topk, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        region = tl.load(routes + entry, mask=entry < regions * topk, other=key_regions)
        before += tl.sum((region < mine).to(tl.int32))
    tl.store(starts + image * (key_regions + 1) + mine, before)
    for start in range(0, regions * topk, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        region = tl.load(routes + entry, mask=entry < regions * topk, other=key_regions)
        chosen = (region == mine) & (entry < regions * topk)
        rank = before + tl.cumsum(chosen.to(tl.int32)) - 1
        tl.store(listing + rank, entry // topk, mask=chosen)
        before += tl.sum(chosen.to(tl.int32))


@triton.jit(do_not_specialize=('topk', 'height', 'width', 'h', 'w', 'columns'))
def count_routes(
    routes,
    counts,
    topk,
    height,
    width,
    h,
    w,
    columns,
    per_token,
    per_w,
    per_column,
    BLOCK_ROUTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How often each token is listed for each query region, zero beyond the edge of the map.

    Tokens are numbered region by region. One program runs for each query region and BLOCK tokens.
    """
    program = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    number = start + tl.arange(0, BLOCK)
    token_region = quotient(number, per_token)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, topk, BLOCK_ROUTES):
        slot = first + tl.arange(0, BLOCK_ROUTES)
        region = tl.load(routes + program * topk + slot, mask=slot < topk, other=-1)
        count += tl.sum((region[:, None] == token_region[None, :]).to(tl.int32), 0)
    y, x = place_tokens(
        number - token_region * (h * w), token_region, h, w, columns, per_w, per_column
    )
    count = tl.where((y < height) & (x < width), count, 0)
    tl.store(counts + program * tl.num_programs(1) * BLOCK + number, count.to(tl.float16))
