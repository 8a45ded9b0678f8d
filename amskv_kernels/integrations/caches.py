"""From what a user asks for to the cache of a generation: policy, plan, pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from amskv_kernels.arguments import instance_of, one_of, shown, threshold
from amskv_kernels.cache import OnlineKVCache, PagedKVCache, UnplannedKVCache
from amskv_kernels.planning.layout import PAGE_SIZES
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import AMSKVCapacity, Policy, parse_policy, read_policy
from amskv_kernels.policies.around import Around, placed
from amskv_kernels.policies.base import check_ranks
from amskv_kernels.schedule import ScaleSchedule

PolicyLike = Policy | str | Callable[[ScaleSchedule], Policy | str]
Cache = PagedKVCache | OnlineKVCache | UnplannedKVCache


class Caches:
    """Makes the cache of each generation, and keeps the last one as long as it fits.

    Args:
        policy: an object, a string as `parse_policy` reads it, or a function of the schedule.
        num_layers: L.
        page_size: see `CachePlan.build`.
        online: decide as the generation goes (`OnlineKVCache`).
        theta: of the online mode; the policy's own unless given.
        pages: "int8", or None for the dtype of the keys.
        ranks: processes that the model's heads are dealt to.

    Attributes:
        around: what stands around the maps that the policy is for, in the coming generations; None: nothing.
        counted: whether token counts are known beforehand; else caches are of `UnplannedKVCache`.
    """

    def __init__(
        self, policy: PolicyLike, num_layers: int, page_size: int | None, online: bool, theta: float | None,
        pages: str | None, ranks: int = 1,
    ) -> None:  # fmt: skip
        if pages not in (None, "int8"):
            raise ValueError(f"pages is {shown(pages)}; it must be 'int8', or None for the model's own dtype")
        instance_of("online", online, bool)
        if page_size is not None:
            one_of("page_size", page_size, PAGE_SIZES)
        if theta is not None:
            theta = threshold("theta", theta)
            if not online:
                raise ValueError(f"theta is {theta}; it means something to online=True alone")
        if online and ranks > 1:
            raise ValueError(f"online is True; it decides by all heads, and the model's are on {ranks} processes")
        if isinstance(policy, Policy):
            check_ranks(policy, ranks)
        self._policy_of, self._ranks = _maker(policy, num_layers), ranks
        self._layers, self._page_size = num_layers, page_size
        self.online, self._theta, self._eight_bit = online, theta, pages == "int8"
        self._plans: dict[tuple[ScaleSchedule, int, Around | None], CachePlan] = {}
        self._made_for: object = None
        self.around: Around | None = None
        self.counted = True
        self.cache: Cache | None = None
        if online and isinstance(policy, Policy):
            self._theta_of(_online(policy))

    def policy(self, schedule: ScaleSchedule) -> Policy:
        """The policy of a generation on a schedule.

        Raises:
            TypeError: the user's function gives no policy, or a policy that is not for the online mode.
            ValueError: what `parse_policy` raises, or no theta for the online mode.
        """
        policy = self._policy_of(schedule if self.around is None else self.around.maps)
        check_ranks(policy, self._ranks)
        if self.around is not None:
            return placed(policy, self.around, schedule)
        return _online(policy) if self.online else policy

    def plan(self, schedule: ScaleSchedule, kv_heads: int) -> CachePlan | None:
        """The plan for a schedule, made once; None in the online mode, whose policy and theta it checks."""
        if self.online:
            self._theta_of(self.policy(schedule))
        if self.online or not self.counted:
            return None
        key = schedule, kv_heads, self.around
        if key not in self._plans:
            self._plans[key] = CachePlan.build(
                schedule, self.policy(schedule), self._layers, self._page_size, kv_heads=kv_heads
            )
        return self._plans[key]

    def start(self, schedule: ScaleSchedule, k: Tensor) -> Cache:
        """The cache for a new generation on `schedule`, whose first keys are k (B, n, Hkv, D)."""
        batch, _, kv_heads, head_dim = k.shape
        plan = self.plan(schedule, kv_heads)
        wanted = (schedule, self.around, batch, kv_heads, head_dim, k.dtype, k.device)
        if self.cache is None or self._made_for != wanted:
            self.cache = None  # its pool is free before the new one is made
            sizes: dict[str, Any] = {
                "batch": batch,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "dtype": torch.int8 if self._eight_bit else k.dtype,
                "device": k.device,
            }
            self.cache = self._made(schedule, sizes) if plan is None else PagedKVCache(plan, **sizes)
            self._made_for = wanted
        self.cache.reset()
        return self.cache

    def _made(self, schedule: ScaleSchedule, sizes: dict[str, Any]) -> OnlineKVCache | UnplannedKVCache:
        policy: Any = self.policy(schedule)
        sizes["page_size"] = 16 if self._page_size is None else self._page_size
        if not self.online:
            return UnplannedKVCache(schedule, self._layers, policy, **sizes)
        return OnlineKVCache(schedule, self._layers, policy, self._theta_of(policy), **sizes)

    def _theta_of(self, policy: Policy) -> float:
        theta = getattr(policy, "theta", None) if self._theta is None else self._theta
        if theta is None:
            raise ValueError("theta is None; the online mode needs the similarity below which a layer is demanding")
        return theta


def _online(policy: Policy) -> AMSKVCapacity:
    if not isinstance(policy, AMSKVCapacity):
        raise TypeError(f"policy is {policy!r}; the online mode needs an AMSKV.with_capacity(…)")
    return policy


def _given(policy: Policy, schedule: ScaleSchedule) -> Policy:
    return policy


def _maker(policy: PolicyLike, num_layers: int) -> Callable[[ScaleSchedule], Policy]:
    """What gives the policy for a schedule; what is wrong with a policy whatever the schedule, it says now."""
    if isinstance(policy, Policy):
        policy.check_layers(num_layers)
        return partial(_given, policy)
    if isinstance(policy, str):
        make = read_policy(policy)
        return lambda schedule: make(schedule, num_layers)
    if isinstance(policy, type) or not callable(policy):  # a class, Full for Full(), is a function of something else
        raise TypeError(f"policy is {policy!r}; it must be a Policy, a string or a function of the schedule")

    def made(schedule: ScaleSchedule) -> Policy:
        found = policy(schedule)
        if isinstance(found, str):
            return parse_policy(found, schedule, num_layers)
        if not isinstance(found, Policy):
            raise TypeError(f"policy gave {found!r} for schedule {schedule.name}; it must give a Policy or a string")
        return found

    return made


@cache
def schedule_of(sizes: tuple[tuple[int, int], ...]) -> ScaleSchedule:
    """The published schedule of these sizes, or a custom one."""
    published = (ScaleSchedule.named(name) for name in ScaleSchedule.names())
    return next((schedule for schedule in published if schedule.sizes == sizes), ScaleSchedule(sizes))
