"""What the kernels share: slot arithmetic on the device, launch arithmetic on the host.

Names follow one habit: `p_` is a pointer or a tensor of them, `o_` an offset, `b_` a block of values, `i_` an index.
Capitals are compile-time sizes: G query heads per KV head, D the head size, BD the power of two above it, PS the
page size, BM × BN a tile of queries × keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.quantise import LEAST_ROW, LEVELS
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK

SLOT_BITS = tl.constexpr(ROWS_BITS)
SLOT_MASK = tl.constexpr(ROWS_MASK)
# The kernels read the whole slot table of a head in blocks of this many entries: 128 are a page size of 16 … 128
# times 2k … 16k tokens, so nearly always one block.
SLOT_BLOCK = tl.constexpr(128)
# The interpreter multiplies bfloat16 as if it were integers; widened to fp32 the products are the same, exactly.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(math.log(2))
# A row's exponents are scale · score − shift, one fused multiply-add each: the product is exact, the shift is rounded.
# Below 2²⁸ it is off by 8 at most, so that the largest weight of a row is 2⁻⁸ … 2⁸, which fp16 holds.
MAX_SHIFT = tl.constexpr(2.0**28)
# The scale of rows beyond: a power of two, so that shifts are exact, and above every other scale. Scores of that size
# are at least 16 powers of two apart, and at this scale only the largest keep a weight.
COARSE = tl.constexpr(2.0**10)
EIGHT_BIT_LEVELS = tl.constexpr(float(LEVELS))
LEAST_EIGHT_BIT_ROW = tl.constexpr(LEAST_ROW)
TO_NEAREST = tl.constexpr(1.5 * 2.0**23)  # added and taken away again, it leaves a whole number, half to even
NO_SHIFT = tl.constexpr(-3.4028234663852886e38)  # of a row without keys: finite, so that −∞ minus it is −∞


@triton.jit
def product(b_x, b_y, b_acc):
    """b_acc + b_x · b_y in fp32; fp32 operands keep all their bits."""
    if WIDEN:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def shift_of(b_max, scale):
    """What the exponents of rows with these largest scores are measured from."""
    b_shift = b_max * scale
    return tl.where(tl.abs(b_shift) < MAX_SHIFT, b_shift, b_max * COARSE)


@triton.jit
def scale_of(b_shift, scale):
    """The scale of rows with these shifts."""
    return tl.where(tl.abs(b_shift) < MAX_SHIFT, scale, COARSE)


@triton.jit
def finished(b_acc, b_sum, b_shift, scale):
    """Output and natural log-sum-exp of an online softmax in powers of two; 0 and −inf where there was no key."""
    b_some = b_sum != 0.0  # NaN too: its row's lse is NaN as its output is
    b_out = b_acc / tl.expand_dims(tl.where(b_some, b_sum, 1.0), len(b_sum.shape))
    b_max = tl.where(tl.abs(b_shift) < MAX_SHIFT, b_shift, b_shift * (1 / COARSE) * scale)
    b_lse = b_max + tl.log2(b_sum)
    return b_out, tl.where(b_some, b_lse * LN2, float("-inf"))


@triton.jit
def page_offset(page0, slot, PS: tl.constexpr, D: tl.constexpr):
    """Elements from the start of the pool to the page that a slot names, in 64 bits."""
    return (page0 + (slot >> SLOT_BITS)).to(tl.int64) * (2 * PS * D)


@triton.jit
def as_type(b_x, dtype: tl.constexpr):
    """Rows as q's or the weights' type: exact for bytes, nothing to do for others."""
    if WIDEN and b_x.dtype == tl.int8:
        b_x = b_x.to(tl.float32)  # the interpreter would take an integer for the bits of a bfloat16
    return b_x.to(dtype)


@triton.jit
def weighed(b_p, b_scale, b_v, b_q):
    """Weights [..., BM, BN] and eight-bit values [..., BN, BD] with these scales [..., BN], ready to be multiplied.

    Where q is bf16 or fp32 a weight holds any scale, so the bytes become numbers of that type, exactly, and no more. In
    fp16 a weight times a scale may leave the range, so each value takes its scale before it is rounded: a
    multiplication more, and the error of an fp16 value.
    """
    if b_q.dtype == tl.float16:
        b_step = tl.expand_dims(b_scale, len(b_scale.shape))
        return b_p.to(tl.float16), (as_type(b_v, tl.float32) * b_step).to(tl.float16)
    else:
        return (b_p * tl.expand_dims(b_scale, len(b_scale.shape) - 1)).to(b_q.dtype), as_type(b_v, b_q.dtype)


@triton.jit
def eight_bit(b_x):
    """Rows [..., BD] as bytes and scales, exactly as `ops.quantise` rounds them."""
    b_x = b_x.to(tl.float32)
    b_most = tl.max(tl.where(tl.abs(b_x) < float("inf"), tl.abs(b_x), float("inf")), len(b_x.shape) - 1)  # NaN too: inf
    b_finite = b_most < float("inf")
    b_scale = tl.where(b_most < LEAST_EIGHT_BIT_ROW, 0.0, tl.div_rn(b_most, EIGHT_BIT_LEVELS))
    b_holds = b_finite & (b_scale > 0.0)
    b_step = tl.expand_dims(tl.where(b_holds, b_scale, 1.0), len(b_x.shape) - 1)
    b_x = (tl.div_rn(b_x, tl.broadcast_to(b_step, b_x.shape)) + TO_NEAREST) - TO_NEAREST
    b_x = tl.where(tl.expand_dims(b_holds, len(b_x.shape) - 1), b_x, 0.0)
    return b_x.to(tl.int8), tl.where(b_finite, b_scale, float("nan"))


@triton.jit
def stored_rows(p_slots, S, i_s):
    """Rows that the slots before `i_s` name, and that all of them name."""
    before = 0
    total = 0
    for i_0 in range(0, S, SLOT_BLOCK):
        o_s = i_0 + tl.arange(0, SLOT_BLOCK)
        b_rows = tl.load(p_slots + o_s, mask=o_s < S, other=0) & SLOT_MASK  # [SLOT_BLOCK]
        before += tl.sum(tl.where(o_s < i_s, b_rows, 0))
        total += tl.sum(b_rows)
    return before, total


@triton.jit
def store_page(
    p_k, p_v, stride_kn, stride_vn, n, pages, page_scales, page0, p_slots, S, i_s,
    D: tl.constexpr, BD: tl.constexpr, PS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store one head's rows of k, v that belong into page `i_s` of its slots, and zeros after them.

    Where the slots name n + r rows, the first page already holds r: those stay as they are. A page passes through
    registers ROWS rows at a time.
    """
    before, total = stored_rows(p_slots, S, i_s)
    slot = tl.load(p_slots + i_s)
    rows = slot & SLOT_MASK
    if rows > 0:
        o_d = tl.arange(0, BD)
        p_page = pages + page_offset(page0, slot, PS, D)
        for i_0 in tl.static_range(0, PS, ROWS):
            o_r = i_0 + tl.arange(0, ROWS)
            o_n = before - (total - n) + o_r  # the row of k that goes to row o_r; below 0: kept
            b_load = ((o_n >= 0) & (o_r < rows))[:, None] & (o_d < D)[None, :]
            b_to = (o_n >= 0) | (o_r >= rows)
            b_store = b_to[:, None] & (o_d < D)[None, :]
            o_n = o_n.to(tl.int64)[:, None]
            b_k = tl.load(p_k + o_n * stride_kn + o_d[None, :], mask=b_load, other=0.0)  # [ROWS, BD]
            b_v = tl.load(p_v + o_n * stride_vn + o_d[None, :], mask=b_load, other=0.0)
            if page_scales is not None:
                b_k, b_k_scale = eight_bit(b_k)
                b_v, b_v_scale = eight_bit(b_v)
                p_scale = page_scales + page_offset(page0, slot, PS, 1) + o_r
                tl.store(p_scale, b_k_scale, mask=b_to)
                tl.store(p_scale + PS, b_v_scale, mask=b_to)
            p_row = p_page + o_r[:, None] * D + o_d[None, :]
            tl.store(p_row, b_k, mask=b_store)
            tl.store(p_row + PS * D, b_v, mask=b_store)


class Device(NamedTuple):
    """What the choice of a tile and of a split depends on."""

    arch: int
    processors: int


@cache
def describe(device: torch.device) -> Device:
    """Compute capability (as 90) and number of multiprocessors; the interpreter plays a small A100."""
    if device.type == "cpu":
        return Device(80, 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device's current stream: make x's device the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def table_strides(slots: Tensor) -> tuple[int, int]:
    """Strides of a slot table's first two dimensions, 0 where it broadcasts."""
    batch, heads, size = slots.shape
    return (heads * size if batch > 1 else 0, size if heads > 1 else 0)


def padded(head_dim: int) -> int:
    """The power of two that holds a head."""
    return triton.next_power_of_2(head_dim)


class Start:
    """A kernel on a grid, with its compile-time sizes. The first launch compiles it; later ones, whose scalars and
    pointer alignment must be those of the first, go past Triton's own look-up of what was compiled: 20 µs less."""

    def __init__(self, kernel: Any, grid: tuple[int, int, int], meta: dict[str, Any]) -> None:
        self._kernel, self.grid, self._meta = kernel, grid, meta
        self._constants: tuple[Any, ...] = ()
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        if self._compiled is not None:
            self._compiled(*args, *self._constants)
            return
        compiled = self._kernel[self.grid](*args, **self._meta)
        if compiled is not None:  # the interpreter compiles nothing
            self._constants = tuple(self._meta[p.name] for p in self._kernel.params if p.is_constexpr)
            self._compiled = compiled[self.grid]
