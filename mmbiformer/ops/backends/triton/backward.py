"""The backward kernels: gradients by query region and by key region, without atomics.

Probabilities are recomputed from the statistics that forward keeps of each row. The gradient of the
logits is p * (grad_out @ v.T - delta), with p = softmax(logits), ``delta`` = sum(out * grad_out).
"""

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
def grad_of_query(
    query,
    key,
    value,
    routes,
    counts,
    out,
    stats,
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
):
    """One program for each tile of a query region and head, as in forward; writes ``delta`` too."""
    image, region, tile, head = split_program(tiles, HEADS)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    grad_out += image * grad_b + head * VALUE_DIM * grad_c
    channels, value_channels = HEADS * DIM, HEADS * VALUE_DIM
    out += image * height * width * value_channels + head * VALUE_DIM
    grad_query += image * height * width * channels + head * DIM
    stats += (image * HEADS + head) * 2 * height * width
    delta += (image * HEADS + head) * height * width
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
    length = key_regions if ALL else topk
    q = load_tokens(query, y * query_y + x * query_x, exists, query_c, DIM, BLOCK_DIM)
    do = load_tokens(grad_out, y * grad_y + x * grad_x, exists, grad_c, VALUE_DIM, BLOCK_VALUE_DIM)
    o = load_tokens(out, (y * width + x) * value_channels, exists, 1, VALUE_DIM, BLOCK_VALUE_DIM)
    top = tl.load(stats + y * width + x, mask=exists, other=0.0)
    share = tl.load(stats + (height + y) * width + x, mask=exists, other=0.0)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + y * width + x, row_delta, mask=exists)

    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, length * key_h * key_w, BLOCK_COLUMNS):
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
        # Masked before the exponential, which could overflow for keys that do not count.
        if ALL:
            count = load_counts(counts, row_region, exists, start, counted, BLOCK_COLUMNS)
            logits = tl.where(count > 0, logits, float('-inf'))
            p = tl.exp2(logits - top[:, None]) * share[:, None] * count
        else:
            if MASKED:
                logits = tl.where(listed[None, :], logits, float('-inf'))
            p = tl.exp2(logits - top[:, None]) * share[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision='ieee')
        ds = p * (dp - row_delta[:, None])
        acc = add_product(ds.to(k.dtype), k, acc)

    store_tokens(grad_query, acc * scale, y, x, exists, width, channels, DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=SIZES)
def grad_of_key_and_value(
    query,
    key,
    value,
    listing,
    starts,
    counts,
    stats,
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
    ONE_PASS: tl.constexpr,
):
    """One program for each tile of a key region and head; columns are keys, rows are queries.

    A region that no query is routed to gets zeros. With ``ONE_PASS`` a program holds all keys of
    its queries, and writes their gradient too.
    """
    image, region, tile, head = split_program(tiles, HEADS)
    query += image * query_b + head * DIM * query_c
    key += image * key_b + head * DIM * key_c
    value += image * value_b + head * VALUE_DIM * value_c
    grad_out += image * grad_b + head * VALUE_DIM * grad_c
    stats += (image * HEADS + head) * 2 * height * width
    delta += (image * HEADS + head) * height * width
    channels, value_channels = HEADS * DIM, HEADS * VALUE_DIM
    grad_query += image * height * width * channels + head * DIM

    _, ky, kx, exists = own_tokens(
        tile,
        region,
        key_regions,
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
    )
    if ALL:
        counts += image * regions * counted
        length = regions
        needed = exists
    else:
        starts += image * (key_regions + 1) + region
        first = tl.load(starts)
        length = tl.load(starts + 1) - first
        listing += image * regions * topk + first
        needed = exists & (length > 0)
    k = load_tokens(key, ky * key_y + kx * key_x, needed, key_c, DIM, BLOCK_DIM)
    v = load_tokens(value, ky * value_y + kx * value_x, needed, value_c, VALUE_DIM, BLOCK_VALUE_DIM)

    dk = tl.zeros([BLOCK_COLUMNS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK_COLUMNS, BLOCK_VALUE_DIM], tl.float32)
    for start in range(0, length * h * w, BLOCK_ROWS):
        row_region, y, x, listed = listed_tokens(
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
            BLOCK_ROWS,
            ALL,
            RAGGED,
            ROWS_MASKED,
            ONE_REGION,
        )
        q = load_tokens(query, y * query_y + x * query_x, listed, query_c, DIM, BLOCK_DIM)
        do = load_tokens(
            grad_out, y * grad_y + x * grad_x, listed, grad_c, VALUE_DIM, BLOCK_VALUE_DIM
        )
        if ALL:
            first = tile * BLOCK_COLUMNS
            count = load_counts(counts, row_region, listed, first, counted, BLOCK_COLUMNS)
        top = tl.load(stats + y * width + x, mask=listed, other=0.0)
        share = tl.load(stats + (height + y) * width + x, mask=listed, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision='ieee') * scale_log2
        if ALL:
            logits = tl.where(count > 0, logits, float('-inf'))
            p = tl.exp2(logits - top[:, None]) * share[:, None] * count
        else:
            if ONE_PASS and MASKED:
                # The exponential may overflow for keys that do not exist, and dq sums over them.
                logits = tl.where(exists[None, :], logits, float('-inf'))
            p = tl.exp2(logits - top[:, None]) * share[:, None]
        dv = add_product(tl.trans(p.to(do.dtype)), do, dv)
        dp = tl.dot(do, tl.trans(v), input_precision='ieee')
        if ONE_PASS:  # sum(out * grad_out), as out = p @ v
            row_delta = tl.sum(p * dp, 1)
        else:
            row_delta = tl.load(delta + y * width + x, mask=listed, other=0.0)
        ds = p * (dp - row_delta[:, None])
        dk = add_product(tl.trans(ds.to(q.dtype)), q, dk)
        if ONE_PASS:
            dq = tl.dot(ds.to(k.dtype), k, input_precision='ieee') * scale
            store_tokens(grad_query, dq, y, x, listed, width, channels, DIM, BLOCK_DIM)

    grad_key += image * key_height * key_width * channels + head * DIM
    store_tokens(grad_key, dk * scale, ky, kx, exists, key_width, channels, DIM, BLOCK_DIM)
    grad_value += image * key_height * key_width * value_channels + head * VALUE_DIM
    store_tokens(
        grad_value, dv, ky, kx, exists, key_width, value_channels, VALUE_DIM, BLOCK_VALUE_DIM
    )
