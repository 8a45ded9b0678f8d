"""The Triton backend as the ops see it; Triton itself is imported with the first call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from amskv_kernels.ops.checks import DTYPES, PAGE_DTYPES, PlannedAttn

__all__ = [
    "DTYPES",
    "PAGE_DTYPES",
    "append",
    "attn",
    "attn_ragged",
    "compact",
    "prepare_qk",
    "prepared_attn",
    "unavailable",
    "window_scores",
]


def unavailable(device: torch.device, forced: bool) -> str | None:
    """Why Triton cannot serve calls on a device, None if it can.

    On the CPU its interpreter runs the kernels, for tests: only if it is on (TRITON_INTERPRET=1) and forced.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "on the CPU it needs its interpreter (TRITON_INTERPRET=1)"
    if device.type == "cpu" and not forced:
        return "on the CPU it serves only when forced"
    try:
        import triton
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton does not import: {error}"
    except Exception as error:  # a broken installation raises whatever it likes
        return f"Triton does not import: {type(error).__name__}: {error}"
    if not hasattr(triton, "jit"):
        return "what is installed as triton has no triton.jit"
    compilers = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    if not interpreted and not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and {' or '.join(compilers)} is not on PATH"
    return None


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    from amskv_kernels.ops.backends.triton.attn import attn

    return attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn_ragged`."""
    from amskv_kernels.ops.backends.triton.attn_ragged import attn_ragged

    return attn_ragged(q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales)


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` with its launch worked out once for each layout of q, k and v."""
    from amskv_kernels.ops.backends.triton.attn import prepared_attn

    return prepared_attn(call)


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.append`."""
    from amskv_kernels.ops.backends.triton.append import append

    append(k, v, pages, arena, write_slots, page_scales)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2norm: bool, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.prepare_qk`."""
    from amskv_kernels.ops.backends.triton.prepare_qk import prepare_qk

    return prepare_qk(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str,
    page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `amskv_kernels.ops.window_scores`."""
    from amskv_kernels.ops.backends.triton.window_scores import window_scores

    return window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode, page_scales)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    from amskv_kernels.ops.backends.triton.compact import compact

    compact(pages, arena, src_slots, k, v, keep, dst_slots, page_scales)
