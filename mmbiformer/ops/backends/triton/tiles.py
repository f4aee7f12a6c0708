"""What the kernels share: which token of the map is meant, and how much a pair counts.

Rows and columns of a tile are numbered along a *listing*: the tokens of the listed regions, region
by region, or with ``ALL`` simply all tokens of the map. The tokens are then loaded from where they
lie, so that nothing is ever copied into regions.
"""

import triton
import triton.language as tl

# Compiled once for all values: maps and regions come in many sizes.
SIZES = (
    *('height', 'width', 'h', 'w', 'key_height', 'key_width', 'key_h', 'key_w'),
    *('topk', 'tiles', 'num_heads'),
)


@triton.jit
def split_program(tiles, regions, num_heads):
    """This program's image, region, tile and head; heads are next to one another in memory."""
    program = tl.program_id(0)
    head = program % num_heads
    program //= num_heads
    tile = program % tiles
    program //= tiles
    return (program // regions).to(tl.int64), program % regions, tile, head


@triton.jit
def quotient(n, d):
    """n // d for n up to 2**20, several times faster than division of integers."""
    return ((n.to(tl.float32) + 0.5) * (1.0 / d)).to(tl.int32)


@triton.jit
def listed_tokens(
    number, listing, length, height, width, h, w, ALL: tl.constexpr, RAGGED: tl.constexpr
):
    """Region, row and column on the map, and existence, of tokens numbered along a listing."""
    if ALL:
        slot = quotient(number, h * w)
        region = slot
    else:
        slot = number // (h * w)
        region = tl.load(listing + slot, mask=slot < length, other=0).to(tl.int32)
    y, x, exists = place_tokens(number - slot * (h * w), region, height, width, h, w, RAGGED)
    return region, y, x, exists & (slot < length)


@triton.jit
def own_tokens(
    number, region, regions, height, width, h, w, ALL: tl.constexpr, RAGGED: tl.constexpr
):
    """The same for tokens numbered in the program's own region, or with ``ALL`` in all of them."""
    offset = number
    if ALL:
        region = quotient(number, h * w)
        offset = number - region * (h * w)
    y, x, exists = place_tokens(offset, region, height, width, h, w, RAGGED)
    return region, y, x, exists & (offset < h * w) & (region < regions)


@triton.jit
def place_tokens(offset, region, height, width, h, w, RAGGED: tl.constexpr):
    """Row, column and whether that is on the map, of tokens numbered in their region."""
    columns = tl.cdiv(width, w)
    region_y = quotient(region, columns)
    token_y = quotient(offset, w)
    y = region_y * h + token_y
    x = (region - region_y * columns) * w + offset - token_y * w
    if RAGGED:
        return y, x, (y < height) & (x < width)
    return y, x, offset < h * w


@triton.jit
def load_tokens(
    base, y, x, exists, stride_y, stride_x, stride_c, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile (tokens, BLOCK) of one head; zero beyond the map and beyond DIM."""
    channel = tl.arange(0, BLOCK)
    offset = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    pointers = base + offset[:, None] + (channel * stride_c)[None, :]
    return tl.load(pointers, mask=exists[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def store_tokens(base, tile, y, x, exists, width, stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile (tokens, BLOCK) of one head into a contiguous map of ``stride`` channels."""
    channel = tl.arange(0, BLOCK)
    offset = (y.to(tl.int64) * width + x) * stride
    pointers = base + offset[:, None] + channel[None, :]
    mask = exists[:, None] & (channel < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def pair_counts(counts, row_region, column_region, row_exists, column_exists, stride, next_stride):
    """How often regions of columns are listed for regions of rows, or, transposed, the reverse."""
    pointers = counts + (row_region * stride)[:, None] + (column_region * next_stride)[None, :]
    return tl.load(pointers, mask=row_exists[:, None] & column_exists[None, :], other=0)
