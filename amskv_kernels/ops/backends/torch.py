"""The ops in plain PyTorch, on any device: gather the named rows, attend, store.

It is what a CPU runs, and a GPU that has neither the CUDA library nor Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.ops.tables import check_keep, check_tables
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`; tables are checked first where that costs no device wait."""
    batch, n, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if pages.device.type == "cpu":
        check_tables(pages, arena, read_slots, write_slots, n)
    history_k, history_v, hidden = _gather(pages, arena, read_slots)
    keys = torch.cat([history_k, k.transpose(1, 2)], dim=2)  # [B, Hkv, N, D]
    values = torch.cat([history_v, v.transpose(1, 2)], dim=2)
    # No mask depends on the query, so a group's heads are just more query rows of its KV head.
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(batch, heads, n, dtype=torch.float32)
    grouped = q.view(batch, n, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, n, D]
    queries = grouped.reshape(batch, kv_heads, -1, head_dim)
    bias = None
    if hidden is not None:
        bias = keys.new_zeros(batch, kv_heads, 1, keys.shape[2])
        bias[..., : hidden.shape[-1]].masked_fill_(hidden[:, :, None], -torch.inf)
    out, lse = _attend(queries, keys, values, bias, softmax_scale)
    _store(k, v, pages, arena, write_slots)
    out = out.view(batch, kv_heads, -1, n, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, n, heads, head_dim).contiguous(), lse.reshape(batch, heads, n).contiguous()


def append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    """See `amskv_kernels.ops.append`."""
    if pages.device.type == "cpu":
        check_tables(pages, arena, write_slots[..., :0], write_slots, k.shape[1])
    _store(k, v, pages, arena, write_slots)


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
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str
) -> Tensor:  # fmt: skip
    """See `amskv_kernels.ops.window_scores`."""
    batch, window, _, head_dim = q_window.shape
    kv_heads = k.shape[2]
    if pages.device.type == "cpu":
        check_tables(pages, arena, read_slots, read_slots[..., :0], k.shape[1])
    first, named = _padded_rows(pages, arena, read_slots)
    history = pages.view(-1, head_dim)[torch.where(named, first, 0)]
    keys = torch.cat([history, k.transpose(1, 2)], dim=2).float()  # [B, Hkv, N, D]
    grouped = q_window.float().view(batch, window, kv_heads, -1, head_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    logits = (grouped @ keys.mT) * softmax_scale  # [B, Hkv, W·G, N]
    absent = torch.cat([~named, named.new_zeros(batch, kv_heads, k.shape[1])], dim=2)[:, :, None]
    logits = logits.masked_fill(absent, -torch.inf)
    if mode == "softmax":
        logits = logits.softmax(-1)
    return logits.sum(2).masked_fill(absent[:, :, 0], -torch.inf)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    n, head_dim, page_size = k.shape[1], k.shape[3], pages.shape[2]
    if pages.device.type == "cpu":
        check_keep(pages, arena, src_slots, keep, dst_slots, n)
    first, _ = _padded_rows(pages, arena, src_slots)
    keep, history = keep.long(), first.shape[2]
    paged = keep < history
    source = first.gather(2, torch.where(paged, keep, 0)) if history else torch.zeros_like(keep)
    current = torch.where(paged, 0, keep - history)[..., None].expand(-1, -1, -1, head_dim)
    pool, kept = pages.view(-1, head_dim), []
    for x, shift in ((k, 0), (v, page_size)):
        rows = x.transpose(1, 2).gather(2, current) if n else x.new_zeros(current.shape)
        kept.append(torch.where(paged[..., None], pool[source + shift], rows).transpose(1, 2))
    _store(kept[0], kept[1], pages, arena, dst_slots)


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


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with its log-sum-exp, which the public scaled_dot_product_attention does not give."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=softmax_scale
        )
        return out, lse.float()
    scores = (q.float() @ k.float().mT) * softmax_scale
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def _gather(pages: Tensor, arena: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Named rows as K, V (B, Hkv, N, D), and which of them (B, Hkv, N) a sequence-and-head does not name."""
    page_size = pages.shape[2]
    row = torch.arange(page_size, device=slots.device)
    named = (row < (slots & ROWS_MASK)[..., None]).flatten(2)  # [B|1, Hkv|1, S·page_size]
    columns = named.any(0).any(0).nonzero()[:, 0]
    named = named[..., columns]
    page = arena.long()[:, :, None] + (slots >> ROWS_BITS)[..., columns // page_size]
    named = named.expand_as(page)
    ragged = not bool(named.all())
    first = page * (2 * page_size) + columns % page_size  # row of K in the pool; V's is page_size further
    if ragged:
        first = torch.where(named, first, 0)
    rows = pages.view(-1, pages.shape[3])
    found = [rows.index_select(0, i.flatten()).view(*page.shape, rows.shape[1]) for i in (first, first + page_size)]
    if ragged:  # 0 · NaN is NaN: what is not named must not be there at all
        found = [x.masked_fill(~named[..., None], 0) for x in found]
    return found[0], found[1], ~named if ragged else None


def _store(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, slots: Tensor) -> None:
    """Write k, v row by row where the slots say, and zeros into the rest of every page written."""
    if slots.shape[-1] == 0:
        return
    (batch, n, kv_heads, head_dim), page_size = k.shape, pages.shape[2]
    rows = (slots & ROWS_MASK).long()
    row = torch.arange(page_size, device=slots.device)
    before = rows.cumsum(-1) - rows - (rows.sum(-1, keepdim=True) - n)
    source = before[..., None] + row  # [B|1, Hkv|1, S, page_size], index into k's rows
    zero = row >= rows[..., None]
    written = (rows[..., None] > 0) & (zero | (source >= 0))
    source = torch.where(zero, n, source).expand(batch, kv_heads, -1, -1)
    page = arena.long()[:, :, None] + (slots >> ROWS_BITS)
    target = page[..., None] * (2 * page_size) + row
    written = written.expand_as(target)
    b, h = torch.arange(batch, device=k.device), torch.arange(kv_heads, device=k.device)
    head = (b[:, None] * kv_heads + h)[..., None, None] * (n + 1)
    flat_target, flat_source = target[written], (head + source)[written]
    pool = pages.view(-1, head_dim)
    for x, shift in ((k, 0), (v, page_size)):
        padded = torch.cat([x.transpose(1, 2), x.new_zeros(batch, kv_heads, 1, head_dim)], dim=2)
        pool.index_copy_(0, flat_target + shift, padded.view(-1, head_dim).index_select(0, flat_source))
