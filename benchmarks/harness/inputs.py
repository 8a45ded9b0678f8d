"""The tensors of one call: the generation's whole pool, the tables of real layers, qkv as a projection leaves it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK
from benchmarks.harness.cases import Case, Group
from benchmarks.harness.roofs import DTYPES, ITEMSIZE, Work, attention_work

PATTERN = 65521  # rows of random data that fill a pool over and over; prime, so that no two pages hold the same rows
MOST_SETS = 16
SET_US = 100.0  # a timing holds about this much work, to make its own cost small


def fill(x: Tensor, seed: int) -> Tensor:
    """Normal random data in place, `PATTERN` rows of it repeated: zeros run faster than a real cache."""
    flat = x.view(-1, x.shape[-1])
    rng = torch.Generator(x.device).manual_seed(seed)
    pattern = torch.randn(min(PATTERN, len(flat)), x.shape[-1], generator=rng, device=x.device).to(x.dtype)
    whole = len(flat) // len(pattern) * len(pattern)
    flat[:whole].view(-1, len(pattern), x.shape[-1]).copy_(pattern)
    flat[whole:].copy_(pattern[: len(flat) - whole])
    return x


class UnavailableError(RuntimeError):
    """This contestant or case cannot run here; the message says why."""


class Pool:
    """The pages of a whole generation, all layers and sequences, full of random rows."""

    def __init__(self, case: Case, device: str) -> None:
        plan, shape = case.plan, case.shape
        # One arena for each sequence and head; where heads differ, for each sequence.
        per_sequence = shape.kv_heads // plan.heads
        arenas = case.sequences * per_sequence
        size = (arenas * plan.pages, 2, plan.page_size, shape.head_dim)
        self.case, self.device = case, device
        self.pages = fill(torch.empty(size, dtype=DTYPES[case.dtype], device=device), 1)
        first = torch.arange(arenas, dtype=torch.int32, device=device) * plan.pages
        self.arena = first.view(case.sequences, per_sequence).expand(-1, shape.kv_heads).contiguous()

    def tables(self, step: int, layer: int) -> tuple[Tensor, Tensor]:
        """(1, 1, S) slots that a layer reads and writes at a step; (1, Hkv, S) where heads differ."""
        found = (self.case.plan.read_slots(step, layer), self.case.plan.write_slots(step, layer))
        read, write = (
            torch.from_numpy(slots.copy()).to(self.device).view(1, *(slots.shape if slots.ndim == 2 else (1, -1)))
            for slots in found
        )
        return read, write


@dataclass
class Dense:
    """One call as peers get it: keys and values in one contiguous piece each.

    q (B, H, n, D), k and v (B, Hkv, history + n, D), all contiguous; the current rows come last.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @cached_property
    def gqa(self) -> bool:
        """Whether query heads share KV heads."""
        return self.q.shape[1] != self.k.shape[1]


class CallInputs:
    """The data of one group's call in several sets, one per layer of the group: none is in a cache when used."""

    def __init__(self, pool: Pool, group: Group, estimate_us: float = 1e9) -> None:
        case, shape = pool.case, pool.case.shape
        self.pool, self.group, self.case = pool, group, case
        self.scale = 1 / math.sqrt(shape.head_dim)
        wanted = min(MOST_SETS, max(1, math.ceil(SET_US / max(estimate_us, 1e-3))))
        self.layers = group.layers[: 1 << (min(wanted, len(group.layers)).bit_length() - 1)]  # 1, 2, 4, 8 or 16
        self.sets = len(self.layers)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        size = (self.sets, case.sequences, group.n, sum(heads), shape.head_dim)
        qkv = fill(torch.empty(size, dtype=DTYPES[case.dtype], device=pool.device), 2 + group.step)
        self.qkv = [one.split(heads, dim=2) for one in qkv]
        self.tables = [pool.tables(group.step, layer) for layer in self.layers]
        self._dense: dict[int, Dense] = {}

    @property
    def ragged(self) -> bool:
        """Whether heads read tables of their own."""
        return self.tables[0][0].shape[1] > 1

    @property
    def work(self) -> Work:
        """Bytes and operations of one call."""
        return group_work(self.case, self.group)

    def dense(self, i: int) -> Dense:
        """Set `i` as a peer gets it; all peers get the same.

        Raises:
            UnavailableError: heads hold different numbers of tokens.
        """
        if self.ragged:
            raise UnavailableError("heads hold different numbers of tokens: no contiguous K, V of one length")
        if i not in self._dense:
            (q, k, v), (read, _) = self.qkv[i], self.tables[i]
            k, v = (
                torch.cat([held, x.transpose(1, 2)], dim=2)
                for held, x in zip(gather(self.pool.pages, self.pool.arena, read), (k, v), strict=True)
            )
            self._dense[i] = Dense(q.transpose(1, 2).contiguous(), k, v, self.scale)
        return self._dense[i]


def group_work(case: Case, group: Group) -> Work:
    """Bytes and operations of one call of a group."""
    shape = case.shape
    return attention_work(
        case.sequences, shape.heads, shape.kv_heads, shape.head_dim, group.n, group.history, group.stored,
        ITEMSIZE[case.dtype],
    )  # fmt: skip


def table_of(slots: Tensor, head: int) -> Tensor:
    """One head's table (1, 1, S)."""
    return slots[:, head if slots.shape[1] > 1 else 0][:, None]


def gather(pages: Tensor, arena: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a (1, 1, S) table names, as K and V (B, Hkv, N, D): plain indexing, no kernel of ours."""
    page_size, head_dim = pages.shape[2], pages.shape[3]
    row = torch.arange(page_size, device=pages.device)
    named = row < (slots.view(-1, 1) & ROWS_MASK)  # [S, page_size]
    first = ((slots.view(-1, 1) >> ROWS_BITS).long() * (2 * page_size) + row)[named]  # [N], within an arena
    first = arena.long()[..., None] * (2 * page_size) + first
    pool = pages.view(-1, head_dim)
    return pool[first], pool[first + page_size]
