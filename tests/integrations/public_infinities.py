"""Stand-ins with the names, signatures and calling order of Infinity's relatives: see `public_relatives`."""

from __future__ import annotations

import torch
from public_relatives import HEAD_DIM, HEADS, WIDTH, Stock, turned
from torch import nn
from torch.nn import functional as F

from amskv_kernels.models import infinity as stack
from amskv_kernels.schedule import ScaleSchedule


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
