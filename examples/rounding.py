"""Ways to hold keys and values in few bits: each gives back what a cache would read, in fp32, and says its bits.

Everything here takes rows (B, n, H, D) of one scale. Scales and offsets of groups are fp16, 16 bits each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.models import ConcatKVCache
from amskv_kernels.ops.quantise import LEVELS, dequantise, quantise

Round = Callable[[Tensor], Tensor]
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, of which the one of least error is taken
E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class Rounding:
    """How K and V are held.

    Attributes:
        name: for people.
        bits: of an element, scales and offsets shared out, K and V averaged.
        k, v: the rounding.
    """

    name: str
    bits: float
    k: Round
    v: Round


class Rounded:
    """Attention over every earlier token as a cache of few bits gives it back, and over the current as they are."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._held: dict[int, list[Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """As every cache's."""
        held = self._held.setdefault(layer, [k[:, :0], v[:, :0]])
        keys, values = torch.cat((held[0], k), 1), torch.cat((held[1], v), 1)
        out = ConcatKVCache().attend(layer, q, keys, values, softmax_scale)
        for i, (x, rounded) in enumerate(((k, self._rounding.k), (v, self._rounding.v))):
            held[i] = torch.cat((held[i], rounded(x.float()).to(x.dtype)), 1)
        return out


def rows_of_int8(x: Tensor) -> Tensor:
    """As int8 pages hold them."""
    return dequantise(*quantise(x))


def rows_of_int8_with(scales: torch.dtype) -> Round:
    """int8 with a scale of two bytes per row: the largest element of a row is not exact any more."""

    def rounded(x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LEVELS).to(scales).float()
        return (x / scale).round().clamp(-LEVELS, LEVELS) * scale

    return rounded


def rows_of_fp8(x: Tensor) -> Tensor:
    """e4m3 with a scale per row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def groups(bits: int, size: int, fitted: bool = False) -> Round:
    """A scale per `size` neighbours of a row; `fitted`: of `SHRINKS` times the range, the scale of least error."""
    levels = 2 ** (bits - 1) - 1

    def rounded(x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (-1, size))
        widest = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / levels
        tries = []
        for shrink in SHRINKS if fitted else SHRINKS[:1]:
            scale = (widest * shrink).half().float().clamp_min(1e-7)
            tries.append((parts / scale).round().clamp(-levels - 1, levels) * scale)
        every = torch.stack(tries)
        best = (every - parts).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
        return every.take_along_dim(best, 0)[0].flatten(-2)

    return rounded


def between(bits: int, size: int) -> Round:
    """The least and the greatest of `size` neighbours of a row, and steps between."""

    def rounded(x: Tensor) -> Tensor:
        return _stepped(x.unflatten(-1, (-1, size)), -1, bits).flatten(-2)

    return rounded


def channels(bits: int, span: int) -> Round:
    """The least and the greatest of a channel over `span` tokens of the scale, and steps between."""

    def rounded(x: Tensor) -> Tensor:
        return torch.cat([_stepped(part, 1, bits) for part in x.split(span, dim=1)], 1)

    return rounded


def _stepped(x: Tensor, dim: int, bits: int) -> Tensor:
    least, greatest = (edge.half().float() for edge in (x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)))
    step = ((greatest - least) / (2**bits - 1)).clamp_min(1e-7)
    return ((x - least) / step).round().clamp(0, 2**bits - 1) * step + least


def centred(inner: Round) -> Round:
    """Less each channel's mean over the scale's tokens, which is held beside them."""

    def rounded(x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True).half().float()
        return inner(x - mean) + mean

    return rounded


def rotated(inner: Round) -> Round:
    """Rounded after a Hadamard rotation of the head, which spreads what single channels hold over all of them."""

    def rounded(x: Tensor) -> Tensor:
        turn = hadamard(x.shape[-1]).to(x)
        return inner(x @ turn) @ turn.T

    return rounded


def hadamard(size: int) -> Tensor:
    """The orthogonal matrix of ±1/√size, size a power of two."""
    turn = torch.ones(1, 1)
    while len(turn) < size:
        turn = torch.cat((torch.cat((turn, turn), 1), torch.cat((turn, -turn), 1)))
    return turn / size**0.5


def four_bits(head_dim: int, tokens_per_scale: float) -> list[Rounding]:
    """What was tried below eight bits, and bf16 and fp8 for comparison.

    Args:
        head_dim: D.
        tokens_per_scale: stored tokens of a scale on average, which share its channels' means.
    """
    row, mean = 8 + 32 / head_dim, 16 / tokens_per_scale
    plain, fine, best = groups(4, 32), groups(4, 16), groups(4, 16, fitted=True)
    found: list[tuple[str, float, Any, Any]] = [
        ("bf16", 16, lambda x: x.bfloat16().float(), lambda x: x.bfloat16().float()),
        *(
            (f"int8, scales in {name}", 8 + 16 / head_dim, *[rows_of_int8_with(scales)] * 2)
            for name, scales in (("fp16", torch.float16), ("bf16", torch.bfloat16))
        ),
        ("fp8 e4m3, a scale per row", row, rows_of_fp8, rows_of_fp8),
        ("int6 in groups of 32", 6.5, groups(6, 32), groups(6, 32)),
        ("K int8, V int4 in groups of 32", (row + 4.5) / 2, rows_of_int8, plain),
        ("K int8, V int4 in groups of 16, fitted scales", (row + 5) / 2, rows_of_int8, best),
        ("K int8, V rotated, int4 in groups of 16, fitted scales", (row + 5) / 2, rows_of_int8, rotated(best)),
        ("K int4 in groups of 16, fitted scales, V int8", (row + 5) / 2, best, rows_of_int8),
        ("int4 in groups of 32", 4.5, plain, plain),
        ("int4 in groups of 16", 5, fine, fine),
        ("int4 in groups of 16, fitted scales", 5, best, best),
        ("int4 in groups of 32, K rotated", 4.5, rotated(plain), plain),
        ("int4 between least and greatest of 16, K and V rotated", 6, rotated(between(4, 16)), rotated(between(4, 16))),
        ("int4 in groups of 16, K less its channels' means", 5 + mean / 2, centred(fine), fine),
        ("int4, K by channel over 32 tokens, V in groups of 16", (5 + 5) / 2, channels(4, 32), fine),
    ]
    return [Rounding(*each) for each in found]
