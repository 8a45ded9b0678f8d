"""The multi-scale VQ-VAE of VAR: images to token maps of every scale, and back.

Written for inference from the public description of VAR (arXiv 2404.02905); the parameter names are those of the
released checkpoint `vae_ch160v4096z32.pth`, which loads with ``strict=True``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.models.checked import CheckedModule
from amskv_kernels.schedule import ScaleSchedule

_GROUPS = 32  # channel groups of every GroupNorm; channel counts are multiples of it


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a multi-scale VQ-VAE; the defaults are the released one's.

    Images are (image_channels, H, W) with H, W the last scale's map times 2 ** (len(ch_mult) - 1).

    Raises:
        ValueError: a size is not positive, a channel count is not a multiple of 32, or phi_ratio is outside [0, 1].
    """

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 32
    vocab_size: int = 4096
    image_channels: int = 3
    num_phi: int = 4
    phi_ratio: float = 0.5
    schedule: ScaleSchedule = field(default_factory=lambda: ScaleSchedule.named("var-256"))

    def __post_init__(self) -> None:
        for name in ("ch", "num_res_blocks", "z_channels", "vocab_size", "image_channels", "num_phi"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.ch_mult or any(self.ch * mult % _GROUPS or mult < 1 for mult in self.ch_mult):
            raise ValueError(
                f"ch_mult is {self.ch_mult} with ch {self.ch}; every product must be a positive multiple of {_GROUPS}"
            )
        if not 0.0 <= self.phi_ratio <= 1.0:
            raise ValueError(f"phi_ratio is {self.phi_ratio}; it must be within [0, 1]")

    @property
    def patch(self) -> int:
        """Image pixels per latent position, along each side."""
        return 2 ** (len(self.ch_mult) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = _norm(outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """One attention head over all positions of a map, added to it: (B, C, H, W) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, c, h * w).transpose(2, 3).unsqueeze(2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H·W, C), scaled by C ** -0.5
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape(b, c, h, w))


class Halve(nn.Module):
    """Stride-2 convolution padded at the right and bottom only, as the checkpoint was trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then a change of resolution under the attribute name `resize` (or none)."""

    def __init__(self, inner: int, outer: int, blocks: int, attention: bool, resize: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inner if i == 0 else outer, outer) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(outer) for _ in range(blocks if attention else 0))
        self.resize = resize
        if resize is not None:
            self.add_module(resize, Halve(outer) if resize == "downsample" else Double(outer))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self.resize is None else self.get_submodule(self.resize)(x)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, image_channels, H, W) in [-1, 1] -> latents (B, z_channels, H / patch, W / patch)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(inner, outer, config.num_res_blocks, i == last, None if i == last else "downsample")
            for i, (inner, outer) in enumerate(zip([config.ch, *widths[:-1]], widths, strict=True))
        )
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> images (B, image_channels, h · patch, w · patch), about [-1, 1], not clamped."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(  # finest first, as the checkpoint numbers them; run from the back
            Level(inner, outer, config.num_res_blocks + 1, i == last, "upsample" if i else None)
            for i, (inner, outer) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Phi(nn.Conv2d):
    """Blends a map with its 3x3 convolution: (1 - ratio)·h + ratio·conv(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1.0 - self.ratio) + super().forward(h) * self.ratio


class PhiBank(nn.Module):
    """The few φ that all scales share."""

    def __init__(self, channels: int, ratio: float, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, ratio) for _ in range(count))


def phi_of_scales(num_scales: int, num_phi: int = 4) -> tuple[int, ...]:
    """Which φ each scale uses: the one whose tick is nearest to scale / (num_scales - 1).

    The released model's ticks put scales 2 and 7 of 10 exactly between two φ, so the outcome hangs on the last bit:
    the arithmetic is float64 `numpy.linspace` and the first minimum, as when the model was trained.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    places = [k / max(num_scales - 1, 1) for k in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - at))) for at in places)


class Quantizer(nn.Module):
    """Residual quantisation over scales: a latent is the sum of upsampled code maps, coarsest first."""

    ema_vocab_hit_SV: Tensor  # noqa: N815 (the checkpoint's name)

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.schedule = config.schedule
        self.z_channels = config.z_channels
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = PhiBank(config.z_channels, config.phi_ratio, config.num_phi)
        self.phi_of = phi_of_scales(len(config.schedule), config.num_phi)
        # usage statistics of the training run; nothing here reads them
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.schedule), config.vocab_size))

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the code nearest to each row of z (N, z_channels) in the Euclidean sense: (N,) int64."""
        codes = self.embedding.weight.detach().to(z.dtype)
        distance = z.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.addmm(distance, z, codes.T, alpha=-2).argmin(1)

    def spread(self, scale: int, tokens: Tensor) -> Tensor:
        """What scale `scale` (0-based) adds to the latent: tokens (B, h·w) -> (B, z_channels, H, W), differentiable."""
        return self.blended(self.phi_of[scale], self.grown(scale, tokens))

    def grown(self, scale: int, tokens: Tensor) -> Tensor:
        """The codes of a scale's tokens (B, h·w) at the last one's size, (B, z_channels, H, W)."""
        h, w = self.schedule.sizes[scale]
        codes = self.embedding(tokens).transpose(1, 2).reshape(-1, self.z_channels, h, w)
        return (
            codes if scale == len(self.schedule) - 1 else F.interpolate(codes, self.schedule.sizes[-1], mode="bicubic")
        )

    def blended(self, phi: int, maps: Tensor) -> Tensor:
        """What φ number `phi` makes of maps that have grown; `phi_of` says which one a scale uses."""
        return cast(Tensor, self.quant_resi.qresi_ls[phi](maps))

    def next_map(self, scale: int, fhat: Tensor) -> Tensor:
        """The latent as scale `scale` reads it: (B, z_channels, H, W) -> (B, h·w, z_channels) by area averaging."""
        return F.interpolate(fhat, size=self.schedule.sizes[scale], mode="area").flatten(2).transpose(1, 2)

    def walk(self, features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Quantise features (B, z_channels, H, W) fp32 scale by scale.

        Yields (tokens (B, h·w) int64, the latent summed up to that scale). The choice of tokens carries no gradient;
        the sums do, to the embedding and φ.
        """
        rest = features.detach().clone()
        fhat = torch.zeros_like(rest)
        for k, (h, w) in enumerate(self.schedule.sizes):
            small = F.interpolate(rest, size=(h, w), mode="area") if k < len(self.schedule) - 1 else rest
            tokens = self.nearest(small.permute(0, 2, 3, 1).reshape(-1, self.z_channels)).view(-1, h * w)
            added = self.spread(k, tokens)
            fhat = fhat + added
            rest = rest - added.detach()
            yield tokens, fhat


class VQVAE(CheckedModule):
    """Images in [0, 1] to tokens of every scale and back.

    Args:
        config: sizes; parameters start at PyTorch's defaults, load a state dict before use.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `CheckedModule.load_state_dict`; usage statistics of another number of scales are left out.

        One released VQ-VAE serves schedules of any length, and its statistics only describe how it was trained.
        """
        key = "quantize.ema_vocab_hit_SV"
        own = self.quantize.ema_vocab_hit_SV
        if key in state_dict and state_dict[key].shape[0] != own.shape[0]:
            state_dict = {**state_dict, key: own}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, image_channels, H, W) in [0, 1] -> latents (B, z_channels, h, w) fp32, not quantised.

        Raises:
            ValueError: images are not of the size this model's schedule asks for.
        """
        h, w = self.config.schedule.sizes[-1]
        want = (self.config.image_channels, h * self.config.patch, w * self.config.patch)
        if images.ndim != 4 or tuple(images.shape[1:]) != want:
            raise ValueError(f"images has shape {tuple(images.shape)}; it must be (B, {', '.join(map(str, want))})")
        return self.quant_conv(self.encoder(images * 2 - 1)).float()

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, image_channels, H, W) in [0, 1] -> tokens (B, schedule.total) int64, coarsest scale first."""
        return torch.cat([tokens for tokens, _ in self.quantize.walk(self.features(images))], dim=1)

    def _split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        total = self.config.schedule.total
        if tokens.ndim != 2 or tokens.shape[1] != total or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; it must be int64 of shape (B, {total})"
            )
        return tokens.split(list(self.config.schedule.tokens), dim=1)

    def _sums(self, tokens: Tensor) -> Iterator[Tensor]:
        h, w = self.config.schedule.sizes[-1]
        fhat = torch.zeros(tokens.shape[0], self.config.z_channels, h, w, dtype=torch.float32, device=tokens.device)
        for k, part in enumerate(self._split(tokens)):
            fhat = fhat + self.quantize.spread(k, part)
            yield fhat

    def latent(self, tokens: Tensor) -> Tensor:
        """Tokens (B, schedule.total) -> the latent f̂ (B, z_channels, H, W) fp32 that they sum to.

        Raises:
            ValueError: tokens is not int64 of that shape.
        """
        *_, fhat = self._sums(tokens)
        return fhat

    def inputs(self, tokens: Tensor) -> Tensor:
        """What a VAR reads when all tokens are known (teacher forcing).

        Args:
            tokens: (B, schedule.total) int64.

        Returns:
            (B, schedule.total - first scale, z_channels) fp32: before each later scale, f̂ so far at that scale's size.

        Raises:
            ValueError: tokens is not int64 of that shape.
        """
        sums = zip(range(1, len(self.config.schedule)), self._sums(tokens), strict=False)
        maps = [self.quantize.next_map(k, fhat) for k, fhat in sums]
        return torch.cat(maps, dim=1) if maps else tokens.new_zeros(len(tokens), 0, self.config.z_channels).float()

    def decode(self, fhat: Tensor) -> Tensor:
        """Latent f̂ (B, z_channels, H, W) -> images (B, image_channels, H·patch, W·patch) in [0, 1]."""
        return self.decoder(self.post_quant_conv(fhat)).clamp(-1, 1).add(1).mul(0.5)
