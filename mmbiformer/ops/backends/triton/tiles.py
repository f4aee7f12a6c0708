"""Shared by the kernels: which token of the map is meant, and how much a pair counts.

Rows and columns of a tile are numbered along a *listing*: the tokens of the listed regions, region
by region, or with ``ALL`` all tokens of the map. The tokens are loaded in place, and never copied
into regions.

``per_token``, ``per_w`` and ``per_column`` are one over a region's tokens, over its width and over
the number of regions side by side.
"""

import triton
import triton.language as tl

# Kernels are compiled once for all values of these: maps and regions come in many sizes.
SIZES = (
    *('height', 'width', 'h', 'w', 'regions', 'columns'),
    *('key_height', 'key_width', 'key_h', 'key_w', 'key_regions', 'key_columns'),
    'topk',
)


@triton.jit
def split_program(tiles, HEADS: tl.constexpr):
    """This program's image, region, tile and head; the heads of a token are adjacent in memory."""
    program = tl.program_id(0)
    head = program % HEADS
    program //= HEADS
    return tl.program_id(1).to(tl.int64), program // tiles, program % tiles, head


@triton.jit
def quotient(n, inverse):
    """n // d for n up to 2**20, from 1 / d: several times faster than integer division."""
    return ((n.to(tl.float32) + 0.5) * inverse).to(tl.int32)


@triton.jit
def listed_tokens(
    start,
    listing,
    length,
    height,
    width,
    h,
    w,
    columns,
    per_token,
    per_w,
    per_column,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_REGION: tl.constexpr,
):
    """Region, row, column and existence of BLOCK tokens from ``start`` on.

    With ``ONE_REGION`` they are exactly the tokens of one region.
    """
    if ONE_REGION:
        region = tl.load(listing + start // BLOCK).to(tl.int32)
        offset = tl.arange(0, BLOCK)
    else:
        tokens = h * w
        first = start // tokens
        number = start - first * tokens + tl.arange(0, BLOCK)
        slot = quotient(number, per_token)
        region = first + slot
        offset = number - slot * tokens
    # Only this is computed twice if a mask of logits has another layout.
    exists = tl.full([BLOCK], True, tl.int1)
    if MASKED and not ONE_REGION:
        exists = tl.arange(0, BLOCK) < length * tokens - start
    if not (ALL or ONE_REGION):
        region = tl.load(listing + region, mask=exists, other=0).to(tl.int32)
    y, x = place_tokens(offset, region, h, w, columns, per_w, per_column)
    if RAGGED:
        exists = exists & (y < height) & (x < width)
    return region, y, x, exists


@triton.jit
def own_tokens(
    tile,
    region,
    regions,
    height,
    width,
    h,
    w,
    columns,
    per_token,
    per_w,
    per_column,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The same for a tile of the program's own region, or with ``ALL`` of all regions."""
    number = tile * BLOCK + tl.arange(0, BLOCK)
    offset = number
    exists = tl.full([BLOCK], True, tl.int1)
    if MASKED:
        exists = number < (regions * h * w if ALL else h * w)
    if ALL:
        region = quotient(number, per_token)
        offset = number - region * (h * w)
    y, x = place_tokens(offset, region, h, w, columns, per_w, per_column)
    if RAGGED:
        exists = exists & (y < height) & (x < width)
    return region, y, x, exists


@triton.jit
def place_tokens(offset, region, h, w, columns, per_w, per_column):
    """Row and column on the map of tokens given by region, and by number in their region."""
    region_y = quotient(region, per_column)
    token_y = quotient(offset, per_w)
    return region_y * h + token_y, (region - region_y * columns) * w + offset - token_y * w


@triton.jit
def load_tokens(base, offset, exists, stride_c, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A tile (tokens, BLOCK) of one head, with zeros beyond the map and beyond DIM."""
    channel = tl.arange(0, BLOCK)
    pointers = base + (offset[:, None] + (channel * stride_c)[None, :])
    return tl.load(pointers, mask=tile_mask(exists, DIM, BLOCK), other=0.0)


@triton.jit
def tile_mask(exists, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK): which tokens and channels exist."""
    mask = exists[:, None]
    if DIM < BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < DIM)[None, :]
    return mask


@triton.jit
def store_tokens(base, tile, y, x, exists, width, stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile (tokens, BLOCK) of one head into a contiguous map of ``stride`` channels."""
    channel = tl.arange(0, BLOCK)
    offset = (y * width + x) * stride
    pointers = base + (offset[:, None] + channel[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=tile_mask(exists, DIM, BLOCK))


@triton.jit
def load_counts(counts, region, exists, start, stride, BLOCK: tl.constexpr):
    """(tokens, BLOCK): how often keys from ``start`` on are listed for the queries' regions."""
    column = start + tl.arange(0, BLOCK)
    pointers = counts + (region * stride)[:, None] + column[None, :]
    return tl.load(pointers, mask=exists[:, None], other=0.0).to(tl.float32)


@triton.jit
def add_product(a, b, total):
    """total + a @ b, in float32.

    In float32 each tile's product is summed on its own: one running sum over all tiles would lose
    digits if thousands of queries attend to a region. The product starts from ``total * 0.0``
    because Triton would fuse a product that starts from a constant zero with the sum after it.
    """
    if a.dtype == tl.float32:
        total += tl.dot(a, b, total * 0.0, input_precision='ieee')
    else:
        total = tl.dot(a, b, total)
    return total
