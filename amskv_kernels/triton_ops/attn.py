"""`attn`: one kernel gathers history through the page table, reads the current scale in place, and stores it.

A head's keys are a sequence of tiles of BN rows: its history, page by page, then the rows of k. A program owns BM
query rows of one KV head (with GQA the G heads of a group are rows of the same tile: no mask depends on the query)
and walks all tiles, or one share of them where a second kernel merges the shares (`attn_merge`).

Full tiles come first, in one software-pipelined loop that masks nothing and does not drain between history and
current rows; tiles with a hole (a partial page, the tail of k) come after them. Keys may be taken in any order.

Storing: each page to be written belongs to one of the head's programs, dealt out in turn. It reads its rows a second
time, which the loop has just brought into L2; keeping the store out of the loop leaves the loop free of branches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.triton_ops.attn_packed import attn_packed_kernel
from amskv_kernels.triton_ops.common import (
    LN2,
    SLOT_BLOCK,
    SLOT_MASK,
    describe,
    on_device,
    padded,
    page_offset,
    product,
    store_page,
    table_strides,
)  # fmt: skip
from amskv_kernels.triton_ops.tiles import attn_tile, split_count

NO_SPECIAL = [
    "stride_rb", "stride_rh", "stride_wb", "stride_wh", "n", "S", "S_w", "kv_heads", "splits",
]  # fmt: skip


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
    """Entries of the pages under tile `i_t` of the history: one where it lies in a page, else one per row [BN]."""
    entries = tl.where(history, S, 0)
    i_s = i_t * (BN // PS) + tl.arange(0, BN) // PS if BN > PS else i_t * BN // PS
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
    o_n = tl.arange(0, BN)
    stride_k, stride_v = tl.where(history, D, stride_kn), tl.where(history, D, stride_vn)
    first = tl.where(history, 0, i_t * BN)  # row of k; in the history, the page's first row
    if BN > PS:
        o_n = tl.where(history, o_n % PS, o_n)
    else:
        first = tl.where(history, i_t * BN % PS, first)
    b_there = first + o_n < tl.where(history, slot & SLOT_MASK, n)
    o_page = page_offset(tl.where(history, page0, 0), slot, PS, D)
    if BN > PS:
        b_k = tl.where(history, pages, p_k + first.to(tl.int64) * stride_k) + o_page
        b_v = tl.where(history, pages + PS * D, p_v + first.to(tl.int64) * stride_v) + o_page
    else:
        o_page += first * D
        b_k = tl.where(history, pages + o_page, p_k + first.to(tl.int64) * stride_k)
        b_v = tl.where(history, pages + PS * D + o_page, p_v + first.to(tl.int64) * stride_v)
    b_k += o_n * stride_k
    b_v += o_n * stride_v
    return b_k, b_v, b_there


@triton.jit
def attend_tile(
    b_q, b_acc, b_sum, b_max, b_pk, b_pv, b_there, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of online softmax, in powers of two; MASKED if some of the tile's rows may not be there."""
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
    b_s = product(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32))  # [BM, BN]
    if MASKED:
        b_s = tl.where(b_there[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_ref = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new  # no key yet: −inf − −inf is NaN
    b_p = tl.exp2(b_s * scale_log2 - b_ref[:, None])
    b_decay = tl.exp2(b_max - b_ref)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_acc = product(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None])
    return b_acc, b_sum, b_new


@triton.jit(do_not_specialize=NO_SPECIAL)
def attn_kernel(
    q, k, v, pages, arena, read_slots, write_slots, out, lse,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_rb, stride_rh, stride_wb, stride_wh,
    n, S, S_w, kv_heads, splits, scale_log2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FULL_FIRST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of n · G rows × KV heads × B, splits); with SPLIT, out and lse have a leading `splits` in fp32."""
    tiles_m = tl.cdiv(n * G, BM)
    i_m = tl.program_id(0) % tiles_m
    i_bh = tl.program_id(0) // tiles_m
    i_h = i_bh % kv_heads
    i_b = (i_bh // kv_heads).to(tl.int64)

    o_m = i_m * BM + tl.arange(0, BM)
    o_n, o_g = o_m // G, i_h * G + o_m % G  # query row and head of each row of the tile
    o_d = tl.arange(0, BD)
    b_there = o_m < n * G
    b_in = b_there[:, None] & (o_d < D)[None, :]
    p_q = q + i_b * stride_qb + (o_n.to(tl.int64) * stride_qn + o_g * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=b_in, other=0.0)  # [BM, BD]
    page0 = tl.load(arena + i_bh)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    p_v = v + i_b * stride_vb + i_h * stride_vh
    p_read = read_slots + i_b * stride_rb + i_h * stride_rh

    tiles_h = tl.cdiv(S * PS, BN)
    full_h, full_c = 0, 0
    if FULL_FIRST:
        full_h, full_c = full_tiles(p_read, S, PS, BN), n // BN
    full, holed_h = full_h + full_c, tiles_h - full_h
    end = tiles_h + tl.cdiv(n, BN)
    start, i_out, i_store, step = 0, i_b, i_m, tiles_m
    if SPLIT:
        i_split = tl.program_id(1)
        share = tl.cdiv(end, splits)
        start = i_split * share
        end = tl.minimum(start + share, end)
        i_out += i_split.to(tl.int64) * (tl.num_programs(0) // (tiles_m * kv_heads))  # splits · B come first
        i_store += i_split * tiles_m
        step *= splits

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    # Entries are asked for one tile ahead: inside a tile they would put two latencies between it and its rows.
    if FULL_FIRST:
        slot = tile_slots(start, start < full_h, p_read, S, PS, BN)
        for i in range(start, tl.minimum(end, full)):
            history = i < full_h
            i_t = tl.where(history, i, i - full_h)
            b_pk, b_pv, b_row = key_rows(i_t, history, slot, p_k, p_v, stride_kn, stride_vn, n, pages, page0, D, PS, BN)
            slot = tile_slots(i + 1, i + 1 < full_h, p_read, S, PS, BN)
            b_acc, b_sum, b_max = attend_tile(b_q, b_acc, b_sum, b_max, b_pk, b_pv, b_row, scale_log2, D, BD, False)
        start = tl.maximum(start, full)
    slot = tile_slots(start - full_c, start - full < holed_h, p_read, S, PS, BN)
    for i in range(start - full, end - full):
        history = i < holed_h
        i_t = tl.where(history, i + full_h, i - holed_h + full_c)
        b_pk, b_pv, b_row = key_rows(i_t, history, slot, p_k, p_v, stride_kn, stride_vn, n, pages, page0, D, PS, BN)
        slot = tile_slots(i_t + 1, i + 1 < holed_h, p_read, S, PS, BN)
        b_acc, b_sum, b_max = attend_tile(b_q, b_acc, b_sum, b_max, b_pk, b_pv, b_row, scale_log2, D, BD, True)

    b_some = b_sum > 0.0
    b_acc = b_acc / tl.where(b_some, b_sum, 1.0)[:, None]
    b_lse = tl.where(b_some, (b_max + tl.log2(b_sum)) * LN2, float("-inf"))
    heads = kv_heads * G
    p_out = out + i_out * n * heads * D + ((o_n * heads + o_g).to(tl.int64) * D)[:, None] + o_d[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=b_in)
    tl.store(lse + i_out * heads * n + o_g * n + o_n, b_lse, mask=b_there)

    p_write = write_slots + i_b * stride_wb + i_h * stride_wh
    for i_s in range(i_store, S_w, step):
        store_page(p_k, p_v, stride_kn, stride_vn, n, pages, page0, p_write, S_w, i_s, D, BD, PS, 16)


@triton.jit(do_not_specialize=["rows", "n", "heads", "splits"])
def attn_merge_kernel(
    part, part_lse, out, lse, rows, n, heads, splits,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Merge the shares, in order, for BR of the B · n · H rows: weights exp(lse − max), exact to rounding."""
    o_row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)  # (b, i, h), as out lies
    o_d = tl.arange(0, BD)
    b_there = o_row < rows
    b_in = b_there[:, None] & (o_d < D)[None, :]
    o_lse = (o_row // (n * heads) * heads + o_row % heads) * n + o_row // heads % n  # (b, h, i), as lse lies
    b_max = tl.full([BR], float("-inf"), tl.float32)
    o_part = o_lse
    for _ in range(0, splits):
        b_max = tl.maximum(b_max, tl.load(part_lse + o_part, mask=b_there, other=0.0))
        o_part += rows
    b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_acc = tl.zeros([BR, BD], tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    o_part = o_row
    for _ in range(0, splits):
        b_weight = tl.exp(tl.load(part_lse + o_lse, mask=b_there, other=0.0) - b_ref)
        b_part = tl.load(part + o_part[:, None] * D + o_d[None, :], mask=b_in, other=0.0)
        b_acc += b_weight[:, None] * b_part
        b_sum += b_weight
        o_part += rows
        o_lse += rows
    b_some = b_sum > 0.0
    b_acc = b_acc / tl.where(b_some, b_sum, 1.0)[:, None]
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_acc.to(out.dtype.element_ty), mask=b_in)
    tl.store(lse + o_lse - o_part + o_row, tl.where(b_some, b_ref + tl.log(b_sum), float("-inf")), mask=b_there)


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    batch, n, heads, head_dim = q.shape
    out = q.new_empty(batch, n, heads, head_dim)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    device = describe(q.device)
    kv_heads, page_size, entries = k.shape[2], pages.shape[2], read_slots.shape[2]
    group = heads // kv_heads
    tile = attn_tile(device.arch, head_dim, q.element_size(), n * group, entries)
    tensors = (q, k, v, pages, arena, read_slots, write_slots)
    strides = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table_strides(read_slots), *table_strides(write_slots)
    )  # fmt: skip
    sizes = {"G": group, "D": head_dim, "BD": padded(head_dim), "PS": page_size, "BM": tile.block_m, "BN": tile.block_n}
    scalars = (n, entries, write_slots.shape[2], kv_heads)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers if group == 1 else None}
    scale = softmax_scale / math.log(2)
    with on_device(q):
        if tile.heads > 1:
            grid = (batch * triton.cdiv(kv_heads, tile.heads),)
            attn_packed_kernel[grid](*tensors, out, lse, *strides, *scalars, scale, **sizes, HP=tile.heads, **options)
            return out, lse
        programs = triton.cdiv(n * group, tile.block_m) * batch * kv_heads
        tiles = triton.cdiv(entries * page_size, tile.block_n) + triton.cdiv(n, tile.block_n)
        splits = split_count(programs, tiles, device.processors)
        sizes |= {"FULL_FIRST": tile.full_first, "SPLIT": splits > 1}
        part, part_lse = out, lse
        if splits > 1:
            part = q.new_empty(splits, batch, n, heads, head_dim, dtype=torch.float32)
            part_lse = q.new_empty(splits, batch, heads, n, dtype=torch.float32)
        attn_kernel[programs, splits](*tensors, part, part_lse, *strides, *scalars, splits, scale, **sizes, **options)
        if splits > 1:
            _merge(part, part_lse, out, lse)
    return out, lse


def _merge(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    batch, n, heads, head_dim = out.shape
    rows = batch * n * heads
    # 16 rows of a thread block's 4 warps: 8 … 16 bytes a lane. Not yet measured; the pass is short and bandwidth-bound.
    attn_merge_kernel[triton.cdiv(rows, 16),](
        part, part_lse, out, lse, rows, n, heads, part.shape[0], D=head_dim, BD=padded(head_dim), BR=16, num_warps=4
    )
