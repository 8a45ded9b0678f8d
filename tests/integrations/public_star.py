"""A stand-in with the names, signatures and calling order of the public InfinityStar, small, caching as it does."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, KV_HEADS, HEAD_DIM, TEXT = 256, 4, 2, 64, 5
SIZES = [(t, h, w) for t in (1, 3, 3) for h, w in ((1, 1), (2, 3), (3, 4))]  # an image, and two clips
REPEATS = [2, 2, 1] * 3


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, (HEAD_DIM,), self.weight, 1e-6)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.num_key_value_heads = HEADS, HEAD_DIM, KV_HEADS
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = RMSNorm(), RMSNorm()
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, {}, {}

    def sees(self, scale):
        """Scales that a test lets it see; the model's own rule narrows them."""
        return range(scale)

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, rope2d_freqs_grid=[], scale_schedule=[], scale_ind=0,  # noqa: B006
        context_info=None, last_repetition_step=True, ref_text_scale_inds=[],  # noqa: B006
    ):  # fmt: skip
        q, k, v = (
            each(x).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self.turned(norm(each), rope2d_freqs_grid) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        if self.caching:
            if last_repetition_step:
                self.cached_k[scale_ind], self.cached_v[scale_ind] = k, v
            if isinstance(scale_ind, int):
                seen = [each for each in context_info[scale_ind]["ref_sids"] if each in self.sees(scale_ind)]
                seen += ref_text_scale_inds
                k = torch.cat([*(self.cached_k[each] for each in seen), k], dim=2)
                v = torch.cat([*(self.cached_v[each] for each in seen), v], dim=2)
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias_or_two_vector)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def turned(x, table):
        cos, sin = table[:, 0]
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = (
            SelfAttention(),
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)),
        )

    def forward(self, x, turns, scale_ind, context_info, last_repetition_step=True, ref_text_scale_inds=()):
        x = x + self.attn(
            F.rms_norm(x, x.shape[-1:]), None, None, turns, SIZES, scale_ind, context_info, last_repetition_step,
            list(ref_text_scale_inds),
        )  # fmt: skip
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class InfinityStar(nn.Module):
    depth, further = 3, None

    def __init__(self):
        super().__init__()
        self.unregistered_blocks = nn.ModuleList(Block() for _ in range(self.depth))
        self.text, self.head = nn.Parameter(torch.randn(2, TEXT, WIDTH)), nn.Linear(WIDTH, 3)
        self.places = nn.Parameter(torch.randn(len(SIZES), max(t * h * w for t, h, w in SIZES), WIDTH))

    def turns(self, tokens, begin):
        angle = torch.outer(torch.arange(begin, begin + tokens), 50.0 ** (-torch.arange(HEAD_DIM // 2) / 32))
        return torch.stack([angle.cos(), angle.sin()])[:, None, None, None]

    def through(self, x, *told, **more):
        for block in self.unregistered_blocks:
            x = block(x, *told, **more)
        return x

    @torch.no_grad()
    def draw(self):
        info = {scale: {"ref_sids": [] if scale < 3 else [scale // 3 * 3 - 1]} for scale in range(len(SIZES))}
        for block in self.unregistered_blocks:
            block.attn.kv_caching(True)
        x, frames, steps = self.through(self.text, self.turns(TEXT, 0), "t0", info), [], 0
        if self.further is not None:
            self.through(self.text, self.turns(TEXT, 0), self.further, info)
        for scale, (t, h, w) in enumerate(SIZES):
            for number in range(REPEATS[scale]):
                x = x[:, :1] + self.places[scale, : t * h * w]
                turns, steps = self.turns(t * h * w, TEXT + 40 * steps), steps + 1
                x = self.through(x, turns, scale, info, number == REPEATS[scale] - 1, ["t0"])
            if scale % 3 == 2:
                frames.append(self.head(x))
        for block in self.unregistered_blocks:
            block.attn.kv_caching(False)
        return torch.cat(frames, dim=1)
