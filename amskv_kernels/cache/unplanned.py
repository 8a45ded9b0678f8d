"""A cache for models whose token counts are known only as they run: pruned maps, steps that are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.arguments import check_device, instance_of, one_of, real_number, whole_number
from amskv_kernels.cache.growing import Extent, GrowingPool
from amskv_kernels.cache.paged import check_qkv
from amskv_kernels.cache.rows import HeadRows
from amskv_kernels.ops.checks import check_pool, refuse_gradients
from amskv_kernels.planning.layout import PAGE_SIZES
from amskv_kernels.planning.pages import NO_SLOTS
from amskv_kernels.policies import HeadPolicy, Policy, TokenPolicy
from amskv_kernels.schedule import ScaleSchedule


class UnplannedKVCache:
    """The cache of one generation under a policy of whole scales; `attend` as in `PagedKVCache`, of any token count.

    Pages are handed out as the generation goes, and given back when the policy drops their scale. A scale that was
    left out is held by no layer. What the last drawn scale brings is stored where the schedule goes on after it.

    Args:
        schedule: the model's schedule, for the policy.
        num_layers: L.
        policy: of whole scales, the same for all heads of a layer.
        batch: sequences B.
        kv_heads: Hkv.
        head_dim: as for `PagedKVCache`.
        dtype: of the pages: fp16, bf16, fp32 or int8.
        device: where the pool lives.
        page_size: rows of a page: 16, 32, 64 or 128.

    Raises:
        TypeError: a schedule, policy, dtype or device of another type; a policy of tokens or of heads.
        ValueError: a size out of range, or a policy made for another model.
    """

    def __init__(
        self,
        schedule: ScaleSchedule,
        num_layers: int,
        policy: Policy,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        page_size: int = 16,
    ) -> None:
        instance_of("schedule", schedule, ScaleSchedule)
        instance_of("policy", policy, Policy)
        if isinstance(policy, TokenPolicy | HeadPolicy):
            raise TypeError(
                f"policy is {policy!r}; where token counts are known only as the model runs, it must be one of whole "
                f"scales, the same for all heads of a layer"
            )
        num_layers = whole_number("num_layers", num_layers, 1)
        policy.check_fits(schedule, num_layers)
        one_of("page_size", page_size, PAGE_SIZES)
        self._rows = HeadRows(head_dim)
        check_pool(batch, kv_heads, self._rows.size, dtype, device)
        check_device("device", device)
        self.schedule, self.policy, self.num_layers, self.batch = schedule, policy, num_layers, batch
        self._pool = GrowingPool(batch, kv_heads, page_size, self._rows, dtype, device)
        self.reset()

    def reset(self) -> None:
        """Start a new generation."""
        self.step = self.layer = 0
        self._pool.reset()
        self._held: list[dict[int, Extent]] = [{} for _ in range(self.num_layers)]

    def __repr__(self) -> str:
        return f"UnplannedKVCache({self.schedule.name}, {self.num_layers} layers, {self.policy!r}, {self._pool})"

    @property
    def nbytes(self) -> int:
        """Bytes of the pool so far, its scales included."""
        return self._pool.nbytes

    def tokens(self, layer: int) -> int:
        """How many tokens a layer holds now."""
        return sum(rows for _, rows in self._held[layer].values())

    def go_to(self, step: int) -> None:
        """Leave out the steps before `step`.

        Raises:
            ValueError: a step that is over, does not exist, or in the middle of another.
        """
        if step == self.step:
            return
        whole_number("step", step, self.step, len(self.schedule) - 1)
        if self.layer:
            raise ValueError(f"step is {step}; step {self.step} is at layer {self.layer} of {self.num_layers}")
        self.step = step

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None
    ) -> Tensor:  # fmt: skip
        """Attend to what the policy shows this layer and to k, v, then keep what the next step will read.

        Arguments, result and errors as for `PagedKVCache.attend`; n is any.
        """
        check_qkv(q, k, v)
        if self.step == len(self.schedule):
            raise ValueError(f"all {self.step} steps of schedule {self.schedule.name} are done; call reset()")
        if layer != self.layer or k.shape[0] != self.batch:
            raise ValueError(
                f"layer is {layer} with k of shape {tuple(k.shape)}; the next call is layer {self.layer} of step "
                f"{self.step}, {self.batch} sequences"
            )
        refuse_gradients(q, k, v)
        factor = self._rows.softmax_scale if softmax_scale is None else real_number("softmax_scale", softmax_scale)
        held, step, rows = self._held[layer], self.step, k.shape[1]
        now = [held[scale] for scale in self.policy.visible(self.schedule, layer, step) if scale in held]
        last = step == len(self.schedule) - 1
        later = () if last else self.policy.visible(self.schedule, layer, step + 1)
        fresh = self._pool.take(rows) if step in later else NO_SLOTS
        try:
            out = self._pool.attn(q, k, v, now, [(fresh, rows)] if step in later else [], factor)
        except BaseException:  # a call that fails leaves everything as it was
            self._pool.give_back(fresh)
            raise
        if step in later:
            held[step] = fresh, rows
        for dropped in set(held) - set(later):
            self._pool.give_back(held.pop(dropped)[0])
        self.layer = (layer + 1) % self.num_layers
        self.step += self.layer == 0
        return out
