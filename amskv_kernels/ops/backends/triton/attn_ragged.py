"""`attn_ragged`: the tiles of `attn`, for packed sequences of different lengths in one launch.

The grid has as many programs as any lengths that add up to T could need; each finds its sequence by counting the tiles
of those before it, a few instructions on (N,) values. So the host need not know the lengths, and a launch may be
captured into a graph that later serves others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.attend import attend_range
from amskv_kernels.ops.backends.triton.common import (
    SLOT_BLOCK,
    SLOT_MASK,
    describe,
    finished,
    on_device,
    padded,
    store_page,
    table_strides,
)
from amskv_kernels.ops.backends.triton.tiles import attn_tile

LEAST_ENTRIES = 3  # past the lines of few entries, whose tile packs heads: lengths are not known when it is chosen
LEAST_REGISTERS = 168  # of a tile with a bound: below it, what finds the sequence makes it spill
NO_SPECIAL = ["stride_rb", "stride_rh", "stride_wb", "stride_wh", "T", "N", "S", "S_w", "kv_heads", "tiles_m"]


@triton.jit
def place_of(i_m, row_starts, N, G: tl.constexpr, BM: tl.constexpr, NB: tl.constexpr):
    """The sequence whose tile number `i_m` is, N where there is none; its number within it, and how many that has."""
    o_i = tl.arange(0, NB)
    b_start = tl.load(row_starts + o_i, mask=o_i < N, other=0)
    b_end = tl.load(row_starts + o_i + 1, mask=o_i < N, other=0)
    b_tiles = tl.cdiv((b_end - b_start) * G, BM)  # [NB]
    i_b = tl.minimum(tl.sum((tl.cumsum(b_tiles, 0) <= i_m).to(tl.int32), 0), N)
    before = tl.sum(tl.where(o_i < i_b, b_tiles, 0), 0)
    return i_b, i_m - before, tl.sum(tl.where(o_i == i_b, b_tiles, 0), 0)


@triton.jit
def entries_of(p_slots, S):
    """Entries of a padded table up to the last that names rows."""
    found = 0
    for i_0 in range(0, S, SLOT_BLOCK):
        o_s = i_0 + tl.arange(0, SLOT_BLOCK)
        b_slot = tl.load(p_slots + o_s, mask=o_s < S, other=0)
        found = tl.maximum(found, tl.max(tl.where((b_slot & SLOT_MASK) > 0, o_s + 1, 0), 0))
    return found


@triton.jit(do_not_specialize=NO_SPECIAL)
def attn_ragged_kernel(
    q, k, v, pages, page_scales, arena, read_slots, write_slots, row_starts, out, lse,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_rb, stride_rh, stride_wb, stride_wh,
    T, N, S, S_w, kv_heads, scale_log2, tiles_m,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NB: tl.constexpr, FULL_FIRST: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all sequences at most · KV heads,)."""
    i_h = tl.program_id(0) // tiles_m
    i_b, i_m, tiles = place_of(tl.program_id(0) % tiles_m, row_starts, N, G, BM, NB)
    if i_b < N:
        row0 = tl.load(row_starts + i_b).to(tl.int64)
        n = tl.load(row_starts + i_b + 1) - row0.to(tl.int32)
        o_m = i_m * BM + tl.arange(0, BM)
        o_n, o_g = row0 + o_m // G, i_h * G + o_m % G  # packed row and head of each row of the tile
        o_d = tl.arange(0, BD)
        b_there = o_m < n * G
        b_in = b_there[:, None] & (o_d < D)[None, :]
        p_q = q + (o_n * stride_qn + o_g.to(tl.int64) * stride_qh)[:, None] + o_d[None, :]
        b_q = tl.load(p_q, mask=b_in, other=0.0)  # [BM, BD]
        page0 = tl.load(arena + i_b * kv_heads + i_h)
        p_k = k + row0 * stride_kn + i_h.to(tl.int64) * stride_kh
        p_v = v + row0 * stride_vn + i_h.to(tl.int64) * stride_vh
        p_read = read_slots + i_b.to(tl.int64) * stride_rb + i_h * stride_rh
        entries = entries_of(p_read, S)
        tiles_h = tl.cdiv(entries * PS, BN)
        b_acc, b_sum, b_shift = attend_range(
            0, tiles_h + tl.cdiv(n, BN), tiles_h, b_q, p_k, p_v, stride_kn, stride_vn, n, pages, page_scales,
            page0, p_read, entries, scale_log2, D, BD, PS, BM, BN, FULL_FIRST,
        )  # fmt: skip
        b_acc, b_lse = finished(b_acc, b_sum, b_shift, scale_log2)
        p_out = out + ((o_n * (kv_heads * G) + o_g) * D)[:, None] + o_d[None, :]
        tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=b_in)
        tl.store(lse + o_g.to(tl.int64) * T + o_n, b_lse, mask=b_there)
        p_write = write_slots + i_b.to(tl.int64) * stride_wb + i_h * stride_wh
        for i_s in range(i_m, S_w, tiles):
            store_page(p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_write, S_w, i_s, D, BD, PS, 16)


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn_ragged`."""
    (rows, heads, head_dim), kv_heads, entries = q.shape, k.shape[1], read_slots.shape[2]
    sequences, group = len(row_starts) - 1, heads // kv_heads
    average = rows * group // sequences
    tile = attn_tile(
        describe(q.device).arch, head_dim, q.element_size(), average, max(entries, LEAST_ENTRIES),
        pages.dtype == torch.int8,
    )  # fmt: skip
    out, lse = q.new_empty(q.shape), q.new_empty(heads, rows, dtype=torch.float32)
    tiles_m = rows * group // tile.block_m + sequences  # Σ ⌈n · G / BM⌉ is no more
    bound = tile.most_registers(group)
    with on_device(q):
        attn_ragged_kernel[tiles_m * kv_heads,](
            q, k, v, pages, page_scales, arena, read_slots, write_slots, row_starts, out, lse, *q.stride()[:2],
            *k.stride()[:2], *v.stride()[:2], *table_strides(read_slots), *table_strides(write_slots), rows, sequences,
            entries, write_slots.shape[2], kv_heads, softmax_scale / math.log(2), tiles_m, G=group, D=head_dim,
            BD=padded(head_dim), PS=pages.shape[2], BM=tile.block_m, BN=tile.block_n,
            NB=triton.next_power_of_2(sequences), FULL_FIRST=tile.full_first, num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=bound and max(bound, LEAST_REGISTERS), enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
