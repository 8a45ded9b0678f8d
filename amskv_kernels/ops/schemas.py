"""The contracts of `torch.ops.amskv.*`: schemas, and fake kernels whose outputs have the real ones' strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.ops.checks import (
    check_append,
    check_attn,
    check_attn_ragged,
    check_compact,
    check_prepare_qk,
    check_window_scores,
)

SCHEMAS = {
    "attn": "(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, Tensor write_slots, "
    "float softmax_scale, Tensor(b!)? page_scales=None) -> (Tensor, Tensor)",
    "attn_ragged": "(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, "
    "Tensor write_slots, Tensor row_starts, float softmax_scale, Tensor(b!)? page_scales=None) -> (Tensor, Tensor)",
    "append": "(Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor write_slots, "
    "Tensor(b!)? page_scales=None) -> ()",
    "prepare_qk": "(Tensor qkv, int kv_heads, Tensor? q_scale=None, Tensor? cos=None, Tensor? sin=None, "
    "bool l2norm=False, float eps=1e-12) -> (Tensor, Tensor)",
    "window_scores": "(Tensor q_window, Tensor k, Tensor pages, Tensor arena, Tensor read_slots, "
    'float softmax_scale, str mode="softmax", Tensor? page_scales=None) -> Tensor',
    "compact": "(Tensor(a!) pages, Tensor arena, Tensor src_slots, Tensor k, Tensor v, Tensor keep, "
    "Tensor dst_slots, Tensor(b!)? page_scales=None) -> ()",
}


def fake_attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)
    batch, n, heads, head_dim = q.shape
    return q.new_empty(batch, n, heads, head_dim), q.new_empty(batch, heads, n, dtype=torch.float32)


def fake_attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_attn_ragged(q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32)


def fake_append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    check_append(k, v, pages, arena, write_slots, page_scales)


def fake_prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    l2norm: bool = False, eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_prepare_qk(qkv, kv_heads, q_scale, cos, sin, eps)
    batch, n, rows, head_dim = qkv.shape
    return qkv.new_empty(batch, n, rows - 2 * kv_heads, head_dim), qkv.new_empty(batch, n, kv_heads, head_dim)


def fake_window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor,
    softmax_scale: float, mode: str = "softmax", page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode, page_scales)
    keys = read_slots.shape[2] * pages.shape[2] + k.shape[1]
    return k.new_empty(k.shape[0], k.shape[2], keys, dtype=torch.float32)


def fake_compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    check_compact(pages, arena, src_slots, k, v, keep, dst_slots, page_scales)


FAKES: dict[str, Callable[..., Any]] = {
    "attn": fake_attn,
    "attn_ragged": fake_attn_ragged,
    "append": fake_append,
    "prepare_qk": fake_prepare_qk,
    "window_scores": fake_window_scores,
    "compact": fake_compact,
}
