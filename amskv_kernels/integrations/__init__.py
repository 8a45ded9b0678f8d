"""Patches for public model code, applied in place and undone on demand: one `patch` for every family."""

from __future__ import annotations

from typing import Any

from torch import nn

from amskv_kernels.arguments import instance_of
from amskv_kernels.integrations import infinity, var
from amskv_kernels.integrations.caches import PolicyLike
from amskv_kernels.integrations.common import Patch
from amskv_kernels.integrations.modules import unwrapped
from amskv_kernels.models.attention import Observer

__all__ = ["Patch", "patch", "unpatch"]

_FAMILIES = {"Infinity": infinity, "VAR": var}


def patch(
    model: Any,
    policy: PolicyLike,
    *,
    page_size: int | None = None,
    observe: Observer | None = None,
    online: bool = False,
    theta: float | None = None,
) -> Patch:
    """Patch a public VAR or Infinity in place, so that its generations keep only what `policy` keeps.

    The model's own code goes on drawing the images, whatever the batch, the guidance and the device; it may be
    wrapped by `torch.compile` or FSDP, as a whole or in part. Copies of a patched model are plainly unpatched.

    Args:
        model: an instance of a public class, with its weights.
        policy: an object, `Full()` or `AMSKV(…)`; a string as `parse_policy` reads it, "ams-kv:75"; or a function from
            the schedule at hand to one of these, for models that draw at several aspect ratios.
        page_size: see `CachePlan.build`.
        observe: called with (layer, q, k, v, softmax_scale) at every call, for example `SimilarityRecorder.observe` to
            calibrate.
        online: decide as the generation goes, see `OnlineKVCache`; `policy` must be an `AMSKV.with_capacity(…)`.
        theta: of the online mode; the policy's own unless given.

    Returns:
        A handle with `.undo()`, `.plan` and `.cache`, usable in a `with` statement.

    Raises:
        TypeError: a model of no known family, or not laid out or called like the public class: names what differs. A
            policy of another type.
        ValueError: already patched, a head size that is not supported, or a policy that is not known or does not fit
            the model. What fits some schedules only, a model of many finds out when a generation begins.
    """
    inner = unwrapped(model)
    for family in _FAMILIES.values():
        if all(hasattr(inner, name) for name in family.NEEDS):
            return family.patch(inner, policy, page_size=page_size, observe=observe, online=online, theta=theta)
    known = "; ".join(f"{name} has {' and '.join(family.NEEDS)}" for name, family in _FAMILIES.items())
    raise TypeError(f"model is a {type(inner).__name__}, of no family that can be patched: {known}")


def unpatch(model: nn.Module) -> None:
    """Undo the patch of a model, whether its handle is at hand or not; an unpatched model is left as it is.

    Raises:
        TypeError: no `torch.nn.Module`.
    """
    instance_of("model", model, nn.Module)
    for module in model.modules():
        binding = vars(module).get("_amskv")
        if binding is not None:
            binding.patch.undo()
