"""Who attends to what: ScaleKV's attention selectivity index (ASI) and HeatKV's S-CAS, from one recorder.

ASI's two expectations run over queries, heads and sequences, which is not published; the number of strong history
keys, K′, is a parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.arguments import whole_number
from amskv_kernels.calibrate.recorder import Recorder
from amskv_kernels.models.attention import Attention
from amskv_kernels.policies.drafters import Drafters, check_top, choose_drafters
from amskv_kernels.policies.heads import HeadOrders, check_half
from amskv_kernels.schedule import ScaleSchedule


class AttentionRecorder(Recorder):
    """Watches who attends to what, layer by layer and scale by scale, and averages it over generations.

    It keeps all keys and computes all attention probabilities once more, some queries at a time.

    Args:
        schedule: see `Recorder`.
        num_layers: see `Recorder`.
        inner: see `Recorder`.
        top: K′, how many of the strongest history keys count as selective.
        rows: queries at a time.
        prefix: see `Recorder`.
        half: whose attention S-CAS is: "conditional", the sequences with a prompt or class, which are the first half
            of a guided batch, as HeatKV's authors measure it; or "both". ASI is of both: nothing else is published.
    """

    def __init__(
        self, schedule: ScaleSchedule, num_layers: int, inner: Attention | None = None, top: int = 16, rows: int = 1024,
        half: str = "conditional", prefix: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(schedule, num_layers, inner, prefix)
        self.half = check_half(half)
        self.top, self._rows = whole_number("top", top, 1), whole_number("rows", rows, 1)
        # Mean attention to the current map, and to the strongest `top` keys of the history.
        self._current, self._strong = torch.zeros(2, num_layers, len(schedule), dtype=torch.float64, device="cpu")
        self._mass: Tensor | None = None  # (L, Hkv, K) attention to each earlier scale, summed over later ones
        self._keys: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
        """Take q (B, n, H, D) and k (B, n, Hkv, D) of the next call; layers come in order, step by step."""
        step = self._turn(layer, q, k, v)
        if self._mass is None:
            self._mass = torch.zeros(len(self._keys), k.shape[2], len(self.schedule), dtype=torch.float64, device="cpu")
        earlier = self._keys[layer] if step > self._first_step else []
        keys = self._keys[layer] = [*(each[: len(k)] for each in earlier), k]
        if step < 0:
            self._count()
            return
        every = torch.cat(keys, dim=1).float().permute(0, 2, 3, 1)  # [B, Hkv, D, N]
        queries, strong, current, sizes = q.shape[1], 0.0, 0.0, [each.shape[1] for each in keys[-step - 1 :]]
        heard = min(len(k), max(1, self._batch // 2) if self.half == "conditional" else len(k))
        scales = torch.zeros(k.shape[2], step + 1, dtype=torch.float64, device="cpu")
        for part in q.float().split(self._rows, dim=1):
            grouped = part.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G·n, D]
            with torch.autocast(q.device.type, enabled=False):  # the same measurement with autocast and without
                weights = (softmax_scale * grouped @ every).softmax(-1)
            share = part.shape[1] / queries
            weights = weights[..., self.prefix :]
            for scale, own in enumerate(weights[:heard].split(sizes, dim=-1)):
                scales[:, scale] += share * own.sum(-1).mean((0, 2)).double().cpu()
            history, own = weights.split([weights.shape[3] - sizes[-1], sizes[-1]], dim=-1)
            current += share * float(own.sum(-1).mean())
            if step:
                strong += share * float(history.topk(min(self.top, history.shape[3])).values.sum(-1).mean())
        self._current[layer, step] += self._batch * current
        self._strong[layer, step] += self._batch * strong
        self._mass[layer, :, :step] += self._batch * scales[:, :step]
        self._count()

    def selectivity(self) -> tuple[tuple[float, ...], ...]:
        """(L, K) ASI: the mean attention to the current map times that to the strongest `top` keys of the history.

        Raises:
            ValueError: no generation has been seen to its end.
        """
        self._check_seen()
        return tuple(tuple(row) for row in (self._current * self._strong / self._sequences**2).tolist())

    def scores(self) -> list[list[list[float]]]:
        """(L, Hkv, K) S-CAS: mean attention that a head pays to a scale while each later one is drawn.

        Raises:
            ValueError: no generation has been seen to its end.
        """
        self._check_seen()
        assert self._mass is not None
        later = torch.arange(len(self.schedule) - 1, -1, -1, device="cpu").clamp_min(1)
        return (self._mass / (self._sequences * later)).tolist()

    def check_count(self, count: int | None) -> None:
        """Raise ValueError for a `count` that `drafters` would refuse, before anything is measured."""
        check_top(self.top, self.schedule)
        choose_drafters([[0.0] * len(self.schedule)] * len(self._keys), count, self._first)

    @property
    def _first(self) -> int:
        """The first scale whose history is longer than `top`."""
        return sum(offset <= self.top for offset in self.schedule.offsets)

    def drafters(self, count: int | None = None, model: str = "unnamed") -> Drafters:
        """ScaleKV's drafters; `count` is N_d, see `choose_drafters`."""
        table = self.selectivity()
        layers = choose_drafters(table, count, self._first)
        return Drafters(self.schedule.sizes, table, layers, self.top, self.images, model)

    def orders(self, protected: int = 3, model: str = "unnamed") -> HeadOrders:
        """HeatKV's head orders, the first `protected` scales aside."""
        return HeadOrders.from_scores(self.scores(), self.schedule, protected, self.images, model, self.half)
