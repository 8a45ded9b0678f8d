"""Both families that `patch` knows, small, for what must hold of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import public_var
import torch
from small_models import infinity_stack
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
from amskv_kernels.schedule import ScaleSchedule

SMALL = ScaleSchedule.named("infinity-0.06m-1.000")
LABELS = torch.tensor([3, 7])


class Family(NamedTuple):
    """A family's small model.

    Attributes:
        make: a model; the same weights for the same seed.
        draw: its images.
        attentions: its self-attention modules.
        replace: puts another module in place of a layer's self-attention.
    """

    make: Callable[..., nn.Module]
    draw: Callable[[nn.Module], Tensor]
    attentions: Callable[[nn.Module], list[nn.Module]]
    replace: Callable[[nn.Module, int, nn.Module], None]
    schedule: ScaleSchedule
    attends: tuple  # further arguments of a self-attention's forward


def infinity(seed: int = 5) -> InfinityStack:
    torch.manual_seed(seed)
    return infinity_stack(InfinityConfig(layers=3, width=128, heads=2, chunks=3))


def prompts(lengths: tuple[int, ...] = (5, 3), width: int = 128, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(lengths), width, generator=rng)
    return features, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), max(lengths)


def var(seed: int = 7) -> public_var.VAR:
    torch.manual_seed(seed)
    return public_var.VAR().eval()


FAMILIES = {
    "VAR": Family(
        var,
        lambda model: model.autoregressive_infer_cfg(B=2, label_B=LABELS, g_seed=5),
        lambda model: [block.attn for block in model.blocks],
        lambda model, layer, module: setattr(model.blocks[layer], "attn", module),
        ScaleSchedule([(p, p) for p in (1, 2, 3, 5)]),
        (None,),
    ),
    "Infinity": Family(
        infinity,
        lambda model: model.generate(prompts(), SMALL),
        lambda model: [block.sa for block in model.unregistered_blocks],
        lambda model, layer, module: setattr(model.unregistered_blocks[layer], "sa", module),
        SMALL,
        (None,),
    ),
}
