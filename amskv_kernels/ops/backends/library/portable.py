"""The CUDA library's portable kernels, for every NVIDIA GPU from sm_80 on; fp16 and bf16, pages of int8 too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amskv_kernels.ops.backends.library import planned, why_no_cuda
from amskv_kernels.ops.checks import PlannedAttn

# Compute capabilities on which the library's kernels are the default: those with a test report from a GPU.
TESTED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()
DTYPES = (torch.float16, torch.bfloat16)
PAGE_DTYPES = (*DTYPES, torch.int8)
CHECKS_ITSELF = True


def unavailable(device: torch.device, forced: bool) -> str | None:
    """Why the library does not serve tensors on this device, None if it does."""
    if device.type != "cuda":
        return f"serves CUDA tensors, not {device.type}"
    if (reason := why_no_cuda()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is visible to this torch"
    capability = torch.cuda.get_device_capability(device)
    if not forced and capability not in TESTED_CAPABILITIES:
        return f"not yet tested on compute capability {capability[0]}.{capability[1]}"
    return None


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`; fp16 and bf16."""
    return torch.ops.amskv.attn_cuda(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` as one dispatcher call; the op checks its arguments in C++."""
    return planned(torch.ops.amskv.attn_cuda.default, call)


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """See `amskv_kernels.ops.append`; fp16 and bf16."""
    torch.ops.amskv.append_cuda(k, v, pages, arena, write_slots, page_scales)
