"""`window_scores`: how much an observation window attends to each key.

One program per tile of keys and KV head. Summed logits are one pass. For summed probabilities a first pass leaves
each tile's log-sum-exp, and the second merges all tiles' in order, recomputes its own logits and sums: twice the
reads of K, but every tile is a program of its own, where one program per head would leave most of a GPU idle.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.attend import key_rows, page_rows, tile_slots
from amskv_kernels.ops.backends.triton.common import LN2, as_type, on_device, padded, product, table_strides

BLOCK_N = 64  # keys of a program: 8 … 16 KB in flight. Not yet measured.
MAX_M = 128  # query rows of a program
EIGHT_BIT_REGISTERS = 128  # more than it takes; without a bound the assembler aims at 56 or 72, and spills
MERGE = 32  # tiles whose sums are merged at once
NO_SPECIAL = ["stride_rb", "stride_rh", "n", "S", "W", "kv_heads", "tiles"]


@triton.jit
def tile_logits(
    q, k, pages, page_scales, arena, read_slots, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_rb, stride_rh, n, S, W, kv_heads, scale_log2, i_t, i_bh,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Logits [BM, BN] in powers of two of the window and tile `i_t`, −inf where no key is; and where keys are."""
    i_h = (i_bh % kv_heads).to(tl.int64)
    i_b = (i_bh // kv_heads).to(tl.int64)
    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    o_w, o_g = (o_m // G).to(tl.int64), i_h * G + o_m % G
    p_q = q + i_b * stride_qb + o_w[:, None] * stride_qn + o_g[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=(o_m < W * G)[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = k + i_b * stride_kb + i_h * stride_kh
    tiles_h = tl.cdiv(S * PS, BN)
    history = i_t < tiles_h
    i_own = tl.where(history, i_t, i_t - tiles_h)
    slot = tile_slots(i_own, history, read_slots + i_b * stride_rb + i_h * stride_rh, S, PS, BN)
    page0 = tl.load(arena + i_bh)
    pool = pages if page_scales is None else p_k  # eight bits are another type: they are loaded below, in their place
    b_pk, _, b_there = key_rows(i_own, history, slot, p_k, p_k, stride_kn, stride_kn, n, pool, page0, D, PS, BN)
    b_load = b_there[:, None] & (o_d < D)[None, :]
    if page_scales is None:
        b_k = tl.load(b_pk[:, None] + o_d[None, :], mask=b_load, other=0.0)  # [BN, BD]
        b_s = product(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32)) * scale_log2
    else:
        p_old, p_scale, b_old = page_rows(i_own, slot, pages, page_scales, page0, D, PS, BN)  # none there past history
        b_k = tl.load(b_pk[:, None] + o_d[None, :], mask=b_load & (b_old == 0)[:, None], other=0.0)
        b_8 = tl.load(p_old[:, None] + o_d[None, :], mask=b_load & b_old[:, None], other=0.0)
        b_k = tl.where(b_old[:, None], as_type(b_8, b_k.dtype), b_k)
        b_scale = tl.load(p_scale, mask=b_old, other=1.0)
        b_s = product(b_q, tl.trans(b_k), tl.zeros([BM, BN], tl.float32)) * (b_scale * scale_log2)[None, :]
    return tl.where(b_there[None, :], b_s, float("-inf")), b_there


@triton.jit(do_not_specialize=NO_SPECIAL)
def window_sums_kernel(
    q, k, pages, page_scales, arena, read_slots, sums,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_rb, stride_rh,
    n, S, W, kv_heads, tiles, scale_log2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles · KV heads · B,); sums (KV heads · B, tiles, BM): log2 of the sum of 2^logit over the tile."""
    i_t, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b_s, _ = tile_logits(
        q, k, pages, page_scales, arena, read_slots, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
        stride_rb, stride_rh, n, S, W, kv_heads, scale_log2, i_t, i_bh, G, D, BD, PS, BM, BN,
    )  # fmt: skip
    b_max = tl.max(b_s, 1)
    b_ref = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = b_ref + tl.log2(tl.sum(tl.exp2(b_s - b_ref[:, None]), 1))
    o_m = tl.arange(0, BM)
    tl.store(sums + (i_bh.to(tl.int64) * tiles + i_t) * BM + o_m, b_sum)


@triton.jit(do_not_specialize=NO_SPECIAL)
def window_scores_kernel(
    q, k, pages, page_scales, arena, read_slots, sums, scores,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_rb, stride_rh,
    n, S, W, kv_heads, tiles, scale_log2,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MERGE: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Grid (tiles · KV heads · B,)."""
    i_t, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b_s, b_there = tile_logits(
        q, k, pages, page_scales, arena, read_slots, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
        stride_rb, stride_rh, n, S, W, kv_heads, scale_log2, i_t, i_bh, G, D, BD, PS, BM, BN,
    )  # fmt: skip
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    if SOFTMAX:
        p_sums = sums + i_bh.to(tl.int64) * tiles * BM + o_m
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_all = tl.zeros([BM], tl.float32)
        for i_0 in range(0, tiles, MERGE):
            o_t = i_0 + tl.arange(0, MERGE)
            b_tile = tl.load(
                p_sums + o_t[:, None] * BM, mask=(o_t < tiles)[:, None], other=float("-inf")
            )  # [MERGE, BM]
            b_new = tl.maximum(b_max, tl.max(b_tile, 0))
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_all = b_all * tl.exp2(b_max - b_ref) + tl.sum(tl.exp2(b_tile - b_ref[None, :]), 0)
            b_max = b_new
        b_s = tl.exp2(b_s - (b_max + tl.log2(b_all))[:, None])
    else:
        b_s = b_s * LN2
    b_score = tl.sum(tl.where((o_m < W * G)[:, None], b_s, 0.0), 0)
    b_score = tl.where(b_there, b_score, float("-inf"))
    tiles_h = tl.cdiv(S * PS, BN)
    history = i_t < tiles_h
    o_key = tl.where(history, i_t * BN, S * PS + (i_t - tiles_h) * BN) + o_n
    b_mask = o_key < tl.where(history, S * PS, S * PS + n)
    tl.store(scores + i_bh.to(tl.int64) * (S * PS + n) + o_key, b_score, mask=b_mask)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str,
    page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `amskv_kernels.ops.window_scores`."""
    (batch, window, heads, head_dim), (n, kv_heads) = q_window.shape, k.shape[1:3]
    page_size, entries = pages.shape[2], read_slots.shape[2]
    scores = k.new_empty(batch, kv_heads, entries * page_size + n, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    group = heads // kv_heads
    if window * group > MAX_M and window > 1:  # queries do not meet: their scores add up
        parts = q_window.split(max(1, MAX_M // group), dim=1)
        return sum(
            (window_scores(part, k, pages, arena, read_slots, softmax_scale, mode, page_scales) for part in parts),
            scores.zero_(),
        )
    block_m = max(16, triton.next_power_of_2(window * group))
    tiles = triton.cdiv(entries * page_size, BLOCK_N) + triton.cdiv(n, BLOCK_N)
    grid = (tiles * kv_heads * batch,)
    tensors = (q_window, k, pages, page_scales, arena, read_slots)
    scalars = (
        *q_window.stride()[:3], *k.stride()[:3], *table_strides(read_slots),
        n, entries, window, kv_heads, tiles, softmax_scale / math.log(2),
    )  # fmt: skip
    sizes = {"G": group, "D": head_dim, "BD": padded(head_dim), "PS": page_size, "BM": block_m, "BN": BLOCK_N}
    sizes["maxnreg"] = None if page_scales is None else EIGHT_BIT_REGISTERS
    softmax = mode == "softmax"
    with on_device(k):
        sums = scores
        if softmax:
            sums = k.new_empty(batch * kv_heads, tiles, block_m, dtype=torch.float32)
            window_sums_kernel[grid](*tensors, sums, *scalars, **sizes)
        window_scores_kernel[grid](*tensors, sums, scores, *scalars, **sizes, MERGE=MERGE, SOFTMAX=softmax)
    return scores
