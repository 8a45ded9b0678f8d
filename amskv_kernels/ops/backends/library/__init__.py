"""The CUDA library, libamskv.so: finding it, loading it, and what it was built for.

It is built into the package where nvcc was at hand (see `setup.py`). Loading it registers `torch.ops.amskv.attn_cuda`,
`attn_hopper`, `append_cuda` and `build_info`; it links no CUDA library of torch's, so it also loads beside a CPU-only
torch. One module here for each kernel family in it: `portable`, from sm_80 on, and `hopper`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parents[3] / "libamskv.so"
LEAST_TORCH = (2, 10)  # the stable ABI that the library is built for


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
