"""The native library, libamskv.so: finding it, loading it, and what it was built for.

It is built into the package where there is a C++ compiler, with the CUDA kernels where there is nvcc too (see
`setup.py`). Loading it registers `torch.ops.amskv.attn_cpu` and so on; it links no CUDA library of torch's, so it also
loads beside a CPU-only torch. One module here for each kernel family in it: `cpu`, `portable`, from sm_80 on, and
`hopper`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.ops.checks import PlannedAttn
from amskv_kernels.ops.guard import refuse_backward

LIBRARY = Path(__file__).parents[3] / "libamskv.so"
_OPS = (
    "attn_cpu", "attn_ragged_cpu", "append_cpu", "prepare_qk_cpu", "compact_cpu",
    "attn_cuda", "attn_hopper", "append_cuda",
)  # fmt: skip
_REFUSALS = torch.library.Library("amskv", "FRAGMENT")  # the library's own ops have no backward either
LEAST_TORCH = (2, 10)  # the stable ABI that the library is built for


@cache
def why_not_loaded() -> str | None:
    """Load the library, once; None when it is loaded, else the reason why not."""
    if not LIBRARY.exists():
        return "libamskv.so was not built (install with a C++ compiler at hand)"
    found = torch.__version__.split("+")[0]
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_TORCH:
        return f"libamskv.so needs torch ≥ {'.'.join(map(str, LEAST_TORCH))}; found torch {found}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"libamskv.so does not load: {error}"
    if not hasattr(torch.ops.amskv, _OPS[0]):
        return "libamskv.so is of an earlier version; install again"
    _refuse_backward()
    return None


@cache
def _refuse_backward() -> None:
    """Once, however often the library is looked for: torch 2.11 takes no second kernel for an op and a key."""
    refuse_backward(_REFUSALS, [name for name in _OPS if hasattr(torch.ops.amskv, name)])


def why_no_cuda() -> str | None:
    """None where the library is loaded and has the CUDA kernels, else the reason why not."""
    if (reason := why_not_loaded()) is None and not hasattr(torch.ops.amskv, "attn_cuda"):
        return "libamskv.so was built without CUDA kernels (install with nvcc at hand, or with AMSKV_CUDA=pip)"
    return reason


def build_info() -> dict[str, Any]:
    """What its CUDA was built for: version, cuda, architectures, and of each kernel registers and spilled bytes.

    Raises:
        RuntimeError: the library is not loaded or has no CUDA kernels; the message says why.
    """
    if (reason := why_no_cuda()) is not None:
        raise RuntimeError(reason)
    return json.loads(torch.ops.amskv.build_info())


def instruction_sets() -> list[str]:
    """What the CPU kernels may choose from on this machine, the one they take last.

    Raises:
        RuntimeError: the library is not loaded; the message says why.
    """
    if (reason := why_not_loaded()) is not None:
        raise RuntimeError(reason)
    names: str = torch.ops.amskv.cpu_info()
    return names.split()


def planned(
    op: Callable[..., Any], call: PlannedAttn, *more: object
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """An op of the library with what a plan knows filled in; `more` follows the page scales."""
    pages, arena, read_slots, write_slots = call[:4]
    more = (call.page_scales, *more)

    def ready(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        out: Tensor = op(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, *more)[0]
        return out

    return ready
