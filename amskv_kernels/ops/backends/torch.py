"""The ops in plain PyTorch, on any device: gather the named rows, attend, store.

It is what a CPU without the native library runs, and a GPU that has neither the CUDA library nor Triton. Tables are
read on the host and become rows of indices; a prepared call does so once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amskv_kernels.ops.checks import DTYPES, PAGE_DTYPES, PlannedAttn
from amskv_kernels.ops.quantise import dequantise, quantise
from amskv_kernels.ops.ragged import by_neighbours
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK

__all__ = [
    "DTYPES", "PAGE_DTYPES", "append", "attn", "attn_ragged", "compact", "prepare_qk", "prepared_attn", "unavailable",
    "window_scores",
]  # fmt: skip

Table = npt.NDArray[np.int64]


def unavailable(device: torch.device, forced: bool) -> str | None:
    """None: it serves every device."""
    return None


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    pool, first = _Pool.of(pages, page_scales), _on_host(arena)
    history = _History.of(first, read_slots, pages.shape[2], k.shape[1])
    store = _Store.of(first, write_slots, pages.shape[2], k.shape[1])
    return _attend(q, k, v, pool, history, store, softmax_scale)


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn_ragged`."""
    return by_neighbours(attn, q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales)


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` with its indices worked out once, for all equal parts of the pool: arenas where heads have one table, else
    sequences, whose heads may or may not share an arena."""
    pages, page_size = call.pages, call.pages.shape[2]
    alike = call.read_slots.shape[1] == call.write_slots.shape[1] == 1
    pool = _Pool.of(pages, call.page_scales, call.arena.numel() if alike else len(call.arena))
    first = np.zeros((1, 1), dtype=np.int64) if alike else _on_host(call.arena[:1])
    history = _History.of(first, call.read_slots, page_size, call.n)
    store = _Store.of(first, call.write_slots, page_size, call.n)

    def ready(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        return _attend(q, k, v, pool, history, store, softmax_scale)[0]

    return ready


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.append`."""
    store, pool = _Store.of(_on_host(arena), write_slots, pages.shape[2], k.shape[1]), _Pool.of(pages, page_scales)
    store.run(pool.kept(k.transpose(1, 2)), pool.kept(v.transpose(1, 2)), pool)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2norm: bool, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.prepare_qk`."""
    heads = qkv.shape[2] - 2 * kv_heads
    q, k = qkv.float()[:, :, : heads + kv_heads].split([heads, kv_heads], dim=2)
    if l2norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=eps) for x in (q, k))
    if q_scale is not None:
        q = q * q_scale[:, None]
    if cos is not None and sin is not None:
        q, k = (_rotate(x, cos[:, None], sin[:, None]) for x in (q, k))
    out_q, out_k = (x.new_empty(x.shape, dtype=qkv.dtype) for x in (q, k))
    return out_q.copy_(q), out_k.copy_(k)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str,
    page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `amskv_kernels.ops.window_scores`."""
    kv_heads, head_dim = k.shape[2:]
    first, named = _padded_rows(pages, arena, read_slots)
    rows = torch.where(named, first, 0)
    history = pages.view(-1, head_dim)[rows]
    if page_scales is not None:
        history = dequantise(history, page_scales.flatten()[rows])
    keys = torch.cat([history.float(), k.transpose(1, 2).float()], dim=2)  # [B, Hkv, N, D]
    grouped = q_window.float().unflatten(2, (kv_heads, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    logits = (grouped @ keys.mT) * softmax_scale  # [B, Hkv, W·G, N]
    absent = torch.nn.functional.pad(~named, (0, k.shape[1]))[:, :, None]
    logits = logits.masked_fill(absent, -torch.inf)
    if mode == "softmax":
        logits = logits.softmax(-1)
    return logits.sum(2).masked_fill(absent[:, :, 0], -torch.inf)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    n, head_dim, page_size = k.shape[1], k.shape[3], pages.shape[2]
    first, _ = _padded_rows(pages, arena, src_slots)
    keep, history = keep.long(), first.shape[2]
    paged = keep < history
    source = first.gather(2, torch.where(paged, keep, 0)) if history else torch.zeros_like(keep)
    current = torch.where(paged, 0, keep - history)[..., None].expand(-1, -1, -1, head_dim)
    pool, kept = _Pool.of(pages, page_scales), []
    for x, shift in ((k, 0), (v, page_size)):
        rows = x.transpose(1, 2).gather(2, current) if n else x.new_zeros(current.shape)
        parts = zip(pool.parts, pool.kept(rows), strict=True)
        kept.append(tuple(torch.where(paged[..., None], part[0][source + shift], new) for part, new in parts))
    store = _Store.of(_on_host(arena), dst_slots, page_size, keep.shape[2])
    store.run(kept[0], kept[1], pool)


class _Pool(NamedTuple):
    """The pool as rows, in equal parts that indices count from.

    Attributes:
        parts: (parts, rows, D) of the pages and, where they are int8, (parts, rows, 1) of their scales.
    """

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, pages: Tensor, page_scales: Tensor | None, count: int = 1) -> _Pool:
        rows = pages.view(count, -1, pages.shape[3])
        return cls((rows,) if page_scales is None else (rows, page_scales.view(count, -1, 1)))

    @property
    def exact(self) -> bool:
        """Whether it holds rows as they are."""
        return len(self.parts) == 1

    def kept(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each part keeps of rows (…, D)."""
        if self.exact:
            return (x,)
        rows, scales = quantise(x)
        return rows, scales[..., None]

    def read(self, index: Tensor, out: Tensor) -> None:
        """The rows of every part of the pool, into `out` (parts, index, D)."""
        if self.exact:
            torch.index_select(self.parts[0], 1, index, out=out)
        else:
            rows, scales = (part.index_select(1, index) for part in self.parts)
            torch.mul(rows, scales, out=out)


class _History(NamedTuple):
    """The rows to gather, as indices into each equal part of the pool.

    Attributes:
        rows: of K, and of V a page size further; the `held` of each table side by side, each followed by n of any row
            where there are several: the gathered rows are then a buffer that has room for the current ones.
        held: columns that any table names.
        hidden: which of them a table does not name, None where all name all.
    """

    rows: tuple[Tensor, Tensor]
    held: int
    hidden: Tensor | None

    @classmethod
    def of(cls, first: Table, slots: Tensor, page_size: int, n: int) -> _History:
        entries = _on_host(slots)
        row = np.arange(page_size)
        named = (row < (entries & ROWS_MASK)[..., None]).reshape(*entries.shape[:2], entries.shape[2] * page_size)
        columns = np.flatnonzero(named.any((0, 1)))
        named = named[..., columns]
        page = first[..., None] + (entries >> ROWS_BITS)[..., columns // page_size]
        index = np.where(named, page * (2 * page_size) + columns % page_size, 0)
        if first.size > 1:
            index = np.pad(index, ((0, 0), (0, 0), (0, n)))
        hidden = None if named.all() else torch.from_numpy(~named).to(slots.device)
        return cls(_of_k_and_v(index.ravel(), page_size, slots.device), len(columns), hidden)


class _Store(NamedTuple):
    """The rows to write, as indices into each equal part of the pool, and what becomes zero.

    Attributes:
        target: rows of K and of V.
        source: the current row that each takes, tables side by side; None where they take all of them in order.
        blank: rows of K and of V that become zero.
    """

    target: tuple[Tensor, Tensor]
    source: Tensor | None
    blank: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, first: Table, slots: Tensor, page_size: int, n: int) -> _Store:
        entries = _on_host(slots)
        rows = entries & ROWS_MASK
        row = np.arange(page_size)
        before = rows.cumsum(-1) - rows - (rows.sum(-1, keepdims=True) - n)
        tables = n * np.arange(first.size).reshape(*first.shape, 1, 1)
        target = (first[..., None] + (entries >> ROWS_BITS))[..., None] * (2 * page_size) + row  # [·, ·, S, page_size]
        new = before[..., None] + row
        own, past = (row < rows[..., None]) & (new >= 0), (row >= rows[..., None]) & (rows[..., None] > 0)
        own, past, source = (np.broadcast_to(x, target.shape) for x in (own, past, new))
        source = (tables + source)[own]
        everything = np.array_equal(source, np.arange(n * first.size))
        device = slots.device
        taken = None if everything else torch.from_numpy(source).to(device)
        target_of, blank_of = (_of_k_and_v(x, page_size, device) for x in (target[own], target[past]))
        return cls(target_of, taken, blank_of)

    def run(self, k: tuple[Tensor, ...], v: tuple[Tensor, ...], pool: _Pool) -> None:
        """Store what each part of the pool keeps of k, v, (B, Hkv, n, ·)."""
        if self.target[0].numel() == 0:
            return
        for new, target, blank in zip((k, v), self.target, self.blank, strict=True):
            for part, x in zip(pool.parts, new, strict=True):
                rows = x.reshape(part.shape[0], -1, part.shape[2])
                if self.source is not None:
                    rows = rows.index_select(1, self.source)
                part.index_copy_(1, target, rows)
                if blank.numel():
                    part.index_fill_(1, blank, 0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pool: _Pool, history: _History, store: _Store, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp; history and current rows are copied once, into the buffers that attention reads.

    Where pages are int8 those are fp32: a row's bytes times its scale are not rounded again.
    """
    (batch, n, heads, head_dim), kv_heads, held = q.shape, k.shape[2], history.held
    dtype = k.dtype if pool.exact or not held else torch.float32
    buffers = k.new_empty(2, batch, kv_heads, held + n, head_dim, dtype=dtype)
    for buffer, x, rows in zip(buffers.unbind(0), (k, v), history.rows, strict=True):
        if held:
            pool.read(rows, buffer.view(pool.parts[0].shape[0], -1, head_dim)[:, : rows.numel()])
            if history.hidden is not None:  # 0 · NaN is NaN: what is not named must not be there at all
                buffer[:, :, :held].masked_fill_(history.hidden[..., None], 0)
        buffer[:, :, held:].copy_(x.transpose(1, 2))
    # No mask depends on the query, so a group's heads are just more query rows of its KV head.
    queries = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    bias = None
    if history.hidden is not None:
        bias = buffers.new_zeros(batch, kv_heads, 1, held + n)
        bias[..., :held].masked_fill_(history.hidden[:, :, None], -torch.inf)
    out, lse = _softmax(queries.to(dtype), buffers[0], buffers[1], bias, scale)
    if store.target[0].numel():
        store.run(pool.kept(buffers[0, :, :, held:]), pool.kept(buffers[1, :, :, held:]), pool)
    out = out.to(q.dtype).view(batch, kv_heads, -1, n, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, n, heads, head_dim).contiguous(), lse.reshape(batch, heads, n).contiguous()


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with its log-sum-exp, which the public scaled_dot_product_attention does not give."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=softmax_scale
        )
        lse = lse.float()
        # It gives 0 and 0 where it finds no finite score, NaN ones among them: such calls are done again below.
        if math.isfinite(float((lse + lse.reciprocal()).sum())):
            return out, lse
    scores = (q.float() @ k.float().mT) * softmax_scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return (weights @ v.float()).to(q.dtype), lse.masked_fill(lse.isposinf(), math.nan)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the last dimension."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _padded_rows(pages: Tensor, arena: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Hkv, S · page_size) rows in the pool of every row of every entry's page, and whether it is named."""
    page_size = pages.shape[2]
    row = torch.arange(page_size, device=slots.device)
    page = arena.long()[:, :, None] + (slots >> ROWS_BITS)
    first = (page[..., None] * (2 * page_size) + row).flatten(2)
    return first, (row < (slots & ROWS_MASK)[..., None]).flatten(2).expand_as(first)


def _of_k_and_v(rows: Table, page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of K's rows, and of V's, which lie a page size further."""
    own = torch.from_numpy(rows).to(device)
    return own, own + page_size


def _on_host(table: Tensor) -> npt.NDArray[Any]:
    return table.cpu().numpy().astype(np.int64, copy=False)
