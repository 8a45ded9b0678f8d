"""VAR, the class-conditional next-scale transformer, for inference over an injected attention.

Written from the public description of VAR (arXiv 2404.02905); the parameter names are those of the released
checkpoints `var_d16.pth` … `var_d36.pth`, which load with ``strict=True``. The transformer never sees a cache: each
layer hands its q, k, v to an `Attention`, which keeps what it wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.arguments import shown
from amskv_kernels.models.attention import Attention
from amskv_kernels.models.checked import CheckedModule
from amskv_kernels.models.modulation import Conditions, Modulation
from amskv_kernels.models.vqvae import VQVAE
from amskv_kernels.schedule import ScaleSchedule

_DEPTHS = (16, 20, 24, 30, 36)
_MAX_LOG_Q = math.log(100)  # the learned query length of an L2-normalised head is capped at 100


@dataclass(frozen=True)
class VARConfig:
    """Sizes of a VAR.

    Raises:
        ValueError: a size is not positive or num_heads does not divide embed_dim.
    """

    schedule: ScaleSchedule
    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float = 4.0
    vocab_size: int = 4096
    z_channels: int = 32
    num_classes: int = 1000
    shared_adaln: bool = False
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "mlp_ratio", "vocab_size", "z_channels", "num_classes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide embed_dim, which is {self.embed_dim}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @classmethod
    def named(cls, name: str) -> VARConfig:
        """A released model: "var-d16", "var-d20", "var-d24", "var-d30" (256 x 256) or "var-d36" (512 x 512).

        Raises:
            ValueError: no model of that name.
        """
        known = {f"var-d{depth}": depth for depth in _DEPTHS}
        if name not in known:
            raise ValueError(f"model {shown(name)} is not a released one; known: {', '.join(known)}")
        depth = known[name]
        schedule = ScaleSchedule.named("var-512" if depth == 36 else "var-256")
        return cls(schedule, depth, 64 * depth, depth, shared_adaln=depth == 36)


class Generation(NamedTuple):
    """What `VAR.generate` returns."""

    images: Tensor  # (B, 3, H, W) fp32 in [0, 1]
    tokens: Tensor  # (B, schedule.total) int64, coarsest scale first


class SelfAttention(nn.Module):
    """The projections around one layer's attention: (B, n, C) -> (B, n, C)."""

    zero_k_bias: Tensor

    def __init__(self, config: VARConfig, layer: int) -> None:
        super().__init__()
        width, heads = config.embed_dim, config.num_heads
        self.layer, self.num_heads, self.head_dim = layer, heads, config.head_dim
        self.l2_norm = config.attn_l2_norm
        self.softmax_scale = 1.0 if self.l2_norm else 0.25 / math.sqrt(config.head_dim)
        if self.l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def qkv_bias(self) -> Tensor:
        """(3 · C,) bias of the qkv projection; K has none."""
        return torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))

    def q_length(self) -> Tensor:
        """(1, 1, H, 1) fp32: the learned length of each head's L2-normalised queries."""
        return self.scale_mul_1H11.clamp_max(_MAX_LOG_Q).exp().transpose(1, 2).float()

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        b, n, _ = x.shape
        qkv = F.linear(x, self.mat_qkv.weight, self.qkv_bias())
        attend_qkv = getattr(attention, "attend_qkv", None)
        if attend_qkv is not None:
            length = self.q_length().flatten() if self.l2_norm else None
            out = attend_qkv(self.layer, qkv.view(b, n, -1, self.head_dim), length, self.softmax_scale)
            return self.proj(out.reshape(b, n, -1))
        q, k, v = qkv.view(b, n, 3, self.num_heads, self.head_dim).unbind(2)
        if self.l2_norm:
            q = F.normalize(q.float(), dim=-1) * self.q_length()
            k = F.normalize(k.float(), dim=-1)
            if not getattr(attention, "keeps_fp32_keys", False):
                q, k = q.to(v.dtype), k.to(v.dtype)
        prepare = getattr(attention, "prepare", None)
        if prepare is not None:
            prepare(self.layer, x, self.mat_qkv.weight[: len(self.q_bias)])
        out = attention.attend(self.layer, q, k, v, self.softmax_scale)
        return self.proj(out.reshape(b, n, -1))


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """One transformer layer; its norms and gates depend on the class."""

    def __init__(self, config: VARConfig, layer: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.attn = SelfAttention(config, layer)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio))
        self.shared = config.shared_adaln
        if self.shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, cond: Tensor) -> Modulation:
        """For cond (B, C), or the shared modulation (B, 1, 6, C) of a model that has one."""
        found = self.ada_gss + cond if self.shared else self.ada_lin(cond).view(len(cond), 1, 6, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = found.unbind(2)
        return Modulation((gate1, gate2), (scale1 + 1, scale2 + 1), (shift1, shift2))

    def forward(self, x: Tensor, modulation: Modulation, attention: Attention) -> Tensor:
        x = modulation.add(x, self.attn(modulation.norm(x, 0), attention), 0)
        return modulation.add(x, self.ffn(modulation.norm(x, 1)), 1)


class HeadNorm(nn.Module):
    """The class-dependent norm before the logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, cond: Tensor) -> Modulation:
        """For cond (B, C), in fp32."""
        scale, shift = self.ada_lin(cond).view(len(cond), 1, 2, -1).unbind(2)
        return Modulation((), ((scale + 1).float(),), (shift.float(),))

    def forward(self, x: Tensor, modulation: Modulation) -> Tensor:
        return modulation.norm(x.float(), 0)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside the top k, then outside the top-p nucleus of what is left, set to -inf.

    Args:
        logits: (..., V) floating point; not modified.
        top_k: keep the k largest (more where they tie); 0 keeps all.
        top_p: keep the most likely tokens up to the one at which their probability passes top_p, always at least one;
            0 keeps all.

    Returns:
        (..., V), the same dtype.
    """
    if top_k > 0:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[..., -1] = False
        logits = logits.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), -torch.inf)
    return logits


class VAR(CheckedModule):
    """The transformer.

    Args:
        config: sizes; parameters start at PyTorch's defaults (embeddings of positions at 0), load a state dict before
            use. Large models build fast under ``torch.device("meta")`` and load with ``assign=True``.
    """

    lvl_1L: Tensor  # noqa: N815 (the checkpoints' name)
    attn_bias_for_masking: Tensor

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        schedule, width = config.schedule, config.embed_dim
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # the last one stands for "no class"
        self.pos_start = nn.Parameter(torch.zeros(1, schedule.tokens[0], width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, schedule.total, width))
        self.lvl_embed = nn.Embedding(len(schedule), width)
        self.shared_ada_lin: nn.Module = (
            nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) if config.shared_adaln else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.vocab_size)
        scale_of = torch.cat([torch.full((n,), k) for k, n in enumerate(schedule.tokens)])
        self.register_buffer("lvl_1L", scale_of[None])
        blocked = scale_of[:, None] < scale_of[None, :]
        mask = torch.zeros(blocked.shape, dtype=torch.float32).masked_fill(blocked, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask[None, None])  # of checkpoints; who attends masks by itself

    @property
    def kv_heads(self) -> int:
        """Heads of this process: all of them, unless the model is sharded."""
        return cast(Block, self.blocks[0]).attn.num_heads

    def places(self) -> Tensor:
        """What every position adds to its input: scale and position embedding, (1, schedule.total, C)."""
        return self.lvl_embed(self.lvl_1L) + self.pos_1LC

    def start(self, cond: Tensor) -> Tensor:
        """The first scale's input before `places`: cond (B, C) -> (B, first scale, C)."""
        return cond[:, None] + self.pos_start

    def embed(self, maps: Tensor) -> Tensor:
        """Latent maps (B, n, z_channels) -> (B, n, C), before `places`."""
        return self.word_embed(maps.to(self.word_embed.weight.dtype))

    def conditions(self, cond: Tensor) -> Conditions:
        """What class embeddings cond (B, C) do, as (B, 1, C); the same at every step."""
        head = self.head_nm.modulation(cond)
        if self.config.shared_adaln:
            cond = self.shared_ada_lin(cond).view(len(cond), 1, 6, -1)
        return Conditions([cast(Block, block).modulation(cond) for block in self.blocks], head)

    def transform(self, x: Tensor, conditions: Conditions, attention: Attention) -> Tensor:
        """All layers and the head: inputs x (B, n, C) -> logits (B, n, vocab_size) fp32.

        Rows of sequences at different steps may be packed as those of one, (1, T, C), with conditions for such.
        """
        for block, modulation in zip(self.blocks, conditions.layers, strict=True):
            x = block(x, modulation, attention)
        return self.head(self.head_nm(x, conditions.head).to(self.head.weight.dtype)).float()

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.dtype not in (torch.int32, torch.int64) or not len(labels):
            raise ValueError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)}; it must be int64 or int32, (B,), B > 0"
            )
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # reading values would break the capture; the warm-up before it has checked them
        if labels.is_meta or torch.compiler.is_compiling():
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.config.num_classes:
            raise ValueError(
                f"labels has values {low} … {high}; they must be within 0 … {self.config.num_classes}, "
                f"where {self.config.num_classes} means no class"
            )

    def logits(self, labels: Tensor, inputs: Tensor, attention: Attention) -> Tensor:
        """Logits of all scales in one pass, all inputs known (teacher forcing); differentiable.

        Args:
            labels: (B,) int64 or int32, 0 … num_classes, the last meaning no class.
            inputs: (B, t - first scale, z_channels) as `VQVAE.inputs` makes them; t is the schedule's total or the
                end of an earlier scale.
            attention: must let every token see its own and earlier scales only; gets all t tokens at once.

        Returns:
            (B, t, vocab_size) fp32.

        Raises:
            ValueError: bad labels, or inputs of a shape that fits no whole number of scales.
        """
        self._check_labels(labels)
        schedule = self.config.schedule
        end = inputs.shape[1] + schedule.tokens[0] if inputs.ndim == 3 else -1
        ends = [offset + n for offset, n in zip(schedule.offsets, schedule.tokens, strict=True)]
        if end not in ends or inputs.shape[0] != len(labels) or inputs.shape[2] != self.config.z_channels:
            raise ValueError(
                f"inputs has shape {tuple(inputs.shape)}; it must be ({len(labels)}, t - {schedule.tokens[0]}, "
                f"{self.config.z_channels}) with t one of {ends}"
            )
        cond = self.class_emb(labels)
        x = torch.cat((self.start(cond), self.embed(inputs)), dim=1) + self.places()[:, :end]
        return self.transform(x, self.conditions(cond), attention)

    def _check_sampling(self, vae: VQVAE, labels: Tensor, cfg: float, top_k: int, top_p: float) -> None:
        self._check_labels(labels)
        config = self.config
        for name, own, other in (
            ("schedule", config.schedule, vae.config.schedule),
            ("vocab_size", config.vocab_size, vae.config.vocab_size),
            ("z_channels", config.z_channels, vae.config.z_channels),
        ):
            if own != other:
                raise ValueError(f"vae has {name} {other}; it must be {own} as in this VAR")
        if not math.isfinite(cfg):
            raise ValueError(f"cfg is {cfg}; it must be finite")
        if not 0 <= top_k <= config.vocab_size:
            raise ValueError(f"top_k is {top_k}; it must be within 0 … {config.vocab_size}, 0 for no limit")
        if not 0.0 <= top_p <= 1.0:
            raise ValueError(f"top_p is {top_p}; it must be within [0, 1], 0 for no limit")

    @torch.no_grad()
    def generate(
        self,
        vae: VQVAE,
        labels: Tensor,
        attention: Attention,
        *,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        generator: torch.Generator | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Draw images, one scale per step; no host synchronisation after the arguments have been checked.

        Classifier-free guidance runs 2·B sequences through `attention`: the B with their labels, then the same B
        without. Its weight at scale s of K is cfg·s / (K - 1).

        Args:
            vae: a VQ-VAE of the same schedule, vocabulary and latent width, on the same device.
            labels: (B,) int64 or int32, 0 … num_classes, the last meaning no class.
            attention: a fresh cache for 2·B sequences; it sees every layer once per step.
            cfg: guidance strength, 0 for none.
            top_k, top_p: sampling limits, see `filter_logits`; the defaults are those of the published FID figures.
            generator: source of randomness, on the model's device.
            progress: called with (scales done, scales in all) after each step.

        Returns:
            Generation(images (B, 3, H, W) fp32 in [0, 1], tokens (B, schedule.total) int64).

        Raises:
            ValueError: bad labels, cfg, top_k or top_p, or a vae that does not belong to this model.
        """
        self._check_sampling(vae, labels, cfg, top_k, top_p)
        schedule = self.config.schedule
        batch, last = len(labels), len(schedule) - 1
        labels = labels.to(self.lvl_1L.device)
        cond = self.class_emb(torch.cat((labels, torch.full_like(labels, self.config.num_classes))))
        conditions, places = self.conditions(cond), self.places()
        x = self.start(cond)
        fhat = torch.zeros(batch, self.config.z_channels, *schedule.sizes[-1], dtype=torch.float32, device=cond.device)
        drawn = []
        for k, (offset, n) in enumerate(zip(schedule.offsets, schedule.tokens, strict=True)):
            logits = self.transform(x + places[:, offset : offset + n], conditions, attention)
            t = cfg * (k / last) if last else 0.0
            logits = filter_logits((1 + t) * logits[:batch] - t * logits[batch:], top_k, top_p)
            tokens = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, replacement=True, generator=generator)
            drawn.append(tokens.view(batch, n))
            fhat = fhat + vae.quantize.spread(k, drawn[-1])
            if k < last:
                x = self.embed(vae.quantize.next_map(k + 1, fhat)).repeat(2, 1, 1)
            if progress is not None:
                progress(k + 1, last + 1)
        return Generation(vae.decode(fhat).float(), torch.cat(drawn, dim=1))
