"""Stand-ins with the names, signatures and calling order of VAR's relatives, small, caching as they do.

`patch` meets public code through these names alone; `pytest --repo NAME=DIR` runs the same checks on clones.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD_DIM = 128, 2, 64


def complex_table(sides):
    """(n, D / 2) unit complex numbers, all scales back to back."""
    tables = []
    for side in sides:
        rows = torch.arange(side * side) // side * (8 / side)
        columns = torch.arange(side * side) % side * (8 / side)
        frequency = 10.0 ** (-torch.arange(HEAD_DIM // 4) / (HEAD_DIM // 4))
        angle = torch.cat([torch.outer(columns, frequency), torch.outer(rows, frequency)], dim=1)
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return torch.cat(tables)


def turned(x, table):
    """x (B, H, n, D) by complex numbers that broadcast to (B, H, n, D / 2)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * table).flatten(3).to(x.dtype)


class Stock(nn.Module):
    """Concatenates, as all of them do."""

    caching, cached_k, cached_v = False, None, None

    def kv_caching(self, enable):
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def attended(self, q, k, v, mask, beside=()):
        """(B, n, C) from q, k, v (B, H, n, D); `beside`, keys and values that are not kept."""
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat((self.cached_k, k), dim=2), torch.cat((self.cached_v, v), dim=2)
            self.cached_k, self.cached_v = k, v
        if beside:
            k, v = torch.cat((beside[0], k), dim=2), torch.cat((beside[1], v), dim=2)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


class VARLike(Stock):
    """The weights of VAR's attention, and its projection and norm."""

    packed = "mat_qkv"

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm, self.scale = HEADS, HEAD_DIM, True, 1
        self.scale_mul_1H11, self.max_scale_mul = nn.Parameter(torch.rand(1, HEADS, 1, 1) * 3), math.log(100)
        setattr(self, self.packed, nn.Linear(WIDTH, 3 * WIDTH, bias=False))
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj, self.proj_drop = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def projected(self, x, turn=lambda x: x):
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x, getattr(self, self.packed).weight, bias).unflatten(2, (3, HEADS, HEAD_DIM))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = turn(q), turn(k)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        return q, F.normalize(k, dim=-1), v


class StarAttention(VARLike):
    is_cross, rotary_pos_emb = False, True

    def forward(self, x, attn_bias=None, encoder_hidden_states=None, freqs_cis=None, layer_id=0):
        q, k, v = self.projected(x, lambda x: turned(x, freqs_cis))
        return self.proj_drop(self.proj(self.attended(q, k, v, attn_bias)))


class GPT2Attention(VARLike):
    def forward(self, x, attn_bias, si=-1, context_position_ids=None, context_mask=None):
        return self.proj_drop(self.proj(self.attended(*self.projected(x), attn_bias)))


class Rotary(nn.Module):
    """Cosines and sines (B, n, D) of positions (B, n) or (B, n, 2), each half of a head's part twice."""

    def __init__(self, axes):
        super().__init__()
        self.register_buffer("frequency", 100.0 ** (-torch.arange(0, HEAD_DIM, 2 * axes) / HEAD_DIM))

    def forward(self, x, position_ids):
        places = position_ids if position_ids.dim() == 3 else position_ids[..., None]
        angle = places.float()[..., None] * self.frequency  # [B, n, axes, …]
        angle = torch.cat((angle, angle), dim=-1).flatten(2)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class LlamaAttention(VARLike):
    packed = "qkv_proj"

    def __init__(self, sides, context_token):
        super().__init__()
        self.sides, self.context_token = sides, context_token
        self.rotary_emb, self.context_rotary_emb = Rotary(2), Rotary(1)

    def forward(self, x, attn_bias, si=-1, context_position_ids=None, context_mask=None, m_maskgit=None):
        q, k, v = self.projected(x)
        if self.context_token and si == 0:
            cos, sin = self.context_rotary_emb(v, context_position_ids)
        else:
            side, last = self.sides[si], self.sides[-1]
            line = torch.arange(side) / side * last
            places = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).reshape(1, -1, 2)
            places = places.repeat(len(x), 1, 1)
            places = places if m_maskgit is None else places[m_maskgit].reshape(len(x), -1, 2)
            cos, sin = self.rotary_emb(v, places + context_position_ids[:, -1, None, None])
        q, k = (self.rotated(each, cos[:, None], sin[:, None]) for each in (q, k))
        return self.proj_drop(self.proj(self.attended(q, k, v, attn_bias)))

    @staticmethod
    def rotated(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class SwittiAttention(Stock):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.qk_norm, self.scale = HEADS, HEAD_DIM, True, HEAD_DIM**-0.5
        self.q_norm, self.k_norm = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.to_qkv, self.proj, self.proj_drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, x, attn_bias, freqs_cis=None):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (3 * self.q_norm(q), self.k_norm(k), v))
        if freqs_cis is not None:
            q, k = turned(q, freqs_cis), turned(k, freqs_cis)
        return self.proj_drop(self.proj(self.attended(q / 3, k, v, attn_bias)))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn, self.mlp = attention, nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, **told):
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]), attn_bias=None, **told)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Images(nn.Module):
    """Draws maps scale after scale; each kind says what it tells its blocks."""

    patch_nums = (1, 2, 3, 5)

    depth = 3

    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(self.depth))
        self.start = nn.Embedding(11, WIDTH)
        self.places = nn.Parameter(torch.randn(1, sum(side * side for side in self.patch_nums), WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def begin(self, enable):
        for block in self.blocks:
            block.attn.kv_caching(enable)

    def place(self, scale):
        end = sum(side * side for side in self.patch_nums[: scale + 1])
        return slice(end - self.patch_nums[scale] ** 2, end)

    def through(self, x, **told):
        for block in self.blocks:
            x = block(x, **told)
        return x

    def picture(self, x, scale):
        side = self.patch_nums[scale]
        return F.interpolate(self.head(x).transpose(1, 2).unflatten(2, (side, side)), size=(8, 8), mode="bicubic")


class Star(Images):
    def __init__(self):
        super().__init__(StarAttention)
        self.freqs_cis = complex_table(self.patch_nums)

    @torch.no_grad()
    def draw(self):
        x, total = self.start(torch.tensor([3, 7]))[:, None], 0
        self.begin(True)
        for scale in range(len(self.patch_nums)):
            at = self.place(scale)
            x = self.through(x[:, :1] + self.places[:, at], freqs_cis=self.freqs_cis[at], layer_id=scale)
            total = total + self.picture(x, scale)
        self.begin(False)
        return total


class Switti(Images):
    use_ar, ends = True, 3  # guidance ends at that scale

    def __init__(self):
        super().__init__(SwittiAttention)
        self.freqs_cis = complex_table(self.patch_nums)[None]

    @torch.no_grad()
    def draw(self):
        x, total = self.start(torch.tensor([3, 7, 10, 10]))[:, None], 0
        for block in self.blocks:
            block.attn.kv_caching(self.use_ar)
        for scale in range(len(self.patch_nums)):
            freqs_cis, at = self.freqs_cis[:, self.place(scale)], self.place(scale)
            if scale >= self.ends:
                x = x[:2]
                for block in self.blocks:
                    if block.attn.caching and block.attn.cached_k is not None:
                        block.attn.cached_k, block.attn.cached_v = block.attn.cached_k[:2], block.attn.cached_v[:2]
            x = self.through(x[:, :1] + self.places[:, at], freqs_cis=freqs_cis)
            total = total + self.picture(x, scale)[:2]
        self.begin(False)
        return total


class Hart(Images):
    patch_nums, context_token = (1, 2, 3, 4, 5), 7

    def __init__(self, kind="llama"):
        sides = self.patch_nums
        super().__init__(GPT2Attention if kind == "gpt2" else lambda: LlamaAttention(sides, self.context_token))
        self.kind = kind

    def autoregressive_infer_cfg(self, B, label_B, num_maskgit_iters=1):
        context = torch.arange(7).repeat(2 * B, 1)
        context[B:] = 0
        told = {"context_position_ids": context, "context_mask": None}
        label = self.start(torch.cat((label_B, torch.full_like(label_B, 10))))
        x, total = label[:, None] + self.places[:, :7], 0
        self.begin(True)
        for scale in range(len(self.patch_nums) - 1):
            x = self.through(x, si=scale, **told)
            if scale:
                total = total + self.picture(x, scale)
            x = x[:, -1:] + self.places[:, self.place(scale + 1)]
        last, n = len(self.patch_nums) - 1, self.patch_nums[-1] ** 2
        drawn, masked = torch.zeros_like(x), n
        for number in range(num_maskgit_iters):
            left = 0
            if number < num_maskgit_iters - 1:
                left = max(1, min(masked - 1, math.floor(n * math.cos(math.pi / 2 * (number + 1) / num_maskgit_iters))))
            chosen = torch.zeros(2 * B, n, dtype=torch.bool)
            chosen[:, n - masked : n - left] = True  # in order: a public model picks at random
            mask = chosen.nonzero(as_tuple=True)
            more = {} if self.kind == "gpt2" else {"m_maskgit": mask}
            drawn[mask] = self.through(x[mask].reshape(2 * B, -1, WIDTH), si=last, **told, **more).flatten(0, 1)
            masked = left
        self.begin(False)
        return total + self.picture(drawn, last)

    @torch.no_grad()
    def draw(self, **passes):
        return self.autoregressive_infer_cfg(2, torch.tensor([3, 7]), **passes)
