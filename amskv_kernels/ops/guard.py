"""What surrounds every kernel: gradients are refused above it, autograd and autocast are off inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from amskv_kernels.ops.checks import refuse_gradients

_KEY = torch._C.DispatchKey
_EXCLUDED = torch._C.DispatchKeySet(_KEY.AutogradFunctionality)
for _key in (
    _KEY.AutogradOther,
    _KEY.AutogradNestedTensor,
    _KEY.AutocastCPU,
    _KEY.AutocastCUDA,
    # It counts versions and refuses to write to a pool of inference mode outside it; compiled kernels do neither.
    _KEY.ADInplaceOrView,
):
    _EXCLUDED = _EXCLUDED.add(_key)


def plain_kernels() -> AbstractContextManager[object]:
    """Neither autograd nor autocast, whatever is on around: 1 µs, where `torch.autocast(enabled=False)` takes 4."""
    return torch._C._ExcludeDispatchKeyGuard(_EXCLUDED)


def refuse_backward(library: torch.library.Library, names: Iterable[str]) -> None:
    """Register, for the Autograd keys of these ops of `library`, a kernel that refuses gradients and goes on below.

    torch.compile and torch.func meet it too: their tracing passes the Autograd keys. A call under
    torch.inference_mode does not.
    """
    for name in names:
        library.impl(name, _refusing(getattr(torch.ops.amskv, name).default), "Autograd", with_keyset=True)


def _refusing(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def autograd(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            refuse_gradients(*(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    return autograd
