"""Token policies on the device: score the keys, keep the best of each sequence and head, move them to fresh pages.

All shapes follow from the plan, and nothing here waits for the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels import ops  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.arguments import instance_of
from amskv_kernels.cache.rows import HeadRows
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.planning.tables import Compaction
from amskv_kernels.policies.base import Selection


def choose(scores: Tensor, always: Tensor, kept: int, selection: Selection) -> Tensor:
    """The keys to keep of each sequence and head.

    Args:
        scores: (B, Hkv, N) fp32; changed in place.
        always: (A,) keys that are kept whatever their score.
        kept: how many in all, A … N.
        selection: how scores are pooled.

    Returns:
        (B, Hkv, kept) int64, ascending.
    """
    if selection.pool is not None:
        # What is kept anyway lends its score to no neighbour.
        scores.index_fill_(2, always, -math.inf if selection.pool == "max" else 0.0)
        pool = F.max_pool1d if selection.pool == "max" else F.avg_pool1d
        scores = pool(scores, selection.kernel, stride=1, padding=selection.kernel // 2)
    scores.index_fill_(2, always, -math.inf)
    picked = scores.topk(kept - len(always), sorted=False).indices
    return torch.cat([picked, always.expand(*scores.shape[:2], -1)], dim=2).sort().values


class TokenSelector:
    """Carries out a plan's compactions.

    Args:
        plan: of a token policy.
        rows: how heads lie in the pages.
        pages: the pool.
        arena: (B, Hkv) int32.
        page_scales: of int8 pages.
    """

    def __init__(
        self, plan: CachePlan, rows: HeadRows, pages: Tensor, arena: Tensor, page_scales: Tensor | None = None
    ) -> None:  # fmt: skip
        assert plan.selection is not None
        self.plan, self.selection, self._rows = plan, plan.selection, rows
        self._pages, self._arena, self._page_scales = pages, arena, page_scales
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}  # observers, always, slots
        for call, at in _calls(plan):
            lists = (at.observers, at.always, at.slots.tolist())
            observers, always, slots = (torch.tensor(x, dtype=torch.int64, device=pages.device) for x in lists)
            self._tables[call] = observers, always, slots.to(torch.int32).view(1, 1, -1)
        self._last = {layer: step for (step, layer), _ in _calls(plan)}  # the last compaction of each layer
        self.reset()

    def reset(self) -> None:
        """Forget what the last generation left."""
        self._raw: Tensor | None = None
        self._sums: dict[int, Tensor] = {}

    def keep_first(self, arena: Tensor) -> None:
        """Go on with the sequences that `arena` (B, Hkv) names, the first of those there were, or all of them again."""
        self._arena, self._raw = arena, None
        self._sums = {layer: sums[: len(arena)] for layer, sums in self._sums.items()}

    def prepare(self, step: int, layer: int, x: Tensor, weight: Tensor) -> None:
        """Project the observers' raw queries, if this call needs them.

        Args:
            step: of the coming call.
            layer: of the coming call.
            x: (B, n, C), what the layer's projection gets.
            weight: (H · D, C), the query part of its weight.

        Raises:
            TypeError: x or weight is no tensor.
            ValueError: one of another shape.
        """
        instance_of("x", x, Tensor)
        instance_of("weight", weight, Tensor)
        if self.selection.raw_queries and (step, layer) in self._tables:
            head_dim = self._rows.head_dim
            _check_projection(x, weight, self._arena.shape[0], self.plan.schedule.tokens[step], head_dim)
            observing = x.index_select(1, self._tables[step, layer][0])
            both = torch.promote_types(x.dtype, weight.dtype)
            with torch.autocast(x.device.type, enabled=False):  # the same tokens stay with autocast and without
                raw = F.linear(observing.to(both), weight.to(both))
            self._raw = self._rows.row_of(raw.unflatten(2, (-1, head_dim)))

    def check(self, step: int, layer: int) -> None:
        """Raise ValueError where raw queries are needed and `prepare` has not been called."""
        if self.selection.raw_queries and (step, layer) in self._tables and self._raw is None:
            raise ValueError(
                'mode "released" scores with raw queries; call prepare(layer, x, weight) before attend, or use '
                'mode "paper"'
            )

    def after(self, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, read: Tensor, softmax_scale: float) -> None:
        """What follows the attention of a call: arguments in rows as it had them, `read` its read slots.

        Everything that is remembered is remembered last, so that a call that fails can be made again.
        """
        at = self.plan.compaction(step, layer)
        if at is None and not (self.selection.accumulate and step < self._last.get(layer, -1)):
            return
        scores = None
        if self.selection.observers != "none":
            scores = self._scores(step, layer, q, k, read, softmax_scale)
            if self.selection.accumulate and layer in self._sums:
                earlier = self._sums[layer]
                scores[..., : earlier.shape[2]] += earlier
        if at is not None:
            always, slots = self._tables[step, layer][1:]
            if scores is None:
                keep = always.expand(*self._arena.shape, -1)
            else:
                keep = choose(scores.clone(), always, at.kept, self.selection)
                scores = scores.gather(2, keep) if self.selection.accumulate else scores
            held, rows = self.plan.read_rows(step, layer), read.shape[2] * self.plan.page_size
            keys = torch.where(keep < held, keep, keep + (rows - held))
            torch.ops.amskv.compact(self._pages, self._arena, read, k, v, keys.contiguous(), slots, self._page_scales)
        if self.selection.accumulate and scores is not None:
            self._sums[layer] = scores
        self._raw = None

    def _scores(self, step: int, layer: int, q: Tensor, k: Tensor, read: Tensor, softmax_scale: float) -> Tensor:
        """(B, Hkv, held + n) fp32 in the order of the keys."""
        if self.selection.raw_queries:
            assert self._raw is not None
            observing, softmax_scale = self._raw.to(q.dtype), self._rows.softmax_scale
        elif self.selection.observers == "all":
            observing = q
        else:
            observing = q.index_select(1, self._tables[step, layer][0])
        scores = torch.ops.amskv.window_scores(
            observing, k, self._pages, self._arena, read, softmax_scale, self.selection.score, self._page_scales
        )
        held, rows = self.plan.read_rows(step, layer), read.shape[2] * self.plan.page_size
        # The rest of the last page names no key.
        return scores if held == rows else torch.cat([scores[..., :held], scores[..., rows:]], dim=2)


def _check_projection(x: Tensor, weight: Tensor, batch: int, tokens: int, head_dim: int) -> None:
    if x.dim() != 3 or x.shape[:2] != (batch, tokens):
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, n, C) with B = {batch}, n = {tokens}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] % head_dim or not weight.shape[0]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be (H · D, C) with D = {head_dim}, C = {x.shape[2]}"
        )


def _calls(plan: CachePlan) -> list[tuple[tuple[int, int], Compaction]]:
    calls = np.ndindex(len(plan.schedule), plan.num_layers)
    found = (((step, layer), plan.compaction(step, layer)) for step, layer in calls)
    return [(call, at) for call, at in found if at is not None]
