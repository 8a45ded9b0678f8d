"""A stand-in with the names and calling order of the public VAR class, small and with stock-style caching.

`patch` meets public code through these names alone; `pytest --repo VAR=DIR` runs the same tests on a real clone.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    def __init__(self, width, heads, attn_l2_norm):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = heads, width // heads, attn_l2_norm
        self.scale = 1 if attn_l2_norm else 0.25 / math.sqrt(self.head_dim)
        if attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.rand(1, heads, 1, 1) * 3)
            self.max_scale_mul = math.log(100)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.kv_caching(False)

    def kv_caching(self, enable):
        self.caching, self.past = enable, []

    def forward(self, x, attn_bias):
        b, n, _ = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        keys, values = k, v
        if self.caching:
            self.past.append((k, v))
            seen = [self.past[scale] for scale in self.sees(len(self.past) - 1)]
            keys, values = (torch.cat(x, dim=2) for x in zip(*seen, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, keys.to(v.dtype), values, attn_mask=attn_bias, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, -1)))

    def sees(self, step):
        """The earlier scales attended to: all of them, unless a test narrows it."""
        return range(step)


class Block(nn.Module):
    def __init__(self, width, heads, attn_l2_norm):
        super().__init__()
        self.attn = SelfAttention(width, heads, attn_l2_norm)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, attn_bias):
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]), attn_bias)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class VAR(nn.Module):
    def __init__(self, depth=3, heads=2, attn_l2_norm=True, patch_nums=(1, 2, 3, 5), head_dim=64):
        super().__init__()
        width = head_dim * heads
        self.patch_nums = patch_nums
        self.start = nn.Embedding(11, width)
        self.places = nn.Parameter(torch.randn(1, sum(p * p for p in patch_nums), width))
        self.blocks = nn.ModuleList(Block(width, heads, attn_l2_norm) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0):
        x = self.start(torch.cat((label_B, torch.full_like(label_B, 10))))[:, None]
        end, image = 0, 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for size in self.patch_nums:
            x = x[:, :1].expand(-1, size * size, -1) + self.places[:, end : end + size * size]
            end += size * size
            for block in self.blocks:
                x = block(x, attn_bias=None)
            logits = self.head(x)
            logits = ((1 + cfg) * logits[:B] - cfg * logits[B:]).transpose(1, 2).reshape(B, 3, size, size)
            image = image + F.interpolate(logits, size=(16, 16), mode="bicubic")
        for block in self.blocks:
            block.attn.kv_caching(False)
        return image / 4

    def forward(self, label_B, attn_bias):
        x = self.start(label_B)[:, None] + self.places
        for block in self.blocks:
            x = block(x, attn_bias=attn_bias)
        return self.head(x)
