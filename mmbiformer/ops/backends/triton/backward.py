"""The backward kernels: gradients by query region and by key region, without atomics.

Probabilities are recomputed from the logarithm of their sum. With p = softmax(logits) and
``delta`` = sum(out * grad_out), the gradient of the logits is p * (grad_out @ v.T - delta).
"""

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
def grad_of_query(
    query,
    key,
    value,
    routes,
    counts,
    out,
    lse,
    grad_out,
    grad_query,
    delta,
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
    grad_b,
    grad_y,
    grad_x,
    grad_c,
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
    """One program per tile of a query region and head, as forward; also writes ``delta``."""
    regions = tl.cdiv(height, h) * tl.cdiv(width, w)
    key_regions = tl.cdiv(key_height, key_h) * tl.cdiv(key_width, key_w)
    image, region, tile, head = split_program(tiles, 1 if ALL else regions, num_heads)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    grad_out += image * grad_b + head * VALUE_DIM * grad_c
    channels = num_heads * VALUE_DIM
    out += image * height * width * channels + head * VALUE_DIM
    lse += (image * num_heads + head) * height * width
    delta += (image * num_heads + head) * height * width
    listing = routes + (image * regions + region) * topk
    counts += image * regions * key_regions

    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_region, y, x, exists = own_tokens(row, region, regions, height, width, h, w, ALL, RAGGED)
    q = load_tokens(query, y, x, exists, query_y, query_x, query_c, DIM, BLOCK_DIM)
    do = load_tokens(grad_out, y, x, exists, grad_y, grad_x, grad_c, VALUE_DIM, BLOCK_VALUE_DIM)
    o = load_tokens(out, y, x, exists, width * channels, channels, 1, VALUE_DIM, BLOCK_VALUE_DIM)
    row_lse = tl.load(lse + y * width + x, mask=exists, other=0.0)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + y * width + x, row_delta, mask=exists)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
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
        # Masked before the exponential, which could overflow where it does not count.
        if ALL:
            count = pair_counts(counts, row_region, column_region, exists, listed, key_regions, 1)
            logits = tl.where(count > 0, logits, float('-inf'))
            p = tl.exp2(logits - row_lse[:, None]) * count
        else:
            logits = tl.where(listed[None, :], logits, float('-inf'))
            p = tl.exp2(logits - row_lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision='ieee')
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision='ieee')

    channels = num_heads * DIM
    grad_query += image * height * width * channels + head * DIM
    store_tokens(grad_query, acc * scale, y, x, exists, width, channels, DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=SIZES)
def grad_of_key_and_value(
    query,
    key,
    value,
    listing,
    starts,
    counts,
    out,
    lse,
    delta,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
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
    grad_b,
    grad_y,
    grad_x,
    grad_c,
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
    ONE_PASS: tl.constexpr,
):
    """One program per tile of a key region and head; its columns are keys, rows the queries.

    A region that nobody is routed to gets zeros. With ``ONE_PASS`` every query meets all its keys
    right here, and its gradient is written too.
    """
    regions = tl.cdiv(height, h) * tl.cdiv(width, w)
    key_regions = tl.cdiv(key_height, key_h) * tl.cdiv(key_width, key_w)
    image, region, tile, head = split_program(tiles, 1 if ALL else key_regions, num_heads)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    grad_out += image * grad_b + head * VALUE_DIM * grad_c
    lse += (image * num_heads + head) * height * width
    delta += (image * num_heads + head) * height * width
    counts += image * regions * key_regions
    value_channels = num_heads * VALUE_DIM
    out += image * height * width * value_channels + head * VALUE_DIM
    channels = num_heads * DIM
    grad_query += image * height * width * channels + head * DIM

    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_region, ky, kx, exists = own_tokens(
        column, region, key_regions, key_height, key_width, key_h, key_w, ALL, RAGGED
    )
    k = load_tokens(key, ky, kx, exists, key_y, key_x, key_c, DIM, BLOCK_DIM)
    v = load_tokens(value, ky, kx, exists, value_y, value_x, value_c, VALUE_DIM, BLOCK_VALUE_DIM)

    dk = tl.zeros([BLOCK_COLUMNS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK_COLUMNS, BLOCK_VALUE_DIM], tl.float32)
    if ALL:
        length = regions
    else:
        starts += image * (key_regions + 1) + region
        first = tl.load(starts)
        length = tl.load(starts + 1) - first
        listing += image * regions * topk + first
    for start in range(0, length * h * w, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_region, y, x, listed = listed_tokens(
            row, listing, length, height, width, h, w, ALL, RAGGED
        )
        q = load_tokens(query, y, x, listed, query_y, query_x, query_c, DIM, BLOCK_DIM)
        do = load_tokens(grad_out, y, x, listed, grad_y, grad_x, grad_c, VALUE_DIM, BLOCK_VALUE_DIM)
        row_lse = tl.load(lse + y * width + x, mask=listed, other=0.0)
        if ONE_PASS:
            o = load_tokens(
                out,
                y,
                x,
                listed,
                width * value_channels,
                value_channels,
                1,
                VALUE_DIM,
                BLOCK_VALUE_DIM,
            )
            row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        else:
            row_delta = tl.load(delta + y * width + x, mask=listed, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2
        if ALL:
            count = pair_counts(counts, row_region, column_region, listed, exists, key_regions, 1)
            logits = tl.where(count > 0, logits, float('-inf'))
            p = tl.exp2(logits - row_lse[:, None]) * count
        else:
            logits = tl.where(listed[:, None], logits, float('-inf'))
            p = tl.exp2(logits - row_lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision='ieee')
        dp = tl.dot(do, tl.trans(v), input_precision='ieee')
        ds = p * (dp - row_delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision='ieee')
        if ONE_PASS:
            dq = tl.dot(ds.to(k.dtype), k, input_precision='ieee') * scale
            store_tokens(grad_query, dq, y, x, listed, width, channels, DIM, BLOCK_DIM)

    grad_key += image * key_height * key_width * channels + head * DIM
    store_tokens(grad_key, dk * scale, ky, kx, exists, key_width, channels, DIM, BLOCK_DIM)
    grad_value += image * key_height * key_width * value_channels + head * VALUE_DIM
    store_tokens(
        grad_value, dv, ky, kx, exists, key_width, value_channels, VALUE_DIM, BLOCK_VALUE_DIM
    )
