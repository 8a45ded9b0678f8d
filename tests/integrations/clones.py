"""Small models of blocks out of clones of the public code, run in the order in which the public loops run them.

Everything around the blocks (embeddings, sampling, tokenizers) is left out: what a step gives begins the next one.
"""

from __future__ import annotations

from functools import partial

import torch
from checks import Case, around_of, narrow
from public_code import public
from torch import nn
from torch.nn import functional as F

from amskv_kernels.models.infinitystar import references
from amskv_kernels.policies import Visible
from amskv_kernels.policies.around import Around
from amskv_kernels.schedule import ScaleSchedule

WIDTH, HEADS, DEPTH = 128, 2, 3
SIDES = (1, 2, 3, 5)
SQUARES = ScaleSchedule([(side, side) for side in SIDES])
MAPS = ScaleSchedule([(1, 1), (2, 2), (4, 2), (6, 4), (8, 6)])
NORM = partial(nn.LayerNorm, eps=1e-6)


class Loop(nn.Module):
    """The maps of a generation, one after the other, through blocks; each kind says what it tells them."""

    def __init__(self, blocks, schedule, prefix=0):
        super().__init__()
        setattr(self, self.name, nn.ModuleList(blocks))
        self.schedule = schedule
        self.places = nn.Parameter(torch.randn(1, schedule.total + prefix, self.width))
        self.head = nn.Linear(self.width, 3)
        with torch.no_grad():  # initial weights are too small for attention to show
            for parameter_name, parameter in self.named_parameters():
                if parameter_name.endswith(("qkv.weight", "qkv_proj.weight", "proj.weight")):
                    parameter.mul_(4)
                if "scale_mul" in parameter_name:
                    parameter.normal_(2.0)
                if parameter_name.endswith(("q_bias", "v_bias")):
                    parameter.normal_()

    name, attention, width = "blocks", "attn", WIDTH

    def begin(self, enable):
        for block in getattr(self, self.name):
            getattr(block, self.attention).kv_caching(enable)

    def start(self, x, scale):
        at = self.schedule.offsets[scale]
        return x[:, :1] + self.places[:, at : at + self.schedule.tokens[scale]]

    def picture(self, x, scale):
        image = self.head(x).transpose(1, 2).unflatten(2, self.schedule.sizes[scale])
        return F.interpolate(image, size=(8, 8), mode="bilinear")

    @torch.no_grad()
    def draw(self):
        self.begin(True)
        x, total = torch.linspace(-1, 1, 2)[:, None, None].expand(-1, -1, self.width), 0
        for scale in range(len(self.schedule)):
            x = self.step(self.start(x, scale), scale)
            total = total + self.picture(x, scale)
        self.begin(False)
        return total


def case(name, folder) -> Case:
    kind, around = FAMILIES[name]

    def make():
        torch.manual_seed(11)
        return kind(folder).eval().requires_grad_(False)

    return Case(
        make, lambda model: model.draw(),
        lambda model: [getattr(block, model.attention) for block in getattr(model, model.name)],
        lambda model: list(getattr(model, model.name)), around, **CASES.get(name, {}),
    )  # fmt: skip


class VAR(Loop):
    def __init__(self, folder):
        code = public(folder, "models/basic_var.py", "var")
        super().__init__(
            [
                code.AdaLNSelfAttn(
                    block_idx=i, last_drop_p=0, embed_dim=WIDTH, cond_dim=WIDTH, shared_aln=False, norm_layer=NORM,
                    num_heads=HEADS, attn_l2_norm=True,
                )
                for i in range(DEPTH)
            ],
            SQUARES,
        )  # fmt: skip
        self.patch_nums, self.cond = SIDES, nn.Parameter(torch.randn(2, WIDTH))

    def step(self, x, scale):
        for block in self.blocks:
            x = block(x=x, cond_BD=self.cond, attn_bias=None)
        return x


class STAR(Loop):
    def __init__(self, folder):
        code = public(folder, "models/basic_var.py", "star")
        rope = public(folder, "models/embed_rope.py", "star_rope")
        super().__init__(
            [
                code.AttnBlock(
                    block_idx=i, last_drop_p=0, embed_dim=WIDTH, cond_dim=WIDTH, shared_aln=True, norm_layer=NORM,
                    num_heads=HEADS, in_dim_cross=WIDTH, attn_l2_norm=True, rotary_pos_emb=True,
                )
                for i in range(DEPTH)
            ],
            SQUARES,
        )  # fmt: skip
        self.patch_nums, self.cond = SIDES, nn.Parameter(torch.randn(1, 1, 6, WIDTH))
        tables = [rope.compute_axial_cis(WIDTH // HEADS, side, side, theta=100.0, normalize=8) for side in SIDES]
        self.freqs_cis, self.text = torch.cat(tables), torch.randn(2, 5, WIDTH)

    def step(self, x, scale):
        at = self.schedule.offsets[scale]
        freqs_cis = self.freqs_cis[at : at + x.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(
                x=x, encoder_hidden_states=self.text, encoder_attention_mask=torch.zeros(2, 1, 1, 5),
                cond_BD=self.cond.expand(-1, x.shape[1], -1, -1), attn_bias=None, freqs_cis=freqs_cis, layer_id=number,
            )  # fmt: skip
        return x


class Switti(Loop):
    ends = 3

    def __init__(self, folder):
        code = public(folder, "models/basic_switti.py", "switti")
        rope = public(folder, "models/rope.py", "switti_rope")
        super().__init__(
            [
                code.AdaLNSelfCrossAttn(
                    block_idx=i, last_drop_p=0, embed_dim=WIDTH, cond_dim=WIDTH, num_heads=HEADS, qk_norm=True,
                    context_dim=WIDTH, use_swiglu_ffn=True,
                )
                for i in range(DEPTH)
            ],
            SQUARES,
        )  # fmt: skip
        self.patch_nums, self.use_ar, self.cond = SIDES, True, nn.Parameter(torch.randn(2, WIDTH))
        tables = [
            rope.compute_axial_cis(WIDTH // HEADS, n, n, theta=100.0, norm_coeff=8 / max(n - 1, 1)) for n in SIDES
        ]
        self.freqs_cis, self.text = torch.cat(tables)[None], torch.randn(2, 5, WIDTH)

    def step(self, x, scale):
        at, batch = self.schedule.offsets[scale], 1 if scale >= self.ends else 2
        freqs_cis = self.freqs_cis[:, at : at + x.shape[1]]
        if scale >= self.ends:
            x, freqs_cis = x[:1], freqs_cis[:1]
            for block in self.blocks:
                if block.attn.caching and block.attn.cached_k is not None:
                    block.attn.cached_k, block.attn.cached_v = block.attn.cached_k[:1], block.attn.cached_v[:1]
        for block in self.blocks:
            x = block(
                x=x, cond_BD=self.cond[:batch], attn_bias=None, context=self.text[:batch], freqs_cis=freqs_cis,
                context_attn_bias=torch.ones(batch, 5, dtype=torch.bool),
            )  # fmt: skip
        return x

    def picture(self, x, scale):
        return super().picture(x, scale)[:1]


class HART(Loop):
    text, sides = 6, (1, 2, 3, 4, 5)

    def __init__(self, folder):
        code = public(folder, "hart/modules/networks/basic_hart.py", "hart")
        super().__init__(
            [
                code.AdaLNSelfAttn(
                    block_idx=i, last_drop_p=0, embed_dim=WIDTH, cond_dim=WIDTH, shared_aln=True, norm_layer=NORM,
                    num_heads=HEADS, attn_l2_norm=True, attn_type="llama", patch_nums=self.sides,
                    context_token=self.text, disable_aln=True,
                )
                for i in range(DEPTH)
            ],
            ScaleSchedule([(side, side) for side in self.sides]), self.text,
        )  # fmt: skip
        self.patch_nums, self.context_token = self.sides, self.text
        self.positions = torch.arange(self.text).repeat(2, 1) * torch.tensor([[1], [0]])
        self.cond, self.mask = nn.Parameter(torch.randn(2, self.text, WIDTH)), torch.ones(2, self.text)
        for block in self.blocks:
            block.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def start(self, x, scale):
        return x[:, :1] + self.places[:, -self.text :] if scale == 0 else super().start(x, scale)

    def step(self, x, scale):
        told = {"si": scale, "context_position_ids": self.positions, "context_mask": self.mask}
        if scale == len(self.sides) - 1:
            told["m_maskgit"] = torch.ones(2, self.sides[-1] ** 2, dtype=torch.bool).nonzero(as_tuple=True)
        for block in self.blocks:
            x = block(x=x, cond_BD=self.cond, attn_bias=None, **told)
        return x

    def picture(self, x, scale):
        return 0 if scale == 0 else super().picture(x, scale)


class Infinity(Loop):
    name, attention, schedule_of, path, kind = "unregistered_blocks", "sa", MAPS, "infinity/models/basic.py", ""

    def __init__(self, folder, prefix=0):
        code = self.code(folder)
        tables = public(folder, "infinity/models/basic.py", f"{type(self).__name__}_tables")
        block, width = getattr(code, f"{self.kind}CrossAttnBlock"), self.width
        super().__init__(
            [
                block(
                    embed_dim=width, kv_dim=width, cross_attn_layer_scale=-1, cond_dim=width, act=True, shared_aln=True,
                    norm_layer=NORM, num_heads=HEADS, cos_attn=True, fused_norm_func=_modulated,
                    rope2d_normalized_by_hw=2,
                )
                for _ in range(DEPTH)
            ],
            self.schedule_of, prefix,
        )  # fmt: skip
        self.sizes = [(1, h, w) for h, w in self.schedule.sizes]
        self.grid = tables.precompute_rope2d_freqs_grid(
            self.width // HEADS, {1.0: {"1M": {"scales": self.sizes}}}, rope2d_normalized_by_hw=2
        )
        self.text = torch.randn(8, self.width), torch.tensor([0, 5, 8], dtype=torch.int32), 5
        self.cond = nn.Parameter(torch.randn(2, 1, 6, self.width))

    def code(self, folder):
        return public(folder, self.path, type(self).__name__)

    def step(self, x, scale, **more):
        for number, block in enumerate(self.unregistered_blocks):
            told = {key: value(number) for key, value in more.items()}
            x = block(x, self.cond, self.text, None, None, self.sizes, self.grid, scale_ind=scale, **told)
        return x


def _modulated(C, eps, x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Layer32(Infinity):
    """Heads of 104, which have no kernels, as Infinity's layer32 has them."""

    width = 104 * HEADS


class FastVAR(Infinity):
    """Of the map of 32 × 32, layers 3 and on see the tokens farthest from the mean; what follows it is left out."""

    kind, path, depth = "FastVAR", "infinity/models/fastvar_basic.py", 3
    schedule_of = ScaleSchedule([(1, 1), (4, 4), (24, 24), (32, 32), (48, 48)])

    def code(self, folder):
        return public(folder, self.path, "fastvar")

    def step(self, x, scale):
        if scale == 4:
            return x
        size = self.sizes[scale]
        return super().step(x, scale, layer_idx=lambda number: 2 + number, x_shape=lambda number: size)

    def start(self, x, scale):
        return x if scale == 4 else super().start(x, scale)

    def picture(self, x, scale):
        return 0 if scale == 4 else super().picture(x, scale)


class VAREdit(Infinity):
    def __init__(self, folder):
        super().__init__(folder, prefix=48)

    @torch.no_grad()
    def draw(self):
        self.begin(True)
        source = torch.linspace(-1, 1, 2)[:, None, None] + self.places[:, -48:]
        x = super().step(source, len(self.schedule) - 1, start_layer=lambda number: number == 0, src=lambda _: True)
        total = 0
        for scale in range(len(self.schedule)):
            x = self.step(self.start(x, scale), scale)
            total = total + self.picture(x, scale)
        self.begin(False)
        return total

    def step(self, x, scale):
        return super().step(x, scale, start_layer=lambda number: number == 0, src=lambda _: False)


class InfinityStar(Loop):
    """Its attention is computed in bf16 whatever comes; the loop runs under autocast, as the public one does."""

    name, text = "unregistered_blocks", 7
    maps = ScaleSchedule([(t, h, w) for t in (1, 4, 4) for h, w in ((1, 1), (2, 3), (4, 6))])

    def __init__(self, folder):
        code = public(folder, "infinity/models/basic.py", "infinitystar")
        super().__init__(
            [
                code.SelfAttnBlock(embed_dim=512, cond_dim=512, num_heads=4, num_key_value_heads=2, arch="qwen")
                for _ in range(DEPTH)
            ],
            self.maps,
        )
        self.places = nn.Parameter(torch.randn(1, self.maps.total + self.text, 512))
        self.head, self.held = nn.Linear(512, 3), []
        self.info = {scale: {"ref_sids": seen} for scale, seen in enumerate(references(self.maps))}

    def turns(self, tokens, begin):
        angle = torch.outer(torch.arange(begin, begin + tokens), 50.0 ** (-torch.arange(64) / 64))
        return torch.stack([angle.cos(), angle.sin()])[:, None, None, None]

    def through(self, x, *told):
        for block in self.unregistered_blocks:
            x = block(x, None, None, None, None, *told)
        return x

    @torch.no_grad()
    def draw(self):
        sizes = [(t, h, w) for t, (h, w) in zip(self.maps.frames, self.maps.sizes, strict=True)]
        self.begin(True)
        self.held, pictures = [], []
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.linspace(-1, 1, 2)[:, None, None] + self.places[:, -self.text :]
            x = self.through(x, self.turns(self.text, 0), sizes, "t0", self.info, True)
            for scale, n in enumerate(self.maps.tokens):
                for last in (False, True):
                    at = self.maps.offsets[scale]
                    x = x[:, :1] + self.places[:, at : at + n]
                    x = self.through(x, self.turns(n, 20 * scale + last), sizes, scale, self.info, last, ["t0"])
                cached = self.unregistered_blocks[0].attn.cached_k.values()
                self.held.append(sum(each.shape[2] for each in cached if each is not None))
                pictures.append(self.head(x.mean(1)).float())
        self.begin(False)
        return torch.stack(pictures)


FAMILIES = {
    "VAR": (VAR, around_of(SQUARES)),
    "VAR-CLIP": (VAR, around_of(SQUARES)),
    "STAR": (STAR, around_of(SQUARES)),
    "HART (Llama)": (HART, around_of(ScaleSchedule([(p, p) for p in HART.sides[1:]]), prefix=1)),
    "Switti": (Switti, around_of(SQUARES)),
    "Infinity": (Infinity, around_of(MAPS)),
    "Infinity, heads of 104": (Layer32, around_of(MAPS)),
    "FastVAR": (FastVAR, around_of(FastVAR.schedule_of)),
    "VAREdit": (VAREdit, around_of(MAPS, prefix=1, beside=(0,))),
    "InfinityStar": (
        InfinityStar,
        Around(InfinityStar.maps, prefix=1, rule=Visible(tuple(map(tuple, references(InfinityStar.maps))))),
    ),
}
CASES = {
    "InfinityStar": {"hide": narrow, "close": 0.03},  # its attention rounds to bf16 in other places than ours
    # It picks tokens by rank: weights changed by one part in 10⁷ swap two of them, and move its own images by 1.6e-4.
    "FastVAR": {"close": 1e-3},
}
