"""`attn`: one kernel gathers history through the page table, reads the current scale in place, and stores it.

A program owns BM query rows of one KV head (with GQA the G heads of a group are rows of the same tile: no mask depends
on the query) and walks all tiles of its keys (`attend`), or one share of them where a second kernel merges the shares
(`attn_merge`).

Storing: each page to be written belongs to one of the head's programs, dealt out in turn. It reads its rows a second
time, which the loop has just brought into L2; keeping the store out of the loop leaves the loop free of branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.attend import attend_range
from amskv_kernels.ops.backends.triton.attn_packed import attn_packed_kernel
from amskv_kernels.ops.backends.triton.common import (
    Start,
    describe,
    finished,
    on_device,
    padded,
    store_page,
    table_strides,
)  # fmt: skip
from amskv_kernels.ops.backends.triton.tiles import attn_tile, split_count
from amskv_kernels.ops.checks import PlannedAttn

NO_SPECIAL = ["stride_rb", "stride_rh", "stride_wb", "stride_wh", "n", "S", "S_w", "kv_heads", "tiles_m", "splits"]


@triton.jit(do_not_specialize=NO_SPECIAL)
def attn_kernel(
    q, k, v, pages, page_scales, arena, read_slots, write_slots, out, lse,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_rb, stride_rh, stride_wb, stride_wh,
    n, S, S_w, kv_heads, scale_log2, tiles_m, splits,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FULL_FIRST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (splits · tiles of n · G rows · KV heads · B,): only the first dimension of a grid may pass 65,535.

    With SPLIT, out and lse have a leading `splits` in fp32.
    """
    step = splits * tiles_m  # programs of a head
    i_m, i_bh = tl.program_id(0) % step, tl.program_id(0) // step
    i_h, i_b = i_bh % kv_heads, (i_bh // kv_heads).to(tl.int64)
    i_out, i_store = i_b, i_m
    if SPLIT:
        i_split = i_m // tiles_m
        i_m %= tiles_m
        i_out += i_split.to(tl.int64) * (tl.num_programs(0) // (step * kv_heads))  # splits · B come first

    o_m = i_m * BM + tl.arange(0, BM)
    o_n, o_g = o_m // G, i_h * G + o_m % G  # query row and head of each row of the tile
    o_d = tl.arange(0, BD)
    b_there = o_m < n * G
    b_in = b_there[:, None] & (o_d < D)[None, :]
    p_q = q + i_b * stride_qb + (o_n.to(tl.int64) * stride_qn + o_g.to(tl.int64) * stride_qh)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=b_in, other=0.0)  # [BM, BD]
    page0 = tl.load(arena + i_b * kv_heads + i_h)
    p_k = k + i_b * stride_kb + i_h.to(tl.int64) * stride_kh
    p_v = v + i_b * stride_vb + i_h.to(tl.int64) * stride_vh
    p_read = read_slots + i_b * stride_rb + i_h * stride_rh

    tiles_h = tl.cdiv(S * PS, BN)
    start, end = 0, tiles_h + tl.cdiv(n, BN)
    if SPLIT:
        share = tl.cdiv(end, splits)
        start = i_split * share
        end = tl.minimum(start + share, end)
    b_acc, b_sum, b_shift = attend_range(
        start, end, tiles_h, b_q, p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_read, S, scale_log2,
        D, BD, PS, BM, BN, FULL_FIRST,
    )  # fmt: skip
    b_acc, b_lse = finished(b_acc, b_sum, b_shift, scale_log2)
    heads = kv_heads * G
    p_out = out + i_out * n * heads * D + ((o_n * heads + o_g).to(tl.int64) * D)[:, None] + o_d[None, :]
    tl.store(p_out, b_acc.to(out.dtype.element_ty), mask=b_in)
    tl.store(lse + i_out * heads * n + o_g * n + o_n, b_lse, mask=b_there)

    p_write = write_slots + i_b * stride_wb + i_h * stride_wh
    for i_s in range(i_store, S_w, step):
        store_page(p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_write, S_w, i_s, D, BD, PS, 16)


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
    b_some = b_sum != 0.0  # NaN too
    b_acc = b_acc / tl.where(b_some, b_sum, 1.0)[:, None]
    tl.store(out + o_row[:, None] * D + o_d[None, :], b_acc.to(out.dtype.element_ty), mask=b_in)
    tl.store(lse + o_lse - o_part + o_row, tl.where(b_some, b_ref + tl.log(b_sum), float("-inf")), mask=b_there)


MOST_LAYOUTS = 8  # that a prepared call remembers: a model uses one


class Launch(NamedTuple):
    """A call of `attn` but for its pointers.

    Attributes:
        start: the kernel on its grid; takes the tensors, then `scalars`.
        scalars: strides, lengths and the scale, then whatever else the kernel takes.
        splits: shares of a head's keys; a second kernel merges more than one.
    """

    start: Callable[..., Any]
    scalars: tuple[Any, ...]
    splits: int


def plan_launch(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, read_slots: Tensor, write_slots: Tensor, softmax_scale: float
) -> Launch:  # fmt: skip
    """How a call is cut and launched, from shapes, strides and the device alone."""
    (batch, n, heads, head_dim), (kv_heads, page_size, entries) = (
        q.shape,
        (k.shape[2], pages.shape[2], read_slots.shape[2]),
    )
    device, group = describe(q.device), heads // kv_heads
    tile = attn_tile(device.arch, head_dim, q.element_size(), n * group, entries, pages.dtype == torch.int8)
    scalars = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *table_strides(read_slots), *table_strides(write_slots),
        n, entries, write_slots.shape[2], kv_heads, softmax_scale / math.log(2),
    )  # fmt: skip
    meta = {
        "G": group, "D": head_dim, "BD": padded(head_dim), "PS": page_size, "BM": tile.block_m, "BN": tile.block_n,
        "num_warps": tile.warps, "num_stages": tile.stages,
        "maxnreg": tile.most_registers(group), "enable_fp_fusion": True,
    }  # fmt: skip
    if tile.heads > 1:
        grid = (triton.cdiv(kv_heads, tile.heads) * batch, 1, 1)
        return Launch(Start(attn_packed_kernel, grid, meta | {"HP": tile.heads}), scalars, 1)
    tiles_m = triton.cdiv(n * group, tile.block_m)
    tiles_n = triton.cdiv(entries * page_size, tile.block_n) + triton.cdiv(n, tile.block_n)
    splits = split_count(tiles_m * kv_heads * batch, tiles_n, device.processors)
    meta |= {"FULL_FIRST": tile.full_first, "SPLIT": splits > 1}
    grid = (splits * tiles_m * kv_heads * batch, 1, 1)
    return Launch(Start(attn_kernel, grid, meta), (*scalars, tiles_m, splits), splits)


def run_launch(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, pool: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch for q, k, v and pages, page_scales, arena, read_slots, write_slots: out and lse."""
    splits = launch.splits
    batch, n, heads, head_dim = q.shape
    out = q.new_empty(batch, n, heads, head_dim)
    lse = q.new_empty(batch, heads, n, dtype=torch.float32)
    with on_device(q):
        if splits == 1:
            launch.start(q, k, v, *pool, out, lse, *launch.scalars)
            return out, lse
        part = q.new_empty(splits, batch, n, heads, head_dim, dtype=torch.float32)
        part_lse = q.new_empty(splits, batch, heads, n, dtype=torch.float32)
        launch.start(q, k, v, *pool, part, part_lse, *launch.scalars)
        rows = batch * n * heads
        # 16 rows of 4 warps: 32 … 64 bytes a lane. Not yet measured; the pass is short and bound by bandwidth.
        attn_merge_kernel[triton.cdiv(rows, 16),](
            part, part_lse, out, lse, rows, n, heads, splits, D=head_dim, BD=padded(head_dim), BR=16, num_warps=4
        )
    return out, lse


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    launch = plan_launch(q, k, v, pages, read_slots, write_slots, softmax_scale)
    return run_launch(launch, q, k, v, (pages, page_scales, arena, read_slots, write_slots))


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` with its launch worked out once for each layout of q, k and v: strides and 16-byte alignment."""
    pool = (call.pages, call.page_scales, call.arena, call.read_slots, call.write_slots)
    known: dict[tuple[object, ...], Launch] = {}

    def ready(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        unaligned = q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16
        layout = (q.shape[2], q.stride(), k.stride(), v.stride(), unaligned, softmax_scale)
        launch = known.get(layout)
        if launch is None:
            if len(known) == MOST_LAYOUTS:
                known.clear()
            launch = plan_launch(q, k, v, call.pages, call.read_slots, call.write_slots, softmax_scale)
            known[layout] = launch
        return run_launch(launch, q, k, v, pool)[0]

    return ready
