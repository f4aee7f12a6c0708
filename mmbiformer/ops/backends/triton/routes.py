"""Kernels over the routes alone: who is routed here, and how often."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=('regions', 'topk', 'key_regions'))
def invert_routes(routes, listing, starts, regions, topk, key_regions, BLOCK: tl.constexpr):
    """List for each key region the query regions routed to it, in order and with repetitions.

    One program per image and key region, and one past the last. Key region r of an image owns
    ``listing[starts[r]:starts[r + 1]]``: what comes before is counted, so programs need neither
    sorting nor atomics.
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


@triton.jit(do_not_specialize=('regions', 'topk', 'key_regions'))
def count_routes(
    routes, counts, topk, key_regions, BLOCK_ROUTES: tl.constexpr, BLOCK_REGIONS: tl.constexpr
):
    """How often each key region is listed for each query region, one program per the latter."""
    program = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK_ROUTES)
    chosen = tl.load(routes + program * topk + slot, mask=slot < topk, other=-1)
    for start in range(0, key_regions, BLOCK_REGIONS):
        region = start + tl.arange(0, BLOCK_REGIONS)
        count = tl.sum((chosen[None, :] == region[:, None]).to(tl.int32), 1)
        tl.store(counts + program * key_regions + region, count, mask=region < key_regions)
