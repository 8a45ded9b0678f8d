"""The digits model's sizes, files and loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.schedule import ScaleSchedule

WEIGHTS = Path(__file__).parent / "weights"
SCHEDULE = ScaleSchedule.named("var-256")
VQVAE_SIZES: dict[str, Any] = {
    "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 256
}  # fmt: skip
VAR_SIZES: dict[str, Any] = {
    "depth": 8, "embed_dim": 128, "num_heads": 2, "vocab_size": 256, "z_channels": 8, "num_classes": 10,
    "shared_adaln": True,
}  # fmt: skip
SAMPLING: dict[str, Any] = {"cfg": 3.0, "top_k": 64, "top_p": 0.95}  # arguments of VAR.generate that suit this model


def build(vqvae_sizes: dict[str, Any] | None = None, var_sizes: dict[str, Any] | None = None) -> tuple[VAR, VQVAE]:
    """The two models without their weights, on the CPU in fp32."""
    sizes = {**(vqvae_sizes or VQVAE_SIZES)}
    sizes["ch_mult"] = tuple(sizes["ch_mult"])
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **sizes))
    return VAR(VARConfig(schedule=SCHEDULE, **(var_sizes or VAR_SIZES))), vae


def save(path: Path, model: torch.nn.Module, sizes: dict[str, Any]) -> None:
    """Write a model's state dict and sizes; the mask buffer in fp16, which holds its 0 and -inf exactly."""
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    if "attn_bias_for_masking" in state:
        state["attn_bias_for_masking"] = state["attn_bias_for_masking"].half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"config": json.dumps(sizes), "schedule": SCHEDULE.name})


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(state dict, sizes) of a file that `save` wrote."""
    with safe_open(str(path), framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])
        return {key: file.get_tensor(key) for key in file.keys()}, sizes  # noqa: SIM118 (not a dict)


def load(device: str | torch.device = "cpu", weights: Path = WEIGHTS) -> tuple[VAR, VQVAE]:
    """The trained models, fp32, in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: `weights` lacks var.safetensors or vqvae.safetensors.
        ValueError: a file's weights do not fit the sizes it names.
    """
    vae_state, vae_sizes = read(weights / "vqvae.safetensors")
    var_state, var_sizes = read(weights / "var.safetensors")
    var, vae = build(vae_sizes, var_sizes)
    var.load_state_dict(var_state)
    vae.load_state_dict(vae_state)
    return var.eval().requires_grad_(False).to(device), vae.eval().requires_grad_(False).to(device)
