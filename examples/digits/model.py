"""The digits model's sizes, files and loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from amskv_kernels.cli.subjects import DIGITS_SAMPLING
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig, checkpoint
from amskv_kernels.schedule import ScaleSchedule

WEIGHTS = Path(__file__).parent / "weights"
CALIBRATION = WEIGHTS / "calibration.json"  # the key similarity that AMS-KV ranks the layers by
SCHEDULE = ScaleSchedule.named("var-256")
VQVAE_SIZES: dict[str, Any] = {
    "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 256
}  # fmt: skip
VAR_SIZES: dict[str, Any] = {
    "depth": 8, "embed_dim": 128, "num_heads": 2, "vocab_size": 256, "z_channels": 8, "num_classes": 10,
    "shared_adaln": True,
}  # fmt: skip
SAMPLING = DIGITS_SAMPLING  # arguments of VAR.generate that suit this model


def build(vqvae_sizes: dict[str, Any] | None = None, var_sizes: dict[str, Any] | None = None) -> tuple[VAR, VQVAE]:
    """The two models without their weights, on the CPU in fp32."""
    sizes = {**(vqvae_sizes or VQVAE_SIZES)}
    sizes["ch_mult"] = tuple(sizes["ch_mult"])
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **sizes))
    return VAR(VARConfig(schedule=SCHEDULE, **(var_sizes or VAR_SIZES))), vae


def load(device: str | torch.device = "cpu", weights: Path = WEIGHTS) -> tuple[VAR, VQVAE]:
    """The trained models, fp32, in evaluation mode, without gradients.

    Raises:
        ValueError: `weights` lacks var.safetensors or vqvae.safetensors, or one does not fit the sizes it names.
    """
    return checkpoint.load(weights / "var.safetensors", weights / "vqvae.safetensors", device=device)
