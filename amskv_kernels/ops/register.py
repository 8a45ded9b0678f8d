"""What stands behind `torch.ops.amskv.*`: check, choose a backend, call it. Registered once, when this is imported."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.ops.checks import (
    check_apart,
    check_append,
    check_attn,
    check_attn_ragged,
    check_compact,
    check_prepare_qk,
    check_window_scores,
)
from amskv_kernels.ops.dispatch import backend_of, settings
from amskv_kernels.ops.guard import plain_kernels, refuse_backward
from amskv_kernels.ops.schemas import FAKES, SCHEMAS
from amskv_kernels.ops.tables import check_keep, check_row_starts, check_tables


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if (module := _checking_itself("attn", k, pages, q, v, arena, read_slots, write_slots)) is not None:
        with suppress(ValueError):  # named below, as for every backend
            return module.attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, *_given(page_scales))
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)
    check_apart(pages, page_scales, write_slots, q=q, k=k, v=v)
    if _tables_are_read(pages):
        check_tables(pages, arena, read_slots, write_slots, k.shape[1])
    if q.numel() == 0:
        batch, n, heads, _ = q.shape
        return q.new_empty(q.shape), q.new_empty(batch, heads, n, dtype=torch.float32)
    module = backend_of("attn", k.device, k.dtype, pages.dtype)
    return module.attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, *_given(page_scales))


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_attn_ragged(q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales)
    check_apart(pages, page_scales, write_slots, q=q, k=k, v=v)
    if _tables_are_read(pages):
        check_tables(pages, arena, read_slots, write_slots, check_row_starts(row_starts, len(q)))
    if q.numel() == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    module = backend_of("attn_ragged", k.device, k.dtype, pages.dtype)
    return module.attn_ragged(
        q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, *_given(page_scales)
    )


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    if (module := _checking_itself("append", k, pages, v, arena, write_slots)) is not None:
        with suppress(ValueError):
            return module.append(k, v, pages, arena, write_slots, *_given(page_scales))
    check_append(k, v, pages, arena, write_slots, page_scales)
    check_apart(pages, page_scales, write_slots, k=k, v=v)
    if _tables_are_read(pages):
        check_tables(pages, arena, write_slots[..., :0], write_slots, k.shape[1])
    if k.numel() and write_slots.numel():
        module = backend_of("append", k.device, k.dtype, pages.dtype)
        module.append(k, v, pages, arena, write_slots, *_given(page_scales))


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    l2norm: bool = False, eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_prepare_qk(qkv, kv_heads, q_scale, cos, sin, eps)
    module = backend_of("prepare_qk", qkv.device, qkv.dtype, qkv.dtype)
    return module.prepare_qk(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor,
    softmax_scale: float, mode: str = "softmax", page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check_window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode, page_scales)
    if _tables_are_read(pages):
        check_tables(pages, arena, read_slots, read_slots[..., :0], k.shape[1])
    keys = read_slots.shape[2] * pages.shape[2] + k.shape[1]
    if keys == 0 or k.shape[0] == 0:
        return k.new_empty(k.shape[0], k.shape[2], keys, dtype=torch.float32)
    module = backend_of("window_scores", k.device, k.dtype, pages.dtype)
    return module.window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode, *_given(page_scales))


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    if (module := _checking_itself("compact", k, pages, v, arena, src_slots, keep, dst_slots)) is not None:
        with suppress(ValueError):
            return module.compact(pages, arena, src_slots, k, v, keep, dst_slots, *_given(page_scales))
    check_compact(pages, arena, src_slots, k, v, keep, dst_slots, page_scales)
    check_apart(pages, page_scales, dst_slots, k=k, v=v)
    if _tables_are_read(pages):
        check_keep(pages, arena, src_slots, keep, dst_slots, k.shape[1])
    if keep.numel() and dst_slots.numel():
        module = backend_of("compact", k.device, k.dtype, pages.dtype)
        module.compact(pages, arena, src_slots, k, v, keep, dst_slots, *_given(page_scales))


def _given(page_scales: Tensor | None) -> tuple[Tensor, ...]:
    """What a backend is passed of it: one that takes no int8 pages has no such argument."""
    return () if page_scales is None else (page_scales,)


def _checking_itself(op: str, k: Tensor, pages: Tensor, *others: Tensor) -> ModuleType | None:
    """The backend of a call on the CPU whose op checks in C++ what stands below, tables too, and sooner."""
    if not all(isinstance(x, Tensor) and x.is_cpu for x in (k, pages, *others)):
        return None
    with suppress(RuntimeError, TypeError):  # a forced backend that cannot: the arguments are checked first
        module = backend_of(op, k.device, k.dtype, pages.dtype)
        return module if getattr(module, "CHECKS_ITSELF", False) else None
    return None


def _tables_are_read(pages: Tensor) -> bool:
    """Whether slot tables are held against the pool: where that costs no wait for a device, or when asked for."""
    return pages.device.type == "cpu" or settings().debug


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function below autograd and autocast; the dispatcher leaves out arguments that have their default."""

    def kernel(*args: Any) -> Any:
        with plain_kernels():
            return function(*args)

    return kernel


def _register() -> torch.library.Library:
    library = torch.library.Library("amskv", "FRAGMENT")
    for function in (attn, attn_ragged, append, prepare_qk, window_scores, compact):
        name = function.__name__
        library.define(name + SCHEMAS[name], tags=())
        for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):  # the last: a call without any tensor, to be refused
            library.impl(name, _plain(function), key)
        torch.library.register_fake(f"amskv::{name}", FAKES[name], lib=library)
    refuse_backward(library, SCHEMAS)
    return library


if (before := globals().get("LIBRARY")) is not None:  # reloaded: the ops are defined anew
    before._destroy()
LIBRARY = _register()  # its end would take the ops away
