"""The avatar model's sizes, files and loader, and its class embedding while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig, checkpoint
from amskv_kernels.schedule import ScaleSchedule
from examples.avatars.attributes import ASKED, NUM_CLASSES, asked_of

WEIGHTS = Path(__file__).parent / "weights"
CALIBRATION = WEIGHTS / "calibration.json"  # the key similarity that AMS-KV ranks the layers by
SCHEDULE = ScaleSchedule.named("var-256")
VQVAE_SIZES: dict[str, Any] = {
    "ch": 96, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 16, "vocab_size": 256
}  # fmt: skip
VAR_SIZES: dict[str, Any] = {
    "depth": 12, "embed_dim": 128, "num_heads": 2, "vocab_size": 256, "z_channels": 16, "num_classes": NUM_CLASSES,
    "shared_adaln": True,
}  # fmt: skip
SAMPLING: dict[str, Any] = {"cfg": 3.0, "top_k": 64, "top_p": 0.8}  # arguments of VAR.generate that suit this model


class SummedEmbedding(nn.Module):
    """A class's embedding as the sum of its attributes': classes that were never seen have one, too.

    Takes VAR's labels (B,), NUM_CLASSES for no class -> (B, width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Embedding(len(values), width) for values in ASKED.values())
        self.nothing = nn.Parameter(torch.zeros(width))
        # Large enough to be told apart from the first step on; VAR's linear layers start small.
        for part in self.parts:
            nn.init.normal_(part.weight, std=0.3)

    def forward(self, labels: Tensor) -> Tensor:
        asked = asked_of(labels.clamp_max(NUM_CLASSES - 1))
        total = sum(part(column) for part, column in zip(self.parts, asked.T, strict=True))
        return torch.where((labels == NUM_CLASSES)[:, None], self.nothing, total)

    @torch.no_grad()
    def table(self) -> nn.Embedding:
        """The same as VAR's own table: a row for each class, then one for none."""
        labels = torch.arange(NUM_CLASSES + 1, device=self.nothing.device)
        return nn.Embedding.from_pretrained(self(labels).clone())


def build() -> tuple[VAR, VQVAE]:
    """The two models without their weights, on the CPU in fp32."""
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **{**VQVAE_SIZES, "ch_mult": tuple(VQVAE_SIZES["ch_mult"])}))
    return VAR(VARConfig(schedule=SCHEDULE, **VAR_SIZES)), vae


def load(device: str | torch.device = "cpu", weights: Path = WEIGHTS) -> tuple[VAR, VQVAE]:
    """The trained models, fp32, in evaluation mode, without gradients.

    Raises:
        ValueError: `weights` lacks var.safetensors or vqvae.safetensors, or one does not fit the sizes it names.
    """
    return checkpoint.load(weights / "var.safetensors", weights / "vqvae.safetensors", device=device)
