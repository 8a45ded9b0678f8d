"""The Triton backend as the ops see it; Triton itself is imported with the first call."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor


def unavailable(device_type: str, forced: bool) -> str | None:
    """Why Triton cannot serve calls on a device type, None if it can.

    On the CPU its interpreter runs the kernels, for tests: only if it is on (TRITON_INTERPRET=1) and forced.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU it needs its interpreter (TRITON_INTERPRET=1)"
    if device_type == "cpu" and not forced:
        return "on the CPU it serves only when forced"
    return None


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    from amskv_kernels.ops.backends.triton.attn import attn

    return attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale)


def append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    """See `amskv_kernels.ops.append`."""
    from amskv_kernels.ops.backends.triton.append import append

    append(k, v, pages, arena, write_slots)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2norm: bool, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.prepare_qk`."""
    from amskv_kernels.ops.backends.triton.prepare_qk import prepare_qk

    return prepare_qk(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str
) -> Tensor:  # fmt: skip
    """See `amskv_kernels.ops.window_scores`."""
    from amskv_kernels.ops.backends.triton.window_scores import window_scores

    return window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    from amskv_kernels.ops.backends.triton.compact import compact

    compact(pages, arena, src_slots, k, v, keep, dst_slots)
