"""The CUDA library, libamskv.so: finding it, loading it, and what it was built for.

It is built beside this file where nvcc was at hand (see `setup.py`). Loading it registers `torch.ops.amskv.attn_cuda`,
`attn_hopper`, `append_cuda` and `build_info`; it links no CUDA library of torch's, so it also loads beside a CPU-only
torch. Two backends come from it: this module, whose kernels run from sm_80 on, and `amskv_kernels.hopper`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libamskv.so")
LEAST_TORCH = (2, 10)  # the stable ABI that the library is built for
# Compute capabilities on which the library's kernels are the default: those with a test report from a GPU.
TESTED_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()


@cache
def why_not_loaded() -> str | None:
    """Load the library, once; None when it is loaded, else the reason why not."""
    if not LIBRARY.exists():
        return "libamskv.so was not built (install with nvcc at hand, or with AMSKV_CUDA=pip)"
    found = torch.__version__.split("+")[0]
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_TORCH:
        return f"libamskv.so needs torch ≥ {'.'.join(map(str, LEAST_TORCH))}; found torch {found}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"libamskv.so does not load: {error}"
    return None


def build_info() -> dict[str, Any]:
    """What the library was built for: version, cuda, architectures, and of each kernel registers and spilled bytes.

    Raises:
        RuntimeError: the library is not loaded; the message says why.
    """
    if (reason := why_not_loaded()) is not None:
        raise RuntimeError(reason)
    return json.loads(torch.ops.amskv.build_info())


def unavailable(device_type: str, forced: bool) -> str | None:
    """Why the library does not serve tensors on `device_type`, None if it does."""
    if device_type != "cuda":
        return f"serves CUDA tensors, not {device_type}"
    if (reason := why_not_loaded()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device is visible to this torch"
    capability = torch.cuda.get_device_capability()
    if not forced and capability not in TESTED_CAPABILITIES:
        return f"not yet tested on compute capability {capability[0]}.{capability[1]}"
    return None


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.attn`; fp16 and bf16."""
    return torch.ops.amskv.attn_cuda(q, k, v, pages, arena, read_slots, write_slots, softmax_scale)


def append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    """See `amskv_kernels.ops.append`; fp16 and bf16."""
    torch.ops.amskv.append_cuda(k, v, pages, arena, write_slots)
