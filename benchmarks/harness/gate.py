"""No row without a right result: every contestant's output against fp64 before its time is taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK
from benchmarks.harness.inputs import CallInputs, gather, table_of

# Relative errors that rounding alone explains; above them a contestant may have twice PyTorch's own error.
CHUNK = 8  # sequences compared at a time: fp64 copies of a whole large batch would not fit
EIGHT_BITS = 1.5e-2  # normal rows are kept within 0.7 % of their size, and keys' errors come in through the weights
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


class WrongResultError(RuntimeError):
    """A contestant's result is not attention over these keys."""


def error(out: Tensor, truth: Tensor) -> float:
    """‖out − truth‖ / ‖truth‖; inf where out is not finite."""
    off, size = 0.0, 0.0
    for part, right in zip(out.split(CHUNK), truth.split(CHUNK), strict=True):
        right = right.double()
        off += float((part.double() - right).square().sum())
        size += float(right.square().sum())
    found = (off / size) ** 0.5
    return found if math.isfinite(found) else math.inf


class Gate:
    """The truth for set 0 of a call: fp64 for the first, middle and last (sequence, head), PyTorch's for all others."""

    def __init__(self, inputs: CallInputs) -> None:
        self.inputs = inputs
        q, k, _ = inputs.qkv[0]
        batch, _, heads, _ = q.shape
        self.group = heads // k.shape[2]
        self.picked = sorted({(0, 0), (batch // 2, heads // 2), (batch - 1, heads - 1)})
        self.truth = [self._one(b, h, torch.float64) for b, h in self.picked]
        own = [self._one(b, h, q.dtype) for b, h in self.picked]
        own_error = max(error(x, truth) for x, truth in zip(own, self.truth, strict=True))
        self.limit = max(2 * own_error, ROUNDING[q.dtype])
        self.shape, self.all = q.shape, None
        if not inputs.ragged:
            dense = inputs.dense(0)
            self.all = F.scaled_dot_product_attention(
                dense.q, dense.k, dense.v, scale=dense.scale, enable_gqa=dense.gqa
            ).transpose(1, 2)

    def _one(self, b: int, h: int, dtype: torch.dtype) -> Tensor:
        """One sequence and head in one dtype: (n, D)."""
        inputs, kv = self.inputs, h // self.group
        (q, k, v), (read, _) = inputs.qkv[0], inputs.tables[0]
        held = gather(inputs.pool.pages, inputs.pool.arena[b : b + 1, kv : kv + 1], table_of(read, kv))
        keys, values = (torch.cat([x[0, 0], y[b, :, kv]]).to(dtype) for x, y in zip(held, (k, v), strict=True))
        query = q[b, :, h].to(dtype)
        if dtype is torch.float64:
            return (inputs.scale * query @ keys.T).softmax(-1) @ values
        return F.scaled_dot_product_attention(
            query[None, None], keys[None, None], values[None, None], scale=inputs.scale
        )[0, 0]

    def check(self, name: str, out: Tensor, rounded: bool = False) -> float:
        """The error of (B, n, H, D) `out`; of a history `rounded` to eight bits, by as much more.

        Raises:
            WrongResultError: shape, error, or a single number that is not finite.
        """
        if out.shape != self.shape:
            raise WrongResultError(f"{name} gives {tuple(out.shape)} where {tuple(self.shape)} is right")
        limit = self.limit + (EIGHT_BITS if rounded else 0)
        worst = max(error(out[b, :, h], truth) for (b, h), truth in zip(self.picked, self.truth, strict=True))
        # Two results, each within the limit of the truth.
        whole = error(out, out if self.all is None else self.all)
        if not worst <= limit or not whole <= 2 * limit:
            raise WrongResultError(f"{name} is off by {max(worst, whole):.2e}; {limit:.2e} is the limit")
        return worst

    def check_store(self) -> None:
        """The pages that set 0 writes must hold its k and v, bit for bit.

        Raises:
            WrongResultError: they do not.
        """
        inputs = self.inputs
        (_, k, v), (_, write) = inputs.qkv[0], inputs.tables[0]
        if write.shape[-1] == 0:
            return
        for b, h in self.picked:
            kv, held = h // self.group, []
            slots = [slot for slot in table_of(write, kv).flatten().tolist() if slot & ROWS_MASK]
            if not slots:
                continue
            for slot in slots:
                held.append(
                    inputs.pool.pages[int(inputs.pool.arena[b, kv]) + (slot >> ROWS_BITS), :, : slot & ROWS_MASK]
                )
            stored = torch.cat(held, dim=1)[:, -inputs.group.n :]
            if not torch.equal(stored, torch.stack([k[b, :, kv], v[b, :, kv]])):
                raise WrongResultError(f"the pages of sequence {b}, head {kv} do not hold the rows stored")
