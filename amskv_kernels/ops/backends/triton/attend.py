"""Online softmax over the keys of a head, tile by tile.

A head's keys are a sequence of tiles of BN rows: its history, page by page, then the rows of k. Full tiles come first,
in one software-pipelined loop that masks nothing and does not drain between history and current rows; tiles with a
hole (a partial page, the tail of k) come after them. Keys may be taken in any order.

Pages of eight bits are another type than k, so there the history has a loop of its own. Its bytes become 16 bits on
their way into the products, which is exact; a key's scale is multiplied into its scores, a value's into its weights
where these have the range (`common.weighed`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from amskv_kernels.ops.backends.triton.common import (
    NO_SHIFT,
    SLOT_BLOCK,
    SLOT_MASK,
    as_type,
    page_offset,
    product,
    scale_of,
    shift_of,
    weighed,
)


@triton.jit
def full_tiles(p_slots, S, PS: tl.constexpr, BN: tl.constexpr):
    """Tiles before the first page that is not full."""
    first = S
    for i_0 in range(0, S, SLOT_BLOCK):
        o_s = i_0 + tl.arange(0, SLOT_BLOCK)
        b_slot = tl.load(p_slots + o_s, mask=o_s < S, other=0)
        first = tl.minimum(first, tl.min(tl.where((b_slot & SLOT_MASK) < PS, o_s, S)))
    return first * PS // BN


@triton.jit
def tile_slots(i_t, history, p_slots, S, PS: tl.constexpr, BN: tl.constexpr):
    """The entry under every row of tile `i_t` of the history [BN], 0 where there is none.

    One load per row also where the tile lies within one page: it costs fewer registers than scalar arithmetic would.
    """
    entries = tl.where(history, S, 0)
    i_s = (i_t * BN + tl.arange(0, BN)) // PS
    return tl.load(p_slots + i_s, mask=i_s < entries, other=0)


@triton.jit
def key_rows(
    i_t, history, slot, p_k, p_v, stride_kn, stride_vn, n, pages, page0,
    D: tl.constexpr, PS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Pointers [BN] to the K and V rows of tile `i_t` of the history or of the current rows, and which are there.

    What differs is selected before the multiplications: a selected pointer would no longer count as aligned, and the
    loads would be neither 16 bytes wide nor pipelined.
    """
    o_n = i_t * BN + tl.arange(0, BN)
    o_n = tl.where(history, o_n % PS, o_n)
    b_there = o_n < tl.where(history, slot & SLOT_MASK, n)
    o_page = page_offset(tl.where(history, page0, 0), slot, PS, D)
    o_row = o_n.to(tl.int64)
    b_k = tl.where(history, pages, p_k) + (o_page + o_row * tl.where(history, D, stride_kn))
    b_v = tl.where(history, pages + PS * D, p_v) + (o_page + o_row * tl.where(history, D, stride_vn))
    return b_k, b_v, b_there


@triton.jit
def page_rows(i_t, slot, pages, page_scales, page0, D: tl.constexpr, PS: tl.constexpr, BN: tl.constexpr):
    """Pointers [BN] to the K rows of tile `i_t` of an eight-bit history and to their scales, and which are there.

    V's rows are PS · D bytes further, their scales PS.
    """
    o_r = (i_t * BN + tl.arange(0, BN)) % PS
    b_there = o_r < slot & SLOT_MASK
    b_pk = pages + (page_offset(page0, slot, PS, D) + o_r * D)
    return b_pk, page_scales + (page_offset(page0, slot, PS, 1) + o_r), b_there


@triton.jit
def attend_tile(
    b_q, b_acc, b_sum, b_shift, b_pk, b_pv, b_ps, b_there, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, in powers of two; MASKED if some of the tile's rows may not be there.

    `b_ps` are pointers to the scales of eight-bit rows, None for other rows.
    """
    o_d = tl.arange(0, BD)
    p_k = b_pk[:, None] + o_d[None, :]  # [BN, BD]
    p_v = b_pv[:, None] + o_d[None, :]
    if MASKED:
        b_load = b_there[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=b_load, other=0.0)
        b_v = tl.load(p_v, mask=b_load, other=0.0)
    elif BD > D:
        b_k = tl.load(p_k, mask=(o_d < D)[None, :], other=0.0)
        b_v = tl.load(p_v, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_v)
    b_zero = tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32)
    b_s = product(b_q, tl.trans(as_type(b_k, b_q.dtype)), b_zero)  # [BM, BN]
    if b_ps is not None:
        b_k_scale = tl.load(b_ps, mask=b_there if MASKED else None, other=0.0 if MASKED else None)
        b_v_scale = tl.load(b_ps + PS, mask=b_there if MASKED else None, other=0.0 if MASKED else None)
        b_s *= b_k_scale[None, :]
    if MASKED:
        b_s = tl.where(b_there[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_shift, shift_of(tl.max(b_s, 1), scale_log2))
    b_decay = tl.exp2(b_shift - b_new)
    b_acc = b_acc * b_decay[:, None]
    b_p = tl.exp2(b_s * scale_of(b_new, scale_log2)[:, None] - b_new[:, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    if b_ps is not None:
        b_p, b_v = weighed(b_p, b_v_scale, b_v, b_q)
    b_acc = product(b_p.to(b_v.dtype), b_v, b_acc)
    return b_acc, b_sum, b_new


@triton.jit
def attend_tiles(
    start, end, tiles_h, first_h, first_c, b_q, b_acc, b_sum, b_shift,
    p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles start … end − 1 of a sequence: `tiles_h` of the history from `first_h` on, then of k from `first_c` on.

    Entries are asked for one tile ahead: inside a tile they would put two latencies between it and its rows.
    """
    slot = tile_slots(start + first_h, start < tiles_h, p_slots, S, PS, BN)
    pool = pages
    if page_scales is not None:
        for i in range(start, tl.minimum(end, tiles_h)):
            b_pk, b_ps, b_row = page_rows(i + first_h, slot, pages, page_scales, page0, D, PS, BN)
            slot = tile_slots(i + 1 + first_h, i + 1 < tiles_h, p_slots, S, PS, BN)
            b_acc, b_sum, b_shift = attend_tile(
                b_q, b_acc, b_sum, b_shift, b_pk, b_pk + PS * D, b_ps, b_row, scale_log2, D, BD, PS, MASKED
            )
        start = tl.maximum(start, tiles_h)
        pool = p_k  # what is left is no history; both ends of a selection must be of one type
    for i in range(start, end):
        history = i < tiles_h
        i_t = tl.where(history, i + first_h, i - tiles_h + first_c)
        b_pk, b_pv, b_row = key_rows(i_t, history, slot, p_k, p_v, stride_kn, stride_vn, n, pool, page0, D, PS, BN)
        slot = tile_slots(i + 1 + first_h, i + 1 < tiles_h, p_slots, S, PS, BN)
        b_acc, b_sum, b_shift = attend_tile(
            b_q, b_acc, b_sum, b_shift, b_pk, b_pv, None, b_row, scale_log2, D, BD, PS, MASKED
        )
    return b_acc, b_sum, b_shift


@triton.jit
def attend_range(
    start, end, tiles_h, b_q, p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FULL_FIRST: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles start … end − 1: where FULL_FIRST, those without a hole are numbered first."""
    full_h, full_c = 0, 0
    if FULL_FIRST:
        full_h, full_c = full_tiles(p_slots, S, PS, BN), n // BN
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_shift = tl.full([BM], NO_SHIFT, tl.float32)
    if FULL_FIRST:
        b_acc, b_sum, b_shift = attend_tiles(
            start, tl.minimum(end, full_h + full_c), full_h, 0, 0, b_q, b_acc, b_sum, b_shift,
            p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, scale_log2, D, BD, PS, BN, False,
        )  # fmt: skip
        start = tl.maximum(start, full_h + full_c)
    b_acc, b_sum, b_shift = attend_tiles(
        start - full_h - full_c, end - full_h - full_c, tiles_h - full_h, full_h, full_c, b_q, b_acc, b_sum, b_shift,
        p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, scale_log2, D, BD, PS, BN, True,
    )  # fmt: skip
    return b_acc, b_sum, b_shift
