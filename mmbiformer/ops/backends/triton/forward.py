"""The forward kernel: one program attends for one tile of a query region and one head."""

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    listed_tokens,
    load_tokens,
    own_tokens,
    pair_counts,
    split_program,
    store_tokens,
)


@triton.jit(do_not_specialize=SIZES)
def attend(
    query,
    key,
    value,
    routes,
    counts,
    out,
    lse,
    query_b,
    query_y,
    query_x,
    query_c,
    key_b,
    key_y,
    key_x,
    key_c,
    value_b,
    value_y,
    value_x,
    value_c,
    height,
    width,
    h,
    w,
    key_height,
    key_width,
    key_h,
    key_w,
    topk,
    tiles,
    num_heads,
    scale,
    scale_log2,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALL: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Softmax over the routed tokens, tile by tile; ``ALL`` goes over all tokens, by counts.

    ``lse`` gets the logarithm to base 2 of the sum of the exponentials, (B, heads, H * W).
    """
    regions = tl.cdiv(height, h) * tl.cdiv(width, w)
    key_regions = tl.cdiv(key_height, key_h) * tl.cdiv(key_width, key_w)
    image, region, tile, head = split_program(tiles, 1 if ALL else regions, num_heads)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    listing = routes + (image * regions + region) * topk
    counts += image * regions * key_regions

    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_region, y, x, exists = own_tokens(row, region, regions, height, width, h, w, ALL, RAGGED)
    q = load_tokens(query, y, x, exists, query_y, query_x, query_c, DIM, BLOCK_DIM)

    top = tl.full([BLOCK_ROWS], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    length = key_regions if ALL else topk
    for start in range(0, length * key_h * key_w, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        column_region, ky, kx, listed = listed_tokens(
            column, listing, length, key_height, key_width, key_h, key_w, ALL, RAGGED
        )
        k = load_tokens(key, ky, kx, listed, key_y, key_x, key_c, DIM, BLOCK_DIM)
        v = load_tokens(
            value, ky, kx, listed, value_y, value_x, value_c, VALUE_DIM, BLOCK_VALUE_DIM
        )
        logits = tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2
        if ALL:
            count = pair_counts(counts, row_region, column_region, exists, listed, key_regions, 1)
            logits = tl.where(count > 0, logits, float('-inf'))
        else:
            logits = tl.where(listed[None, :], logits, float('-inf'))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A tile may hold nothing for a row; -inf - -inf would be NaN.
        finite_top = tl.where(new_top == float('-inf'), 0.0, new_top)
        p = tl.exp2(logits - finite_top[:, None])
        if ALL:
            p *= count
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision='ieee')
        top = new_top

    store_tokens(
        out + image * height * width * num_heads * VALUE_DIM + head * VALUE_DIM,
        acc / total[:, None],
        y,
        x,
        exists,
        width,
        num_heads * VALUE_DIM,
        VALUE_DIM,
        BLOCK_VALUE_DIM,
    )
    lse += (image * num_heads + head) * height * width
    tl.store(lse + y * width + x, top + tl.log2(total), mask=exists)
