"""`attn` for a handful of query rows: several heads in one program.

The early steps of a generation have 1 … 16 rows and a page or two of history: per head a few hundred bytes and almost
no arithmetic. Here a program takes HP KV heads at once, one warp each: every block has the head as a leading
dimension and the products are batched, so heads share nothing and no mask couples them. That is as many lanes at
work as one-warp programs would give, for a quarter of the launches and with the loads of HP heads side by side: the
rows of neighbouring heads are neighbours in memory.

The current rows fit one tile, so they are stored from the registers they were loaded into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amskv_kernels.ops.backends.triton.common import (
    NO_SHIFT,
    SLOT_MASK,
    as_type,
    eight_bit,
    finished,
    page_offset,
    product,
    scale_of,
    shift_of,
    weighed,
)


@triton.jit
def attend_heads(b_q, b_k, b_v, b_k_scale, b_v_scale, b_there, b_acc, b_sum, b_shift, scale_log2):
    """One step of online softmax for HP heads; b_there and the scales of eight-bit rows [HP, BN]."""
    b_zero = tl.zeros([b_q.shape[0], b_q.shape[1], b_k.shape[1]], tl.float32)
    b_s = product(b_q, tl.trans(as_type(b_k, b_q.dtype), 0, 2, 1), b_zero)  # [HP, BM, BN]
    if b_k_scale is not None:
        b_s *= b_k_scale[:, None, :]
    b_s = tl.where(b_there[:, None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_shift, shift_of(tl.max(b_s, 2), scale_log2))
    b_decay = tl.exp2(b_shift - b_new)
    b_acc = b_acc * b_decay[:, :, None]
    b_p = tl.exp2(b_s * scale_of(b_new, scale_log2)[:, :, None] - b_new[:, :, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 2)
    if b_v_scale is not None:
        b_p, b_v = weighed(b_p, b_v_scale, b_v, b_q)
    b_acc = product(b_p.to(b_v.dtype), b_v, b_acc)
    return b_acc, b_sum, b_new


@triton.jit
def load_slots(p_slots, i_s, S, b_head, HP: tl.constexpr):
    """Entry `i_s` of every head's slots [HP], 0 past the end."""
    o_s = tl.full([HP], i_s, tl.int32)
    return tl.load(p_slots + o_s, mask=b_head & (o_s < S), other=0)


@triton.jit
def attend_page(
    b_q, pages, page_scales, page0, slot, o_r, b_d, b_acc, b_sum, b_shift, scale_log2,
    PS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`attend_heads` over rows `o_r` of the page that each of HP heads' `slot` names; b_d [1, 1, BD]."""
    b_there = o_r[None, :] < (slot & SLOT_MASK)[:, None]
    b_load = b_there[:, :, None] & b_d
    p_row = pages + page_offset(page0, slot, PS, D)[:, None, None] + (o_r * D)[None, :, None]
    p_row += tl.arange(0, BD)[None, None, :]
    b_k = tl.load(p_row, mask=b_load, other=0.0)  # [HP, BN, BD]
    b_v = tl.load(p_row + PS * D, mask=b_load, other=0.0)
    if page_scales is None:
        return attend_heads(b_q, b_k, b_v, None, None, b_there, b_acc, b_sum, b_shift, scale_log2)
    else:
        p_scale = page_scales + page_offset(page0, slot, PS, 1)[:, None] + o_r[None, :]
        b_k_scale = tl.load(p_scale, mask=b_there, other=0.0)
        b_v_scale = tl.load(p_scale + PS, mask=b_there, other=0.0)
        return attend_heads(b_q, b_k, b_v, b_k_scale, b_v_scale, b_there, b_acc, b_sum, b_shift, scale_log2)


@triton.jit
def store_heads(
    b_k, b_v, n, pages, page_scales, b_page0, p_slots, b_head, S,
    D: tl.constexpr, PS: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store HP heads' rows [HP, BN, BD] where their slots say, and zeros after them; see `common.store_page`."""
    o_n, o_r, o_d = tl.arange(0, BN), tl.arange(0, PS), tl.arange(0, BD)
    if page_scales is not None:
        b_k, b_k_scale = eight_bit(b_k)
        b_v, b_v_scale = eight_bit(b_v)
    b_zero = tl.zeros([HP, PS, BD], b_k.dtype)
    b_first = tl.full([HP], 0, tl.int32) + n  # the row of k that starts the page; below 0: rows to keep
    for i_s in range(0, S):
        b_first -= load_slots(p_slots, i_s, S, b_head, HP) & SLOT_MASK
    for i_s in range(0, S):
        slot = load_slots(p_slots, i_s, S, b_head, HP)
        rows = slot & SLOT_MASK
        p_page = pages + page_offset(b_page0, slot, PS, D)
        o_to = o_n[None, :] - b_first[:, None]
        b_to = (o_to >= 0) & (o_to < rows[:, None]) & (o_n < n)[None, :]
        p_to = p_page[:, None, None] + (o_to * D)[:, :, None] + o_d[None, None, :]
        b_mask = b_to[:, :, None] & (o_d < D)[None, None, :]
        tl.store(p_to, b_k, mask=b_mask)
        tl.store(p_to + PS * D, b_v, mask=b_mask)
        b_rest = (o_r[None, :] >= rows[:, None]) & (rows > 0)[:, None]
        p_rest = p_page[:, None, None] + (o_r * D)[None, :, None] + o_d[None, None, :]
        b_mask = b_rest[:, :, None] & (o_d < D)[None, None, :]
        tl.store(p_rest, b_zero, mask=b_mask)
        tl.store(p_rest + PS * D, b_zero, mask=b_mask)
        if page_scales is not None:
            p_page = page_scales + page_offset(b_page0, slot, PS, 1)
            p_to, p_rest = p_page[:, None] + o_to, p_page[:, None] + o_r[None, :]
            tl.store(p_to, b_k_scale, mask=b_to)
            tl.store(p_to + PS, b_v_scale, mask=b_to)
            tl.store(p_rest, tl.zeros([HP, PS], tl.float32), mask=b_rest)
            tl.store(p_rest + PS, tl.zeros([HP, PS], tl.float32), mask=b_rest)
        b_first += rows


@triton.jit(do_not_specialize=["stride_rb", "stride_rh", "stride_wb", "stride_wh", "n", "S", "S_w", "kv_heads"])
def attn_packed_kernel(
    q, k, v, pages, page_scales, arena, read_slots, write_slots, out, lse,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_rb, stride_rh, stride_wb, stride_wh,
    n, S, S_w, kv_heads, scale_log2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr,
    HP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (groups of HP KV heads × B); n · G ≤ BM and n ≤ BN ≤ PS."""
    groups = tl.cdiv(kv_heads, HP)
    i_b = (tl.program_id(0) // groups).to(tl.int64)
    o_h = tl.program_id(0) % groups * HP + tl.arange(0, HP)
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    b_head = o_h < kv_heads
    b_d = (o_d < D)[None, None, :]
    page0 = tl.load(arena + i_b * kv_heads + o_h, mask=b_head, other=0)  # [HP]
    p_read = read_slots + i_b * stride_rb + o_h * stride_rh
    slot = load_slots(p_read, 0, S, b_head, HP)

    o_i = (o_m // G).to(tl.int64)  # query row, and head, of each row of the tile
    o_g = o_h[:, None] * G + o_m % G  # [HP, BM]
    b_row = b_head[:, None] & (o_m < n * G)[None, :]
    p_q = q + i_b * stride_qb + (o_i * stride_qn)[None, :, None] + (o_g.to(tl.int64) * stride_qh)[:, :, None]
    p_q += o_d[None, None, :]
    b_q = tl.load(p_q, mask=b_row[:, :, None] & b_d, other=0.0)  # [HP, BM, BD]
    b_there = b_head[:, None] & (o_n < n)[None, :]  # [HP, BN]
    b_load = b_there[:, :, None] & b_d
    o_c = o_n.to(tl.int64)[None, :, None]
    p_k = k + i_b * stride_kb + (o_h.to(tl.int64) * stride_kh)[:, None, None] + o_c * stride_kn + o_d[None, None, :]
    p_v = v + i_b * stride_vb + (o_h.to(tl.int64) * stride_vh)[:, None, None] + o_c * stride_vn + o_d[None, None, :]
    b_k = tl.load(p_k, mask=b_load, other=0.0)  # [HP, BN, BD]
    b_v = tl.load(p_v, mask=b_load, other=0.0)

    p_write = write_slots + i_b * stride_wb + o_h * stride_wh
    store_heads(b_k, b_v, n, pages, page_scales, page0, p_write, b_head, S_w, D, PS, HP, BN, BD)

    b_acc = tl.zeros([HP, BM, BD], tl.float32)
    b_sum = tl.zeros([HP, BM], tl.float32)
    b_shift = tl.full([HP, BM], NO_SHIFT, tl.float32)
    b_acc, b_sum, b_shift = attend_heads(b_q, b_k, b_v, None, None, b_there, b_acc, b_sum, b_shift, scale_log2)
    for i_s in range(0, S):
        page = slot
        slot = load_slots(p_read, i_s + 1, S, b_head, HP)  # asked for one page ahead
        for i_0 in range(0, tl.max(page & SLOT_MASK), BN):
            b_acc, b_sum, b_shift = attend_page(
                b_q, pages, page_scales, page0, page, i_0 + o_n, b_d, b_acc, b_sum, b_shift, scale_log2, PS, D, BD
            )

    b_acc, b_lse = finished(b_acc, b_sum, b_shift, scale_log2)
    heads = kv_heads * G
    p_out = out + ((i_b * n + o_i)[None, :, None] * heads + o_g[:, :, None]) * D + o_d[None, None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=b_row[:, :, None] & b_d)
    tl.store(lse + (i_b * heads + o_g) * n + o_i[None, :], b_lse, mask=b_row)
