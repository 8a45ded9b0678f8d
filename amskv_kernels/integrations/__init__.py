"""Patches for public model code, applied in place and undone on demand: one `patch` for every family."""

from __future__ import annotations

from typing import Any

from torch import nn

from amskv_kernels.arguments import instance_of
from amskv_kernels.integrations import fastvar, hart, infinity, infinitystar, star, switti, var, varedit
from amskv_kernels.integrations.caches import Caches, PolicyLike
from amskv_kernels.integrations.common import Patch
from amskv_kernels.integrations.family import Family
from amskv_kernels.integrations.modules import unwrapped
from amskv_kernels.models.attention import Observer
from amskv_kernels.models.tensor_parallel import ranks_of

__all__ = ["Patch", "patch", "unpatch"]

FAMILIES: tuple[Family, ...] = (
    infinity.FAMILY, fastvar.FAMILY, varedit.FAMILY, infinitystar.FAMILY,
    var.FAMILY, star.FAMILY, hart.LLAMA, hart.GPT2, switti.FAMILY,
)  # fmt: skip


def patch(
    model: Any,
    policy: PolicyLike,
    *,
    page_size: int | None = None,
    observe: Observer | None = None,
    online: bool = False,
    theta: float | None = None,
    pages: str | None = None,
) -> Patch:
    """Patch a model of a public class in place, so that its generations keep only what `policy` keeps.

    The model's own code goes on drawing the images, whatever the batch, the guidance and the device; it may be
    wrapped by `torch.compile` or FSDP, as a whole or in part. Copies of a patched model are plainly unpatched.

    Args:
        model: an instance of a public class, with its weights; docs/patching.md lists the families.
        policy: an object, `Full()` or `AMSKV(…)`; a string as `parse_policy` reads it, "ams-kv:75"; or a function from
            the schedule at hand to one of these, for models that draw at several aspect ratios.
        page_size: see `CachePlan.build`.
        observe: called with (layer, q, k, v, softmax_scale) at every call, for example `SimilarityRecorder.observe` to
            calibrate.
        online: decide as the generation goes, see `OnlineKVCache`; `policy` must be an `AMSKV.with_capacity(…)`.
        theta: of the online mode; the policy's own unless given.
        pages: "int8" keeps keys and values in eight bits, half of bf16's bytes and a scale per row; in the dtype that
            the model attends in unless given.

    Returns:
        A handle with `.undo()`, `.plan` and `.cache`, usable in a `with` statement.

    Raises:
        TypeError: a model of no known family, or not laid out or called like the public class: names what differs. A
            policy of another type.
        ValueError: already patched, a head size or kind of pages that is not supported, or a policy that is not known
            or does not fit the model. What fits some schedules only, a model of many finds out when a generation
            begins.
    """
    inner = unwrapped(model)
    family = _family_of(inner)
    modules = family.modules(inner)
    caches = Caches(policy, len(modules), page_size, online, theta, pages, ranks_of(inner))
    return family.patch(inner, modules, caches, observe)


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


def _family_of(model: Any) -> Family:
    """The family whose attention the model's is most like, of those that the model looks like."""
    alike = [family for family in FAMILIES if family.like(model)]
    if not alike:
        needs = dict.fromkeys(family.needs for family in FAMILIES)
        names = {each: ", ".join(family.name for family in FAMILIES if family.needs == each) for each in needs}
        known = "; ".join(f"{' and '.join(each)} ({names[each]})" for each in needs)
        raise TypeError(f"model is a {type(model).__name__}, of no family that can be patched; these have {known}")
    return min(alike, key=lambda family: family.differences(model))
