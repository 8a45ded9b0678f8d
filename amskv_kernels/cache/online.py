"""AMS-KV's online mode: Algorithm 1 decides during the generation which layers are cache-demanding.

A plan needs to know beforehand what each layer will read. Here a layer turns demanding when its own keys say so, so
pages are handed out as the generation goes and the pool grows when it must. Each decision waits for the device; a
calibration that freezes the demanding layers (`AMSKV.for_saving`, `Calibration`) costs none of that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from amskv_kernels.arguments import check_device, check_index, instance_of, one_of, real_number, threshold, whole_number
from amskv_kernels.cache.growing import GrowingPool, check_page_numbers
from amskv_kernels.cache.paged import check_qkv
from amskv_kernels.cache.rows import HeadRows
from amskv_kernels.calibrate.similarity import key_similarity
from amskv_kernels.ops.checks import check_pool, refuse_gradients
from amskv_kernels.planning.layout import PAGE_SIZES
from amskv_kernels.planning.pages import NO_SLOTS
from amskv_kernels.planning.tables import Slots
from amskv_kernels.policies import AMSKVCapacity
from amskv_kernels.schedule import ScaleSchedule


@dataclass
class _Layer:
    capacity: int
    held: dict[int, Slots] = field(default_factory=dict)  # scale -> its pages
    previous: Tensor | None = None  # keys of the scale before, while the layer may still turn demanding
    turned_at: int | None = None


class OnlineKVCache:
    """The cache of one generation under `policy`, decided as it goes; `attend` as in `PagedKVCache`.

    Args:
        schedule: the model's schedule.
        num_layers: L.
        policy: an `AMSKV.with_capacity(…)`; its similarity table, if any, is not used.
        theta: a layer whose similarity is below it when it overflows turns cache-demanding.
        batch: sequences B; conditional and unconditional ones share each decision.
        kv_heads: Hkv.
        head_dim: as for `PagedKVCache`.
        dtype: of the pages: fp16, bf16, fp32, or int8 with one fp32 scale per row of K and of V.
        device: where the pool lives.
        page_size: rows of a page: 16, 32, 64 or 128.

    Raises:
        TypeError: a schedule, policy, theta, dtype or device of another type.
        ValueError: a size or theta out of range, a device that torch does not know or cannot use, a policy made for
            another model, a capacity too small for the condensed scales, or one that may need more pages than a slot
            can name.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        num_layers: int,
        policy: AMSKVCapacity,
        theta: float,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        page_size: int = 16,
    ) -> None:
        instance_of("schedule", schedule, ScaleSchedule)
        instance_of("policy", policy, AMSKVCapacity)
        num_layers = whole_number("num_layers", num_layers, 1)
        policy.check_fits(schedule, num_layers)
        theta = threshold("theta", theta)
        one_of("page_size", page_size, PAGE_SIZES)
        self._rows = HeadRows(head_dim)
        check_pool(batch, kv_heads, self._rows.size, dtype, device)
        check_device("device", device)
        check_page_numbers(num_layers * _most_pages(schedule, policy, page_size), page_size, batch * kv_heads)
        self.schedule, self.policy, self.theta, self.page_size = schedule, policy, theta, page_size
        self.num_layers, self.batch, self._sequences = num_layers, batch, batch
        self._pool = GrowingPool(batch, kv_heads, page_size, self._rows, dtype, device)
        self.reset()

    def reset(self) -> None:
        """Start a new generation; every layer is undecided again."""
        self._calls = 0
        self.batch = self._sequences
        self._pool.reset()
        start = self.policy.demanding_layers
        self._layers = [
            _Layer(self.policy.c_max if layer in start else self.policy.c_min) for layer in range(self.num_layers)
        ]

    def __repr__(self) -> str:
        schedule = self.schedule.name
        return f"OnlineKVCache({schedule}, {self.num_layers} layers, {self.policy!r}, theta={self.theta}, {self._pool})"

    @property
    def demanding_layers(self) -> dict[int, int]:
        """The layers that turned demanding in this generation, and the scale at which each did."""
        return {i: layer.turned_at for i, layer in enumerate(self._layers) if layer.turned_at is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the pool so far, its scales included."""
        return self._pool.nbytes

    def keep_first(self, batch: int) -> None:
        """As `PagedKVCache.keep_first`."""
        self.batch = whole_number("batch", batch, 1, self.batch)
        self._pool.keep_first(self.batch)
        for layer in self._layers:
            layer.previous = None if layer.previous is None else layer.previous[:batch]

    def visible(self, layer: int) -> tuple[int, ...]:
        """The scales that `layer` holds now.

        Raises:
            IndexError: a layer out of range.
        """
        check_index("layer", layer, self.num_layers)
        return tuple(sorted(self._layers[layer].held))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
    ) -> Tensor:  # fmt: skip
        """Attend to what this layer holds and to k, v, then keep what Algorithm 1 keeps.

        Arguments, result and errors as for `PagedKVCache.attend`.
        """
        check_qkv(q, k, v)
        scale, expected = divmod(self._calls, self.num_layers)
        if scale == len(self.schedule):
            raise ValueError(f"all {scale} steps of schedule {self.schedule.name} are done; call reset()")
        if whole_number("layer", layer, 0) != expected or k.shape[:2] != (self.batch, self.schedule.tokens[scale]):
            raise ValueError(
                f"layer is {layer} with k of shape {tuple(k.shape)}; the next call is layer {expected} of step "
                f"{scale}, {self.batch} sequences of {self.schedule.tokens[scale]} tokens"
            )
        refuse_gradients(q, k, v)
        state = self._layers[layer]
        kept, capacity = self._decide(state, scale, k)
        undecided = capacity == self.policy.c_min < self.policy.c_max
        factor = self._rows.softmax_scale if softmax_scale is None else real_number("softmax_scale", softmax_scale)
        tokens = self.schedule.tokens
        fresh = self._pool.take(tokens[scale]) if scale in kept else NO_SLOTS
        try:
            read = [(pages, tokens[held]) for held, pages in state.held.items()]
            out = self._pool.attn(q, k, v, read, [(fresh, tokens[scale])], factor)
            previous = k.contiguous() if undecided else None  # a view would keep all of qkv alive
        except BaseException:  # a call that fails leaves everything as it was
            self._pool.give_back(fresh)
            raise
        if capacity != state.capacity:
            state.capacity, state.turned_at = capacity, scale
        state.previous = previous
        if scale in kept:
            state.held[scale] = fresh
        for dropped in set(state.held) - set(kept):
            self._pool.give_back(state.held.pop(dropped))
        self._calls += 1
        return out

    def _decide(self, state: _Layer, scale: int, k: Tensor) -> tuple[tuple[int, ...], int]:
        """The scales held after this one, and the layer's capacity: the larger one if its keys say so."""
        held, policy, sizes = tuple(sorted(state.held)), self.policy, self.schedule.sizes
        capacity = state.capacity
        if state.previous is not None and policy.overflows(self.schedule, held, scale, policy.c_min):
            alike = key_similarity(state.previous, k, sizes[scale - 1], sizes[scale])
            capacity = policy.c_max if float(alike) < self.theta else capacity
        if scale == len(self.schedule) - 1:
            return held, capacity  # nothing reads the last scale
        return policy.keep(self.schedule, held, scale, capacity), capacity


def _most_pages(schedule: ScaleSchedule, policy: AMSKVCapacity, page_size: int) -> int:
    """Pages that one layer holds at most, whether or not it turns demanding."""
    pages, most = [-(-tokens // page_size) for tokens in schedule.tokens], 0
    for capacity in (policy.c_min, policy.c_max):
        held = policy.history(schedule, capacity, None)
        for scale, (now, later) in enumerate(pairwise(held)):
            most = max(most, sum(pages[s] for s in {*now, *later} if s <= scale))
    return most
