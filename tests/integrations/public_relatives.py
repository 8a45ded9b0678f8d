"""Stand-ins with the names, signatures and calling order of VAR's and Infinity's relatives, small, caching as they do.

`patch` meets public code through these names alone; `pytest --repo NAME=DIR` runs the same checks on clones.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from amskv_kernels.models import infinity as stack
from amskv_kernels.schedule import ScaleSchedule

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


class InfinityLike(Stock, stack.SelfAttention):
    """The weights of Infinity's attention."""

    def __init__(self):
        stack.SelfAttention.__init__(self, stack.InfinityConfig(3, WIDTH, HEADS, chunks=1))
        nn.init.normal_(self.scale_mul_1H11, 2.0)
        for bias in (self.q_bias, self.v_bias):
            nn.init.normal_(bias)

    def kv_caching(self, enable):
        Stock.kv_caching(self, enable)

    def projected(self, x, table):
        """`table`: (cos, sin) that broadcast to (B, H, n, D / 2)."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).unflatten(2, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(self.max_scale_mul).exp()
        return turned(q, torch.complex(*table)), turned(F.normalize(k, dim=-1), torch.complex(*table)), v


class FastVARAttention(InfinityLike):
    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0,
        rope_idx=None, ori_len=0,
    ):  # fmt: skip
        start = sum(h * w for _, h, w in scale_schedule[:scale_ind])
        table = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, 0, 0, start : start + ori_len, :][:, None, None]
        if rope_idx is not None and rope_idx.__name__ != "do_nothing":
            table = torch.stack([table[:, 0, 0, each[:, 0]] for each in rope_idx()], dim=1)[:, :, None]
        q, k, v = self.projected(x, table)
        return self.proj_drop(self.proj(self.attended(q, k, v, attn_bias_or_two_vector)))


class VAREditAttention(InfinityLike):
    def kv_caching(self, enable):
        super().kv_caching(enable)
        self.source = None

    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, start_layer=False,
        scale_ind=0, src=True,
    ):  # fmt: skip
        before = 0 if src else sum(h * w for _, h, w in (scale_schedule[-1], *scale_schedule[:scale_ind]))
        table = rope2d_freqs_grid[str(tuple(scale_schedule))][:, :, 0, 0, before : before + x.shape[1]]
        q, k, v = self.projected(x, table[:, :, None])
        if not (self.caching and start_layer):
            return self.proj_drop(self.proj(self.attended(q, k, v, attn_bias_or_two_vector)))
        if self.source is None:
            self.source = k, v
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
            return self.proj_drop(self.proj(out))
        small = [self.averaged(each, scale_schedule[-1], scale_schedule[scale_ind]) for each in self.source]
        return self.proj_drop(self.proj(self.attended(q, k, v, attn_bias_or_two_vector, small)))

    @staticmethod
    def averaged(x, size, to):
        image = x.transpose(2, 3).flatten(1, 2).unflatten(2, size[1:])
        return F.interpolate(image, size=to[1:], mode="area").flatten(2).unflatten(1, x.shape[1::2]).transpose(2, 3)


class TextBlock(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.sa, self.ca = attention(), stack.CrossAttention(stack.InfinityConfig(3, WIDTH, HEADS, chunks=1))

    def forward(self, x, text, sizes, grid, merge=lambda x: x, spread=lambda x, whole: x, **told):
        x = x + spread(self.sa(merge(F.layer_norm(x, x.shape[-1:])), None, None, sizes, grid, **told), x)
        return x + self.ca(F.layer_norm(x, x.shape[-1:]), text)


class Maps(nn.Module):
    schedule, depth = ScaleSchedule([(1, 1), (2, 2), (4, 2), (6, 4), (8, 6)]), 3

    def __init__(self, attention):
        super().__init__()
        self.unregistered_blocks = nn.ModuleList(TextBlock(attention) for _ in range(self.depth))
        tokens = self.schedule.total + 48
        self.places, self.head = nn.Parameter(torch.randn(1, tokens, WIDTH)), nn.Linear(WIDTH, 3)
        features = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
        self.text = features, torch.tensor([0, 5, 8], dtype=torch.int32), 5

    def begin(self, enable):
        for block in self.unregistered_blocks:
            block.sa.kv_caching(enable)

    def picture(self, x, size):
        return F.interpolate(self.head(x).transpose(1, 2).unflatten(2, size), size=(8, 6), mode="bilinear")


class FastVAR(Maps):
    """The last map is left out; of the one before, later layers see the tokens farthest from the mean."""

    def __init__(self):
        super().__init__(FastVARAttention)

    @torch.no_grad()
    def draw(self):
        sizes, grid = stack.triples(self.schedule), stack.rope_grid(self.schedule, HEAD_DIM)
        x, total = self.places[:, :1].repeat(2, 1, 1), 0
        x[1] *= -1
        self.begin(True)
        for scale, size in enumerate(self.schedule.sizes[:-1]):
            at, n = self.schedule.offsets[scale], self.schedule.tokens[scale]
            x = x[:, :1] + self.places[:, at : at + n]
            for number, block in enumerate(self.unregistered_blocks):
                told = {"scale_ind": scale, "ori_len": n, "rope_idx": do_nothing}
                if number and scale == 3:
                    told |= self.pruned(x, n * 6 // 10)
                x = block(x, self.text, sizes, grid, **told)
            total = total + self.picture(x, size)
        self.begin(False)
        return total

    @staticmethod
    def pruned(x, kept):
        far = (x - x.mean(1, keepdim=True)).square().sum(-1, keepdim=True)
        index = far.argsort(dim=1, descending=True)[:, :kept]
        wide = index.expand(-1, -1, WIDTH)

        def picked():
            return index

        return {
            "rope_idx": picked,
            "merge": lambda x: x.gather(1, wide),
            "spread": lambda part, whole: torch.zeros_like(whole).scatter(1, wide, part),
        }


def do_nothing(x, *args, **kwargs):
    return x


class VAREdit(Maps):
    def __init__(self):
        super().__init__(VAREditAttention)

    @torch.no_grad()
    def draw(self):
        sizes, last = stack.triples(self.schedule), self.schedule.sizes[-1]
        source = stack.rope_grid(ScaleSchedule([last]), HEAD_DIM)[str((sizes[-1],))]
        own = stack.rope_grid(self.schedule, HEAD_DIM)[str(tuple(sizes))]
        grid = {str(tuple(sizes)): torch.cat((source.flip(0), own), dim=4)}  # other turns than the last map's
        self.begin(True)
        end = self.schedule.total
        x = self.through(self.places[:, end : end + 48].repeat(2, 1, 1), sizes, grid, scale_ind=len(sizes) - 1)
        total = 0
        for scale, size in enumerate(self.schedule.sizes):
            at, n = self.schedule.offsets[scale], self.schedule.tokens[scale]
            x = self.through(x[:, :1] + self.places[:, at : at + n], sizes, grid, scale_ind=scale, src=False)
            total = total + self.picture(x, size)
        self.begin(False)
        return total

    def through(self, x, sizes, grid, **told):
        for number, block in enumerate(self.unregistered_blocks):
            x = block(x, self.text, sizes, grid, start_layer=number == 0, **told)
        return x
