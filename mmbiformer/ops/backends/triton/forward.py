"""The forward kernel: one program for each tile of a query region and each head."""

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    add_product,
    listed_tokens,
    load_counts,
    load_tokens,
    own_tokens,
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
    stats,
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
    regions,
    columns,
    key_height,
    key_width,
    key_h,
    key_w,
    key_regions,
    key_columns,
    topk,
    counted,
    tiles,
    per_token,
    per_w,
    per_column,
    per_key_token,
    per_key_w,
    per_key_column,
    scale,
    scale_log2,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ALL: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS_MASKED: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_REGION: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Softmax over the routed tokens, tile by tile; with ``ALL`` over all tokens, by counts.

    ``stats``, (B, heads, 2, H * W), gets the largest logit, to base 2, and one over the sum of the
    exponentials relative to it. A single log-sum-exp would lose digits if logits are large.
    """
    image, region, tile, head = split_program(tiles, HEADS)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    listing = routes + (image * regions + region) * topk

    row_region, y, x, exists = own_tokens(
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
        BLOCK_ROWS,
        ALL,
        RAGGED,
        ROWS_MASKED,
    )
    counts += image * regions * counted
    out += image * height * width * HEADS * VALUE_DIM + head * VALUE_DIM
    stats += (image * HEADS + head) * 2 * height * width
    length = key_regions if ALL else topk
    q = load_tokens(query, y * query_y + x * query_x, exists, query_c, DIM, BLOCK_DIM)
    top = tl.full([BLOCK_ROWS], float('-inf'), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE_DIM], tl.float32)
    for start in range(0, BLOCK_COLUMNS if ONE_TILE else length * key_h * key_w, BLOCK_COLUMNS):
        _, ky, kx, listed = listed_tokens(
            start,
            listing,
            length,
            key_height,
            key_width,
            key_h,
            key_w,
            key_columns,
            per_key_token,
            per_key_w,
            per_key_column,
            BLOCK_COLUMNS,
            ALL,
            RAGGED,
            MASKED,
            ONE_REGION,
        )
        k = load_tokens(key, ky * key_y + kx * key_x, listed, key_c, DIM, BLOCK_DIM)
        v = load_tokens(
            value, ky * value_y + kx * value_x, listed, value_c, VALUE_DIM, BLOCK_VALUE_DIM
        )
        logits = tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2
        if ALL:
            count = load_counts(counts, row_region, exists, start, counted, BLOCK_COLUMNS)
            logits = tl.where(count > 0, logits, float('-inf'))
        elif MASKED:
            logits = tl.where(listed[None, :], logits, float('-inf'))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A row may have no key in a tile, and -inf - -inf would be NaN.
        finite_top = tl.where(new_top == float('-inf'), 0.0, new_top)
        p = tl.exp2(logits - finite_top[:, None])
        if ALL:
            p *= count
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(p, 1)
        acc = add_product(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top

    share = 1.0 / total
    acc *= share[:, None]
    channels = HEADS * VALUE_DIM
    store_tokens(out, acc, y, x, exists, width, channels, VALUE_DIM, BLOCK_VALUE_DIM)
    tl.store(stats + y * width + x, top, mask=exists)
    tl.store(stats + (height + y) * width + x, share, mask=exists)
