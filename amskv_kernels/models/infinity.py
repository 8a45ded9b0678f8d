"""Infinity's transformer stack with its arithmetic and shapes, for tests and benchmarks on random weights.

Written from the public description of Infinity (arXiv 2412.04431) and its published sizes. Modules and parameters are
named as in the released checkpoints, so that `amskv_kernels.patch` takes this stack and the public class alike.
It caches as stock code does: everything, and text keys and values computed anew at every scale. Tokenizer, text encoder
and bitwise sampling are left out: what the last layer gives at one scale becomes, continuously, the next one's map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amskv_kernels.arguments import shown
from amskv_kernels.models.rope import rope2d_tables
from amskv_kernels.schedule import ScaleSchedule

Triples = list[tuple[int, int, int]]  # (1, h, w) per scale, as Infinity's code passes schedules
Text = tuple[Tensor, Tensor, int]  # all prompts' features back to back (N, C), cumulative lengths (B + 1), longest

# name: (layers, width, heads)
_SIZES = {"infinity-2b": (32, 2048, 16), "infinity-8b": (40, 3584, 28)}


@dataclass(frozen=True)
class InfinityConfig:
    """Sizes of a stack.

    Raises:
        ValueError: a size is not positive, heads do not divide width, or chunks do not divide layers.
    """

    layers: int
    width: int
    heads: int
    chunks: int = 8
    mlp_ratio: float = 4.0
    code_width: int = 32

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "chunks", "mlp_ratio", "code_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name, whole in (("heads", self.width), ("chunks", self.layers)):
            if whole % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; it must divide {whole}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @classmethod
    def named(cls, name: str) -> InfinityConfig:
        """A released model: "infinity-2b" or "infinity-8b".

        Raises:
            ValueError: no model of that name.
        """
        if name not in _SIZES:
            raise ValueError(f"model {shown(name)} is not a released one; known: {', '.join(_SIZES)}")
        return cls(*_SIZES[name])


def triples(schedule: ScaleSchedule) -> Triples:
    """A schedule as Infinity's code writes it."""
    return [(1, h, w) for h, w in schedule.sizes]


def rope_grid(schedule: ScaleSchedule, head_dim: int) -> dict[str, Tensor]:
    """Cosines and sines of all scales, (2, 1, 1, 1, schedule.total, D / 2), under the key Infinity's code looks up."""
    tables = [rope2d_tables(schedule, scale, head_dim) for scale in range(len(schedule))]
    cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
    return {str(tuple(triples(schedule))): torch.stack([cos, sin])[:, None, None, None]}


def text_attention(q: Tensor, kv: Tensor, cu_seqlens: Tensor, longest: int, softmax_scale: float) -> Tensor:
    """Attention of each sequence's queries to its own prompt.

    Args:
        q: (B, n, H, D).
        kv: (N, 2, H, D) keys and values of all prompts back to back.
        cu_seqlens: (B + 1) where each prompt begins.
        longest: tokens of the longest prompt.
        softmax_scale: factor on q·k.

    Returns:
        (B, n, H, D).
    """
    place = torch.arange(longest, device=q.device)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    own = kv[(begin + place).clamp_max(kv.shape[0] - 1).long()]  # [B, longest, 2, H, D]
    keys, values = own.permute(2, 0, 3, 1, 4)
    mask = (begin + place < end)[:, None, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=softmax_scale)
    return out.transpose(1, 2)


class SelfAttention(nn.Module):
    """L2-normalised q and k, a learned length per head, RoPE2D, and a cache that concatenates."""

    zero_k_bias: Tensor

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.num_heads, self.head_dim, self.cos_attn, self.scale = heads, config.head_dim, True, 1.0
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        """Begin or end a generation."""
        self.caching = enable
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Tensor | None,
        attn_fn: object = None,
        scale_schedule: Triples | None = None,
        rope2d_freqs_grid: dict[str, Tensor] | None = None,
        scale_ind: int = 0,
    ) -> Tensor:
        """(B, n, C) -> (B, n, C), over the cache while `kv_caching` is on."""
        b, n, _ = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        k = F.normalize(k, dim=-1)
        if rope2d_freqs_grid is not None and scale_schedule is not None:
            start = sum(t * h * w for t, h, w in scale_schedule[:scale_ind])
            grid = rope2d_freqs_grid[str(tuple(scale_schedule))].to(x.device)
            cos, sin = grid[:, 0, 0, 0, start : start + n]
            q, k = (_turn(each, cos, sin) for each in (q, k))
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        out = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, attn_mask=attn_bias_or_two_vector, scale=self.scale
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, -1)))


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values are projected anew at every call."""

    zero_k_bias: Tensor
    for_attn_pool = cos_attn = False

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_dim, self.scale = config.heads, config.head_dim, 1 / math.sqrt(config.head_dim)
        self.mat_q, self.mat_kv = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()

    def forward(self, q: Tensor, ca_kv: Text) -> Tensor:
        """q (B, n, C) -> (B, n, C)."""
        text, cu_seqlens, longest = ca_kv
        kv = F.linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)))
        kv = kv.view(-1, 2, self.num_heads, self.head_dim)
        queries = self.mat_q(q).unflatten(2, (self.num_heads, -1))
        out = text_attention(queries, kv.to(queries.dtype), cu_seqlens, longest, self.scale)
        return self.proj_drop(self.proj(out.flatten(2)))


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; modulated by the shared (B, 1, 6, C)."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.sa, self.ca = SelfAttention(config), CrossAttention(config)
        self.ffn = FeedForward(width, round(width * config.mlp_ratio / 256) * 256)
        self.ca_norm = nn.LayerNorm(width, eps=1e-6)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / width**0.5)

    def forward(
        self, x: Tensor, cond: Tensor, ca_kv: Text, schedule: Triples, grid: dict[str, Tensor], scale: int
    ) -> Tensor:  # fmt: skip
        """x (B, n, C) -> (B, n, C)."""
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + cond).unbind(2)
        x = x + self.sa(_norm(x) * (scale1 + 1) + shift1, None, None, schedule, grid, scale_ind=scale) * gate1
        x = x + self.ca(self.ca_norm(x), ca_kv)
        return x + self.ffn(_norm(x) * (scale2 + 1) + shift2) * gate2


class Chunk(nn.Module):
    """Blocks that the checkpoints name together."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class InfinityStack(nn.Module):
    """The blocks, and just enough around them to draw maps scale after scale.

    Args:
        config: sizes; weights are random.
    """

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        self.unregistered_blocks = [Block(config) for _ in range(config.layers)]
        each = config.layers // config.chunks
        self.block_chunks = nn.ModuleList(
            Chunk(self.unregistered_blocks[i : i + each]) for i in range(0, config.layers, each)
        )
        self.pos_start = nn.Parameter(torch.randn(1, 1, config.width) / config.width**0.5)
        self.lvl_embed = nn.Embedding(15, config.width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.word_embed = nn.Linear(config.code_width, config.width)
        self.head = nn.Linear(config.width, config.code_width)

    @property
    def kv_heads(self) -> int:
        """Heads of this process: all of them, unless the model is sharded."""
        return self.unregistered_blocks[0].sa.num_heads

    @torch.no_grad()
    def generate(
        self, text: Text, schedule: ScaleSchedule, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:  # fmt: skip
        """Draw one map per scale for each prompt; a sequence each, guidance left to the caller.

        Args:
            text: features (N, C) of all prompts back to back, cumulative lengths (B + 1) int32, the longest.
            schedule: any published one, square or not.
            progress: called with (scales done, scales in all) after each step.

        Returns:
            (B, code_width, h, w) of the last scale.
        """
        features, cu_seqlens, _ = text
        lengths = cu_seqlens.diff()
        index = torch.repeat_interleave(torch.arange(len(lengths), device=features.device), lengths)
        start = torch.zeros(len(lengths), features.shape[1], dtype=torch.float32, device=features.device)
        start = start.index_add(0, index, features.float()) / lengths[:, None]
        cond = self.shared_ada_lin(start).view(len(lengths), 1, 6, -1)
        grid, last = rope_grid(schedule, self.config.head_dim), schedule.sizes[-1]
        x, total = start[:, None] + self.pos_start, torch.zeros((), dtype=torch.float32, device=features.device)
        self.kv_caching(True)
        for scale, size in enumerate(schedule.sizes):
            x = x + self.lvl_embed.weight[scale]
            for block in self.unregistered_blocks:
                x = block(x, cond, text, triples(schedule), grid, scale)
            codes = torch.tanh(self.head(_norm(x))).transpose(1, 2).unflatten(2, size).float()
            total = total + F.interpolate(codes, size=last, mode="bilinear")
            if scale + 1 < len(schedule):
                coming = F.interpolate(total, size=schedule.sizes[scale + 1], mode="area")
                x = self.word_embed(coming.flatten(2).transpose(1, 2))
            if progress is not None:
                progress(scale + 1, len(schedule))
        self.kv_caching(False)
        return total

    def kv_caching(self, enable: bool) -> None:
        """Begin or end a generation in every layer."""
        for block in self.unregistered_blocks:
            block.sa.kv_caching(enable)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)
