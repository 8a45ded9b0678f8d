"""The library's CPU kernels: pages read where they lie, in the widest vectors of this machine, on torch's threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amskv_kernels.ops.backends.library import planned, why_not_loaded
from amskv_kernels.ops.checks import DTYPES, PlannedAttn

__all__ = [
    "CHECKS_ITSELF", "DTYPES", "PAGE_DTYPES",
    "append", "attn", "attn_ragged", "compact", "prepare_qk", "prepared_attn", "unavailable",
]  # fmt: skip

PAGE_DTYPES = (*DTYPES, torch.int8)
CHECKS_ITSELF = True  # slot tables too
LEAVE_REST = True  # of the pages that are stored to


def unavailable(device: torch.device, forced: bool) -> str | None:
    """Why the library does not serve tensors on this device, None if it does."""
    return why_not_loaded() if device.type == "cpu" else f"serves CPU tensors, not {device.type}"


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`."""
    return torch.ops.amskv.attn_cpu.default(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn_ragged`."""
    out, lse = torch.ops.amskv.attn_ragged_cpu(
        q[None], k[None], v[None], pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales
    )
    return out[0], lse[0]


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` as one dispatcher call. What stores leave of their pages is not zeroed: nothing on the CPU reads it."""
    return planned(torch.ops.amskv.attn_cpu.default, call, LEAVE_REST)


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.append`."""
    torch.ops.amskv.append_cpu.default(k, v, pages, arena, write_slots, page_scales)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.compact`."""
    torch.ops.amskv.compact_cpu.default(pages, arena, src_slots, k, v, keep, dst_slots, page_scales)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2norm: bool, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.prepare_qk`."""
    return torch.ops.amskv.prepare_qk_cpu.default(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)
