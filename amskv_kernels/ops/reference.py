"""The slow truth: the ops as their definitions read, one sequence and head at a time, in fp64."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from amskv_kernels.ops.quantise import quantise
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(softmax_scale · q [history, k]ᵀ) [history, v], then the store.

    A query that scores −inf with every key is as one without a key: 0 and −inf. A score of +inf or NaN makes both NaN.

    Returns:
        out (B, n, H, D) and lse (B, H, n), natural log, both fp64.
    """
    (batch, n, heads, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    out = q.new_zeros(batch, n, heads, head_dim, dtype=torch.float64)
    lse = q.new_full((batch, heads, n), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            named = _named(arena, read_slots, b, h // group)
            keys, values = (
                torch.cat(
                    [*(_rows(pages, page_scales, page, i, rows) for page, rows in named), x[b, :, h // group].double()]
                )
                for i, x in enumerate((k, v))
            )
            scores = softmax_scale * q[b, :, h].double() @ keys.T
            lse[b, h] = own = scores.logsumexp(-1)
            out[b, :, h] = (scores - own.masked_fill(own == -torch.inf, 0)[:, None]).exp() @ values
    lse[lse == torch.inf] = torch.nan
    append(k, v, pages, arena, write_slots, page_scales)
    return out, lse


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attn` of every sequence by itself.

    Returns:
        out (T, H, D) and lse (H, T), both fp64.
    """
    found = []
    for i, (start, end) in enumerate(pairwise(row_starts.tolist())):
        own_q, own_k, own_v = (x[None, start:end] for x in (q, k, v))
        own_arena, read, write = (x[i % len(x)][None] for x in (arena, read_slots, write_slots))
        found.append(attn(own_q, own_k, own_v, pages, own_arena, read, write, softmax_scale, page_scales))
    out, lse = zip(*found, strict=True)
    return torch.cat(out, 1)[0], torch.cat(lse, 2)[0]


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """Rows of k, v in order, page by page, after the rows the first page holds; the rest of a page becomes 0."""
    _store(_kept(k, page_scales), _kept(v, page_scales), _pools(pages, page_scales), arena, write_slots)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    l2norm: bool = False, eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x / max(‖x‖, eps), q times its head's scale, then every pair (2i, 2i + 1) turned by its angle; fp64."""
    heads = qkv.shape[2] - 2 * kv_heads
    q, k = qkv[:, :, :heads].double(), qkv[:, :, heads : heads + kv_heads].double()
    if l2norm:
        q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(eps) for x in (q, k))
    if q_scale is not None:
        q = q * q_scale.double()[:, None]
    if cos is not None and sin is not None:
        turn = torch.complex(cos.double(), sin.double())[:, None]  # [n, 1, D/2]
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
    return q, k


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str,
    page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Per KV head and key: logits, or their softmax over the keys, summed over the window and the group's heads.

    Returns:
        (B, Hkv, S · page_size + n) fp64 in the order [rows of each entry, rows of k]; −inf for a row not named.
    """
    (batch, n, kv_heads, _), page_size = k.shape, pages.shape[2]
    group = q_window.shape[2] // kv_heads
    scores = torch.full((batch, kv_heads, read_slots.shape[2] * page_size + n), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            keys, index = _keys(k, pages, page_scales, arena, read_slots, b, h)
            for g in range(h * group, (h + 1) * group):
                logits = softmax_scale * q_window[b, :, g].double() @ keys.T
                each = logits.softmax(-1) if mode == "softmax" else logits
                scores[b, h, index] = scores[b, h, index].nan_to_num(neginf=0) + each.sum(0)
    return scores


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """The rows that `keep` counts, in the key order of `window_scores`, stored as by `append`, none rounded twice."""
    page_size, pools = pages.shape[2], _pools(pages, page_scales)
    current = [_kept(x, page_scales) for x in (k, v)]
    kept = [[x.new_empty(x.shape[0], keep.shape[2], *x.shape[2:]) for x in parts] for parts in current]
    for b in range(k.shape[0]):
        for h in range(k.shape[2]):
            slots = src_slots[b % src_slots.shape[0], h % src_slots.shape[1]].tolist()
            for to, i in enumerate(keep[b, h].tolist()):
                entry, row = divmod(i, page_size)
                for which, new in enumerate(kept):
                    for new_part, part, pool in zip(new, current[which], pools, strict=True):
                        if entry < len(slots):
                            page = int(arena[b, h]) + (slots[entry] >> ROWS_BITS)
                            new_part[b, to, h] = pool[page, which, row]
                        else:
                            new_part[b, to, h] = part[b, i - len(slots) * page_size, h]
    _store(kept[0], kept[1], pools, arena, dst_slots)


def _pools(pages: Tensor, page_scales: Tensor | None) -> list[Tensor]:
    return [pages] if page_scales is None else [pages, page_scales]


def _kept(x: Tensor, page_scales: Tensor | None) -> list[Tensor]:
    """What each of the pools keeps of rows."""
    return [x] if page_scales is None else [*quantise(x)]


def _store(k: list[Tensor], v: list[Tensor], pools: list[Tensor], arena: Tensor, write_slots: Tensor) -> None:
    batch, n, kv_heads = k[0].shape[:3]
    for b in range(batch):
        for h in range(kv_heads):
            named = _named(arena, write_slots, b, h)
            done = n - sum(rows for _, rows in named)  # below 0: minus the rows already there
            for page, rows in named:
                first = max(0, -done)
                for i, parts in enumerate((k, v)):
                    for pool, part in zip(pools, parts, strict=True):
                        pool[page, i, first:rows] = part[b, done + first : done + rows, h]
                        pool[page, i, rows:] = 0
                done += rows


def _rows(pages: Tensor, page_scales: Tensor | None, page: int, which: int, rows: int) -> Tensor:
    """The first rows of a page, of K (0) or V (1), in fp64."""
    named = pages[page, which, :rows].double()
    return named if page_scales is None else named * page_scales[page, which, :rows, None].double()


def _keys(
    k: Tensor, pages: Tensor, page_scales: Tensor | None, arena: Tensor, slots: Tensor, b: int, h: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A head's keys (N, D) in fp64, and where each stands in the order with a full page per entry."""
    page_size, keys, index = pages.shape[2], [], []
    for i, slot in enumerate(slots[b % slots.shape[0], h % slots.shape[1]].tolist()):
        rows = slot & ROWS_MASK
        if rows:
            keys.append(_rows(pages, page_scales, int(arena[b, h]) + (slot >> ROWS_BITS), 0, rows))
        index.append(i * page_size + torch.arange(rows))
    keys.append(k[b, :, h].double())
    index.append(slots.shape[2] * page_size + torch.arange(k.shape[1]))
    return torch.cat(keys), torch.cat(index)


def _named(arena: Tensor, slots: Tensor, b: int, h: int) -> list[tuple[int, int]]:
    """The (page, rows) that the slots of one sequence and head name."""
    own = slots[b % slots.shape[0], h % slots.shape[1]].tolist()
    return [(int(arena[b, h]) + (s >> ROWS_BITS), s & ROWS_MASK) for s in own if s & ROWS_MASK]
