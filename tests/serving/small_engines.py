"""A small random model to serve, and what its images are when they are drawn alone."""

from __future__ import annotations

from functools import cache

import torch
from small_models import pair

from amskv_kernels import CachePlan, PagedKVCache, parse_policy
from amskv_kernels.models import VAR, VQVAE, Generation
from amskv_kernels.policies.base import HeadPolicy, Policy
from amskv_kernels.schedule import ScaleSchedule
from amskv_kernels.serving import Engine

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 5), (6, 6)])
SAMPLING = {"guidance": 2.0, "top_k": 20, "top_p": 0.9}


class Unlike(HeadPolicy):
    """The first head keeps everything, the others the last scale and the first two of even layers."""

    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        return tuple(s for s in range(step) if head == 0 or s == step - 1 or (layer % 2 == 0 and s < 2))

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        """Any will do."""


@cache
def model(**changes: object) -> tuple[VAR, VQVAE]:
    """Two layers of two heads of 64."""
    return pair(SCHEDULE, depth=2, embed_dim=128, **changes)


def engine(policy: str | Policy = "full", images: float = 4, **settings: object) -> Engine:
    """An engine for `model()` whose pool holds so many images in lockstep."""
    plan = built(policy)
    pair = 2 if settings.get("dtype") == torch.int8 else 8
    unit = (2 if plan.heads == 1 else 1) * plan.page_size * (64 * pair + (8 if pair == 2 else 0))
    return Engine(*model(), policy, memory=int(images * 2 * plan.pages * unit), **settings)  # type: ignore[arg-type]


def built(policy: str | Policy) -> CachePlan:
    """The plan of a policy for `model()`."""
    config = model()[0].config
    chosen = parse_policy(policy, config.schedule, config.depth) if isinstance(policy, str) else policy
    return CachePlan.build(config.schedule, chosen, config.depth, kv_heads=config.num_heads)


def alone(
    label: int, seed: int, policy: str | Policy = "full", *, dtype: torch.dtype = torch.float32, **sampling: object
) -> Generation:  # fmt: skip
    """The image as `VAR.generate` draws it, in a batch of one."""
    var, vae = model()
    config, settings = var.config, {**SAMPLING, **sampling}
    cache_of_one = PagedKVCache(
        built(policy), batch=2, kv_heads=config.num_heads, head_dim=config.head_dim, dtype=dtype
    )  # fmt: skip
    settings["cfg"] = settings.pop("guidance")
    generator = torch.Generator().manual_seed(seed)
    return var.generate(vae, torch.tensor([label]), cache_of_one, generator=generator, **settings)  # type: ignore[arg-type]
