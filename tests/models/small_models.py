"""Small models of random weights, and attention that stands in for a cache's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, VARConfig, VQVAEConfig
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
from amskv_kernels.schedule import ScaleSchedule

SQUARE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (5, 5)])
OBLONG = ScaleSchedule([(1, 1), (1, 2), (2, 3), (4, 3), (4, 6)])
SCHEDULES = pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"shared_adaln": True}, {"attn_l2_norm": False}],
    ids=["plain", "shared adaLN", "no L2 norm"],
)


def infinity_stack(config: InfinityConfig) -> InfinityStack:
    """Of torch's own random numbers; initial weights are too small for attention to show in the maps."""
    made = InfinityStack(config)
    for block in made.unregistered_blocks:
        nn.init.normal_(block.sa.scale_mul_1H11, 2.0)
        for bias in (block.sa.q_bias, block.sa.v_bias, block.ca.v_bias):
            nn.init.normal_(bias)
        for linear in (block.sa.mat_qkv, block.sa.proj, block.ca.mat_kv):
            linear.weight.data.mul_(3)
    return made.eval()


def shuffled(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values that matter, zero-initialised ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim < 2 else 1.0 / parameter[0].numel() ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def pair(schedule: ScaleSchedule, seed: int = 0, **changes: object) -> tuple[VAR, VQVAE]:
    """A small random VAR with its VQ-VAE."""
    vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=6, vocab_size=40, schedule=schedule))
    config = VARConfig(schedule, depth=2, embed_dim=64, num_heads=2, vocab_size=40, z_channels=6, num_classes=5)
    var = VAR(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    shuffled(var, seed)
    shuffled(vae, seed + 1)
    return var.eval(), vae.eval()


class Masked:
    """All scales in one pass: a plain softmax over a mask, in the caller's dtype."""

    def __init__(self, var: VAR) -> None:
        self.mask = var.attn_bias_for_masking[0, 0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        n = q.shape[1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale + self.mask[:n, :n]
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Recorder(ConcatKVCache):
    """The stock cache, noting what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, tuple[torch.dtype, ...]]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        self.calls.append((layer, q.shape[1], (q.dtype, k.dtype, v.dtype)))
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return super().attend(layer, q, k, v, softmax_scale)
