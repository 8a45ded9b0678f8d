"""The paged KV cache of one generation: the pool, the arenas, and where we are in the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from amskv_kernels import ops  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.arguments import check_device, instance_of, real_number, whole_number
from amskv_kernels.cache.rows import HeadRows
from amskv_kernels.cache.selector import TokenSelector
from amskv_kernels.ops.checks import PlannedAttn, check_pool, refuse_gradients
from amskv_kernels.ops.dispatch import Settings, settings
from amskv_kernels.ops.prepared import Prepared, prepare_attn
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.planning.tables import Slots


class PagedKVCache:
    """Runs a plan: call `attend` for layer 0, 1, … L−1 of step 0, then of step 1, and so on.

    All sequences of the batch are in lockstep. Tables are on the device from the start, so a generation does
    no host work between steps and can be captured into one CUDA graph.

    Args:
        plan: which page holds what, when.
        batch: sequences B (with classifier-free guidance, two per image).
        kv_heads: Hkv.
        head_dim: D, a multiple of 8, at most 128; pages have rows of 64, 96 or 128, padded where D lies between them.
        dtype: of the pages: fp16, bf16, fp32, or int8 with one fp32 scale per row of K and of V.
        device: where the pool lives.

    Raises:
        TypeError: a plan, dtype or device of another type.
        ValueError: a size out of range, or a device that torch does not know or cannot use.
    """

    def __init__(
        self,
        plan: CachePlan,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        instance_of("plan", plan, CachePlan)
        self._rows = HeadRows(head_dim)
        check_pool(batch, kv_heads, self._rows.size, dtype, device)
        check_device("device", device)
        if plan.heads not in (1, kv_heads):
            raise ValueError(f"kv_heads is {kv_heads}; this plan was made for {plan.heads} KV heads")
        self.plan = plan
        self.batch = batch
        arenas = batch * kv_heads // plan.heads
        if arenas * plan.pages > torch.iinfo(torch.int32).max:
            raise ValueError(f"the pool would need {arenas * plan.pages} pages; page numbers are 32-bit")
        shape = (arenas * plan.pages, 2, plan.page_size, self._rows.size)
        with torch.inference_mode(False):  # a pool made by a generation in inference mode serves later ones outside
            self.pages = torch.zeros(shape, dtype=dtype, device=device)
            self.page_scales = torch.zeros(shape[:3], device=device) if dtype == torch.int8 else None
        first = torch.arange(arenas, dtype=torch.int32, device=device) * plan.pages
        self.arena = self._arenas = first.view(batch, -1).repeat_interleave(plan.heads, dim=1)
        self._read, self._write = _upload(plan, self.pages.device)
        self._selector = (
            None
            if plan.selection is None
            else TokenSelector(plan, self._rows, self.pages, self.arena, self.page_scales)
        )  # fmt: skip
        self._turns = _turns(plan, batch)
        self._prepared: dict[tuple[Settings, int, int, torch.dtype], Prepared] = {}
        self._calls = 0

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.plan!r}, batch={self.batch}, {self._rows}, {self.pages.dtype} on "
            f"{self.pages.device}: {self.nbytes} bytes)"
        )

    @property
    def step(self) -> int:
        """The step that the next call belongs to; the schedule's length when the generation is done."""
        return self._calls // self.plan.num_layers

    @property
    def layer(self) -> int:
        """The layer that the next call belongs to."""
        return self._calls % self.plan.num_layers

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, its scales included."""
        return sum(pool.numel() * pool.element_size() for pool in (self.pages, self.page_scales) if pool is not None)

    def reset(self) -> None:
        """Start a new generation; nothing needs to be cleared."""
        self._calls = 0
        self._go_on_with(len(self._arenas))
        if self._selector is not None:
            self._selector.reset()

    def keep_first(self, batch: int) -> None:
        """Go on with the first sequences alone, as where guidance ends before the last step; until `reset`.

        The pool keeps its size, for the next generation.

        Args:
            batch: how many.

        Raises:
            ValueError: not within 1 … the sequences there are.
        """
        self._go_on_with(whole_number("batch", batch, 1, self.batch))

    def _go_on_with(self, batch: int) -> None:
        if batch == self.batch:
            return
        self.batch, self.arena = batch, self._arenas[:batch]
        self._turns = _turns(self.plan, batch)
        if self._selector is not None:
            self._selector.keep_first(self.arena)

    def prepare(self, layer: int, x: Tensor, weight: Tensor) -> None:
        """What a model tells before each `attend`; ScaleKV's released mode alone makes use of it.

        Args:
            layer: of the coming call.
            x: (B, n, C), the input of the layer's query projection.
            weight: (H · D, C), the projection's weight.

        Raises:
            TypeError: x or weight is no tensor.
            ValueError: another layer than that of the coming call, or x or weight of another shape.
        """
        if self._selector is not None:
            if whole_number("layer", layer, 0) != self.layer:
                raise ValueError(f"layer is {layer}; the next call is layer {self.layer} of step {self.step}")
            self._selector.prepare(self.step, layer, x, weight)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
    ) -> Tensor:  # fmt: skip
        """Attend to this layer's history and to k, v, and keep what later steps will read.

        Args:
            layer: must be the plan's next one.
            q: (B, n, H, D) with n the tokens of the current scale; any strides whose last is 1.
            k: (B, n, Hkv, D).
            v: as k.
            softmax_scale: 1/√D unless given.

        Returns:
            (B, n, H, D), contiguous.

        Raises:
            TypeError: q, k or v is no tensor.
            ValueError: a call out of order, past the end, or with another batch or token count than planned;
                what `torch.ops.amskv.attn` raises.
            RuntimeError: gradients would be needed; the op has none.
        """
        call = self._calls
        scale = self._checked(call, layer, q, k, v, softmax_scale)
        q, k, v = self._rows.pad(q, k, v)
        if torch.compiler.is_compiling() or not type(q) is type(self.pages) is Tensor:  # traced: as the op itself
            tables = (self.pages, self.arena, self._read[call], self._write[call])
            out, _ = torch.ops.amskv.attn(q, k, v, *tables, scale, self.page_scales)
        else:
            out = self._ready(call, q.dtype)(q, k, v, scale)
        self._attended(layer, q, k, v, scale)
        return self._rows.cut(out)

    def attend_with_lse(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`attend`, for what attends to more than the cache: its output, and lse (B, H, n) fp32 to weigh it by."""
        call = self._calls
        scale = self._checked(call, layer, q, k, v, softmax_scale)
        q, k, v = self._rows.pad(q, k, v)
        tables = (self.pages, self.arena, self._read[call], self._write[call])
        out, lse = torch.ops.amskv.attn(q, k, v, *tables, scale, self.page_scales)
        self._attended(layer, q, k, v, scale)
        return self._rows.cut(out), lse

    def look(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
    ) -> Tensor:  # fmt: skip
        """`attend`, for a step that is run once more: what the coming step reads, and nothing is stored.

        Raises:
            ValueError: what `attend` raises, and a step that has begun to store.
        """
        if self.layer != 0:
            raise ValueError(f"step {self.step} has begun; look before layer 0 of a step has attended")
        call = self._calls + whole_number("layer", layer, 0, self.plan.num_layers - 1)
        scale = self._checked(call, layer, q, k, v, softmax_scale)
        q, k, v = self._rows.pad(q, k, v)
        tables = (self.pages, self.arena, self._read[call], self._read[call][..., :0])
        out, _ = torch.ops.amskv.attn(q, k, v, *tables, scale, self.page_scales)
        return self._rows.cut(out)

    def attend_beside(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """Attention to k and v alone and its lse, as in `attend_with_lse`: for what lies outside the cache."""
        none, arena = self.arena.new_empty(1, 1, 0), self.arena
        q, k, v = self._rows.pad(q, k, v)
        out, lse = torch.ops.amskv.attn(q, k, v, self.pages, arena, none, none, softmax_scale, self.page_scales)
        return self._rows.cut(out), lse

    def _checked(
        self, call: int, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None
    ) -> float:  # fmt: skip
        """The softmax scale of a call whose turn it is."""
        check_qkv(q, k, v)
        # By type as well: True is equal to 1, and 1.0 too.
        if type(layer) is not int or call >= len(self._turns) or self._turns[call] != (layer, *q.shape[:2]):
            self._check_turn(call, layer, q)
        refuse_gradients(q, k, v)
        scale = self._rows.softmax_scale if softmax_scale is None else real_number("softmax_scale", softmax_scale)
        if self._selector is not None:
            self._selector.check(self.step, layer)
        return scale

    def _attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
        """What follows a call's attention."""
        if self._selector is not None:
            self._selector.after(self.step, layer, q, k, v, self._read[self._calls], softmax_scale)
        self._calls += 1

    def _ready(self, call: int, dtype: torch.dtype) -> Prepared:
        """The call as this context's backend makes it; worked out once, in the first generation."""
        ready = self._prepared.get((settings(), call, self.batch, dtype))
        if ready is None:
            n = self.plan.schedule.tokens[call // self.plan.num_layers]
            used = self.arena.numel() // self.plan.heads * self.plan.pages  # of the sequences that there still are
            scales = None if self.page_scales is None else self.page_scales[:used]
            tables = (self.pages[:used], self.arena, self._read[call], self._write[call])
            planned = PlannedAttn(*tables, n, dtype, scales)
            ready = self._prepared[settings(), call, self.batch, dtype] = prepare_attn(planned)
        return ready

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}  # they write into this pool, a copy has its own

    def _check_turn(self, call: int, layer: int, q: Tensor) -> None:
        schedule = self.plan.schedule
        step, expected = divmod(call, self.plan.num_layers)
        if (steps := len(schedule)) <= step:
            raise ValueError(f"all {steps} steps of schedule {schedule.name} are done; call reset() to start again")
        if whole_number("layer", layer, 0) != expected:
            raise ValueError(f"layer is {layer}; the plan's next call is layer {expected} of step {step}")
        if q.dim() == 4 and q.shape[0] != self.batch:
            raise ValueError(f"q has batch {q.shape[0]}; this cache was made for {self.batch} sequences")
        if q.dim() == 4 and q.shape[1] != schedule.tokens[step]:
            t, (h, w), n = schedule.frames[step], schedule.sizes[step], schedule.tokens[step]
            size = f"{h}·{w}" if t == 1 else f"{t}·{h}·{w}"
            raise ValueError(f"q has {q.shape[1]} tokens; step {step} of schedule {schedule.name} has {size} = {n}")


def _turns(plan: CachePlan, batch: int) -> list[tuple[int, int, int]]:
    """Layer, sequences and tokens of every call."""
    return [(layer, batch, n) for n in plan.schedule.tokens for layer in range(plan.num_layers)]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError where one of them is no tensor."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            instance_of(name, tensor, Tensor)


def _upload(plan: CachePlan, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Every call's (1, heads, S) tables, as views of one device tensor."""
    calls = [(step, layer) for step in range(len(plan.schedule)) for layer in range(plan.num_layers)]
    tables: list[Slots] = [table(*call) for table in (plan.read_slots, plan.write_slots) for call in calls]
    flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables])).to(device)
    views = [
        view.view(1, plan.heads, view.numel() // plan.heads) for view in flat.split([table.size for table in tables])
    ]
    return views[: len(calls)], views[len(calls) :]
