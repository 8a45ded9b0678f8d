"""The ops in plain PyTorch, on any device: gather the named rows, attend, store.

It is what a CPU runs, and a GPU that has neither the CUDA library nor Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.checks import check_tables
from amskv_kernels.layout import ROWS_BITS, ROWS_MASK


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
