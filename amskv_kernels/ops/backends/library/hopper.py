"""The CUDA library with its Hopper kernel: TMA and wgmma where the tile table wants them, else the portable kernel.

The table (csrc/common/tiles.h) takes head sizes 64 and 128, scales of more than 64 tokens and 16-bit pages. Whole pages
are fetched, so the other rows of a page named in part must be finite; `attn`, `append` and `compact` leave zeros there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amskv_kernels.ops.backends.library import planned, portable
from amskv_kernels.ops.checks import PlannedAttn

CAPABILITY = (9, 0)  # wgmma exists there and nowhere else
TESTED = False  # whether a test report from a Hopper GPU is committed; until then it serves only when forced

DTYPES, PAGE_DTYPES, CHECKS_ITSELF = portable.DTYPES, portable.PAGE_DTYPES, portable.CHECKS_ITSELF
append = portable.append


def unavailable(device: torch.device, forced: bool) -> str | None:
    """Why the Hopper kernel does not serve tensors on this device, None if it does."""
    if (reason := portable.unavailable(device, forced=True)) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    return None if forced or TESTED else "not yet tested on a Hopper GPU"


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`; fp16 and bf16."""
    return torch.ops.amskv.attn_hopper(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)


def prepared_attn(call: PlannedAttn) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """`attn` as one dispatcher call; the op checks its arguments in C++."""
    return planned(torch.ops.amskv.attn_hopper.default, call)
