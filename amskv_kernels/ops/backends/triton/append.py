"""`append`: the store of `attn` alone, one program per page."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.common import on_device, padded, store_page, table_strides

# Rows a program holds at once: 32 rows of K and V are 4 … 8 vectors of 16 bytes per thread in flight.
ROWS = 32


@triton.jit(do_not_specialize=["stride_wb", "stride_wh", "n", "S", "kv_heads"])
def append_kernel(
    k, v, pages, page_scales, arena, write_slots,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_wb, stride_wh,
    n, S, kv_heads,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (S · KV heads · B,): one page of one head."""
    i_s = tl.program_id(0) % S
    i_bh = tl.program_id(0) // S
    i_h = (i_bh % kv_heads).to(tl.int64)
    i_b = (i_bh // kv_heads).to(tl.int64)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    p_slots = write_slots + i_b * stride_wb + i_h * stride_wh
    page0 = tl.load(arena + i_bh)
    store_page(p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, i_s, D, BD, PS, ROWS)


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.append`."""
    batch, n, kv_heads, head_dim = k.shape
    page_size, entries = pages.shape[2], write_slots.shape[2]
    programs = entries * kv_heads * batch
    if programs == 0:
        return
    with on_device(k):
        append_kernel[programs,](
            k, v, pages, page_scales, arena, write_slots, *k.stride()[:3], *v.stride()[:3], *table_strides(write_slots),
            n, entries, kv_heads, D=head_dim, BD=padded(head_dim), PS=page_size, ROWS=min(page_size, ROWS),
        )  # fmt: skip
