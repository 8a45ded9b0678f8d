"""Calls of `attn` that a plan has worked out beforehand: what cannot change between calls is done once, not per call.

A backend that gains from it has `prepared_attn(call)`: from the pool, tables and sizes of one (step, layer) it makes a
function of what a model brings, (q, k, v, softmax_scale) → out. It gets tables that a plan validated and arguments that
`PlannedAttn.takes` passed; any other call goes the way of a raw one, whose checks name what is wrong with it. A backend
whose own op checks everything in C++ says `CHECKS_ITSELF = True`, and its op is all that is called; what it refuses is
named by the raw call's checks all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from amskv_kernels.ops.checks import DTYPES, PlannedAttn
from amskv_kernels.ops.dispatch import backend_of, settings
from amskv_kernels.ops.guard import plain_kernels

Prepared = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Ragged = Callable[..., tuple[Tensor, Tensor]]  # the arguments of `attn_ragged`, all of them and in order


def prepare_attn(call: PlannedAttn) -> Prepared:
    """How this context's backend makes this call; gradients must have been refused before it is made.

    Raises:
        RuntimeError: a forced backend cannot serve there.
        TypeError: a forced backend does not take the dtype.
    """
    tables, page_scales = call[:4], call.page_scales
    op = torch.ops.amskv.attn.default

    def raw(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        out: Tensor = op(q, k, v, *tables, softmax_scale, page_scales)[0]
        return out

    fits = call.dtype in DTYPES and call.pages.dtype in (call.dtype, torch.int8)
    if settings().debug or not fits:  # the raw call names what is wrong with a dtype
        return raw
    module = backend_of("attn", call.pages.device, call.dtype, call.pages.dtype)
    if not hasattr(module, "prepared_attn"):
        return raw
    ready: Prepared = module.prepared_attn(call)
    takes = call.takes

    def checked(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        if not takes(q, k, v, softmax_scale):
            return raw(q, k, v, softmax_scale)
        with plain_kernels():
            return ready(q, k, v, softmax_scale)

    def checking_itself(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        try:
            with plain_kernels():
                return ready(q, k, v, softmax_scale)
        except ValueError:
            return raw(q, k, v, softmax_scale)

    return checking_itself if getattr(module, "CHECKS_ITSELF", False) else checked


def prepare_attn_ragged(device: torch.device, dtype: torch.dtype, pages: torch.dtype) -> Ragged:
    """`attn_ragged` of this context's backend, for arguments and tables that whoever calls has worked out from a plan.

    Raises:
        RuntimeError: a forced backend cannot serve there.
        TypeError: a forced backend does not take the dtype.
    """
    if settings().debug:
        return cast(Ragged, torch.ops.amskv.attn_ragged.default)
    ready = backend_of("attn_ragged", device, dtype, pages).attn_ragged

    def unchecked(*args: object) -> tuple[Tensor, Tensor]:
        with plain_kernels():
            return cast(tuple[Tensor, Tensor], ready(*args))

    return unchecked
