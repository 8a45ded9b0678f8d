"""`compact`: chosen rows of history and current scale into fresh pages, one program per page written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.common import (
    SLOT_MASK,
    eight_bit,
    on_device,
    padded,
    page_offset,
    stored_rows,
    table_strides,
)

# Rows a program holds at once. Every row comes from two masked loads, one of which moves nothing.
ROWS = 16
REGISTERS = 64  # more than it takes; without a bound the assembler of Triton 3.6 aims at 40, and spills
EIGHT_BIT_REGISTERS = 128  # with rows to be rounded, likewise


@triton.jit(do_not_specialize=["stride_sb", "stride_sh", "stride_db", "stride_dh", "S", "S_d", "M", "kv_heads"])
def compact_kernel(
    pages, page_scales, arena, src_slots, k, v, keep, dst_slots,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_sb, stride_sh, stride_db, stride_dh,
    S, S_d, M, kv_heads,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (S_d · KV heads · B,): one page of one head."""
    i_s = tl.program_id(0) % S_d
    i_bh = tl.program_id(0) // S_d
    i_h = (i_bh % kv_heads).to(tl.int64)
    i_b = (i_bh // kv_heads).to(tl.int64)
    p_src = src_slots + i_b * stride_sb + i_h * stride_sh
    p_dst = dst_slots + i_b * stride_db + i_h * stride_dh
    page0 = tl.load(arena + i_bh)
    before, _ = stored_rows(p_dst, S_d, i_s)
    to = tl.load(p_dst + i_s)
    rows = to & SLOT_MASK
    if rows > 0:
        p_k = k + i_b * stride_kb + i_h * stride_kh
        p_v = v + i_b * stride_vb + i_h * stride_vh
        p_keep = keep + i_bh.to(tl.int64) * M + before
        o_d = tl.arange(0, BD)
        b_d = (o_d < D)[None, :]
        for i_0 in tl.static_range(0, PS, ROWS):
            o_r = i_0 + tl.arange(0, ROWS)
            o_key = tl.load(p_keep + o_r, mask=o_r < rows, other=0).to(tl.int32)
            b_old = (o_r < rows) & (o_key < S * PS)
            b_new = (o_r < rows) & (o_key >= S * PS)
            slot = tl.load(p_src + o_key // PS, mask=b_old, other=0)
            p_old = pages + (page_offset(page0, slot, PS, D) + o_key % PS * D)[:, None] + o_d[None, :]
            o_new = (o_key - S * PS).to(tl.int64)[:, None]
            b_in = b_new[:, None] & b_d
            b_k = tl.load(p_k + o_new * stride_kn + o_d[None, :], mask=b_in, other=0.0)  # [ROWS, BD]
            b_v = tl.load(p_v + o_new * stride_vn + o_d[None, :], mask=b_in, other=0.0)
            if page_scales is not None:
                b_k, b_k_scale = eight_bit(b_k)
                b_v, b_v_scale = eight_bit(b_v)
                p_scale = page_scales + page_offset(page0, slot, PS, 1) + o_key % PS
                b_k_scale = tl.where(b_new, b_k_scale, tl.load(p_scale, mask=b_old, other=0.0))
                b_v_scale = tl.where(b_new, b_v_scale, tl.load(p_scale + PS, mask=b_old, other=0.0))
                p_scale = page_scales + page_offset(page0, to, PS, 1) + o_r
                tl.store(p_scale, b_k_scale)
                tl.store(p_scale + PS, b_v_scale)
            b_in = b_old[:, None] & b_d
            b_k = tl.where(b_new[:, None], b_k, tl.load(p_old, mask=b_in, other=0.0))
            b_v = tl.where(b_new[:, None], b_v, tl.load(p_old + PS * D, mask=b_in, other=0.0))
            p_to = pages + page_offset(page0, to, PS, D) + (o_r * D)[:, None] + o_d[None, :]
            tl.store(p_to, b_k, mask=b_d)  # rows past the last: zeros
            tl.store(p_to + PS * D, b_v, mask=b_d)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    batch, _, kv_heads, head_dim = k.shape
    page_size, entries = pages.shape[2], dst_slots.shape[2]
    programs = entries * kv_heads * batch
    if programs == 0:
        return
    with on_device(k):
        compact_kernel[programs,](
            pages, page_scales, arena, src_slots, k, v, keep, dst_slots, *k.stride()[:3], *v.stride()[:3],
            *table_strides(src_slots), *table_strides(dst_slots), src_slots.shape[2], entries, keep.shape[2], kv_heads,
            D=head_dim, BD=padded(head_dim), PS=page_size, ROWS=ROWS,
            maxnreg=REGISTERS if page_scales is None else EIGHT_BIT_REGISTERS,
        )  # fmt: skip
