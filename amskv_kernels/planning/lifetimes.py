"""Lifetimes of entries: the last step at which a layer, or a head of it, reads each scale."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from amskv_kernels.arguments import shown
from amskv_kernels.policies.base import HeadPolicy, Policy
from amskv_kernels.schedule import ScaleSchedule


def lifetimes(
    schedule: ScaleSchedule, policy: Policy, num_layers: int, kv_heads: int = 1
) -> npt.NDArray[np.int64]:  # fmt: skip
    """(L · Hkv, K) the last step at which each layer's head reads each scale; −1 for one that is never read.

    Raises:
        ValueError: the policy reads a scale not yet drawn, or one it has dropped before.
    """
    last_read = np.full((num_layers * kv_heads, len(schedule)), -1, dtype=np.int64)
    visible_to = policy.visible_to if isinstance(policy, HeadPolicy) else None
    where = f"{type(policy).__name__} reads scale"
    for row in range(num_layers * kv_heads):
        layer, head = divmod(row, kv_heads)
        held: tuple[int, ...] = ()
        for step in range(len(schedule)):
            if visible_to is None:
                found: object = policy.visible(schedule, layer, step)
            else:
                found = visible_to(schedule, layer, head, step)
            if not isinstance(found, Iterable):
                raise ValueError(f"{where}s {shown(found)} in layer {layer} at step {step}; they must be a tuple")
            visible = tuple(found)
            for scale in visible:
                if not isinstance(scale, int | np.integer) or not 0 <= scale < step:
                    raise ValueError(
                        f"{where} {shown(scale)} in layer {layer} at step {step}; it must be an earlier one, "
                        f"0 … {step - 1}"
                    )
                if scale not in held and scale != step - 1:
                    raise ValueError(
                        f"{where} {scale} in layer {layer} at step {step}, after having dropped it; "
                        f"a dropped scale must never return"
                    )
                last_read[row, scale] = step
            if list(visible) != sorted(set(visible)):
                raise ValueError(f"{where}s {visible} in layer {layer} at step {step}; they must ascend, each once")
            held = visible
    return last_read


def planned_heads(policy: Policy, schedule: ScaleSchedule, num_layers: int, kv_heads: int | None) -> int:
    """How many heads of a layer are planned on their own."""
    if not isinstance(policy, HeadPolicy) or policy.alike:
        return 1
    if kv_heads is None:
        raise ValueError(f"kv_heads is None; {type(policy).__name__} treats heads differently and must know it")
    policy.check_heads(schedule, num_layers, kv_heads)
    return kv_heads


def reads_everything(last_read: npt.NDArray[np.int64]) -> bool:
    """Whether every scale is read up to the last step."""
    steps = last_read.shape[1]
    return bool((last_read[:, :-1] == steps - 1).all())
