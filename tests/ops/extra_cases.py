"""Calls that a GPU kernel may get wrong, and random calls of prepare_qk, window_scores and compact."""

from __future__ import annotations

from dataclasses import replace

import torch
from attn_cases import Case, make
from torch import Tensor

from amskv_kernels.planning.layout import ROWS_MASK

HALF, BF16 = torch.float16, torch.bfloat16
# Odd counts around every boundary: a warp, a page, a tile, two tiles; partial and empty entries anywhere.
SMALL = [
    Case(n=1, dtype=HALF),
    Case(n=1, history=(1,), stored=(1,), heads=5, kv_heads=5, dtype=HALF),
    Case(n=4, history=(16, 3), stored=(4,), heads=3, kv_heads=3, dtype=BF16),
    Case(n=9, history=(5,), stored=(9,), page_size=128, dtype=HALF),
    Case(n=16, history=(0, 14), stored=(7, 0, 9), dtype=HALF),
    Case(n=3, history=(30, 32), stored=(3,), page_size=32, heads=8, kv_heads=2, dtype=HALF),
    Case(n=2, history=(64,), stored=(2,), page_size=64, heads=8, kv_heads=1, head_dim=96, dtype=BF16),
    Case(n=13, history=(16, 2), stored=(13,), per_head=True, per_batch=True, heads=6, kv_heads=6, dtype=HALF),
    Case(n=4, stored=(5,), held=1, dtype=HALF),
    Case(n=5, stored=(16, 1), held=12, per_head=True, head_dim=128, dtype=HALF),
    Case(n=3, history=(2,), stored=(3,)),
]
LARGE = [
    Case(n=17, dtype=HALF),
    Case(n=25, history=(16, 14), stored=(16, 9), dtype=BF16),
    Case(n=1, history=(16,) * 9 + (4,), stored=(1,), dtype=HALF),
    Case(n=33, history=(128, 128, 3), stored=(33,), page_size=128, heads=1, kv_heads=1, dtype=HALF),
    Case(n=65, history=(64, 5, 64, 0, 31), stored=(64, 1), page_size=64, heads=1, kv_heads=1, dtype=HALF),
    Case(n=100, history=(16, 3, 16, 16), stored=(16,) * 6 + (4,), heads=1, kv_heads=1, batch=1, dtype=HALF),
    Case(n=130, history=(32,) * 5 + (7,), page_size=32, heads=2, kv_heads=1, head_dim=128, batch=1, dtype=HALF),
    Case(n=40, history=(16,) * 6, stored=(16, 16, 8), heads=4, kv_heads=2, per_head=True, per_batch=True, dtype=HALF),
    Case(n=24, history=(64, 12), stored=(20, 4), page_size=64, head_dim=96, heads=1, kv_heads=1, dtype=BF16),
    Case(n=70, stored=(64, 64), held=58, page_size=64, heads=1, kv_heads=1, dtype=HALF),
    Case(n=20, history=(16, 5), stored=(16, 4), head_dim=128),
]

QK_PARTS = {
    "nothing": (),
    "norm": ("l2norm",),
    "norm and scale": ("l2norm", "q_scale"),
    "rope": ("cos", "sin"),
    "all": ("l2norm", "q_scale", "cos", "sin"),
}
QK_SHAPES = [(1, 1, 2, 2, 64), (2, 5, 6, 2, 96), (3, 4, 4, 1, 128)]  # B, n, H, Hkv, D

SCORE_CASES = [
    Case(n=1),
    Case(n=20, history=(16, 5, 16), heads=4, kv_heads=2),
    Case(n=7, history=(16, 0, 3), per_batch=True, per_head=True, dtype=torch.float16),
    Case(n=70, history=(64, 3), page_size=64, head_dim=96, dtype=torch.float16),
    Case(n=65, history=(128, 0, 9), page_size=128, head_dim=128, batch=1, dtype=torch.bfloat16),
    Case(n=3, history=(32,) * 5, page_size=32, heads=8, kv_heads=1, batch=1),
]
COMPACT_CASES = [
    (Case(n=5), (4,)),
    (Case(n=20, history=(16, 5, 16), stored=(16, 4)), (16, 9)),
    (Case(n=7, history=(16, 0, 3), per_batch=True, per_head=True, dtype=torch.float16, stored=(7,)), (3, 0, 6)),
    (Case(n=70, history=(64, 30), page_size=64, head_dim=96, dtype=torch.bfloat16, stored=(64, 6)), (50, 64, 7)),
    (Case(n=9, history=(128, 40), page_size=128, head_dim=128, stored=(9,)), (100,)),
]


def make_qk(shape: tuple[int, ...], parts: tuple[str, ...], dtype: torch.dtype, seed: int = 0) -> dict:
    """Arguments of prepare_qk by name; the projection is a slice of a wider one."""
    batch, n, heads, kv_heads, head_dim = shape
    rng = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, n, heads + 2 * kv_heads + 1, head_dim, generator=rng).to(dtype)
    angle = torch.randn(n, head_dim // 2, generator=rng) * 3
    every = {
        "l2norm": True, "q_scale": torch.rand(heads, generator=rng) + 0.5, "cos": angle.cos(), "sin": angle.sin(),
    }  # fmt: skip
    return {"qkv": wide[:, :, 1:], "kv_heads": kv_heads} | {name: every[name] for name in parts}


def make_scores(case: Case, window: int = 5, seed: int = 0) -> tuple:
    """Arguments of window_scores but the mode."""
    _, k, _, pages, arena, read_slots, _, scale = make(case, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(case.batch, window, case.heads, case.head_dim, generator=rng).to(case.dtype)
    return q, k, pages, arena, read_slots, scale


def make_compact(case: Case, kept: tuple[int, ...], seed: int = 0) -> tuple:
    """Arguments of compact: the pages that `stored` would take, filled with `kept` rows chosen at random."""
    _, k, v, pages, arena, src_slots, dst_slots, _ = make(replace(case, stored=kept), seed)
    rng = torch.Generator().manual_seed(seed + 1)
    keep = torch.empty(*arena.shape, sum(kept), dtype=torch.int64)
    for b in range(arena.shape[0]):
        for h in range(arena.shape[1]):
            keys = present(case, src_slots[b % src_slots.shape[0], h % src_slots.shape[1]])
            chosen = torch.randperm(len(keys), generator=rng)[: sum(kept)].sort().values
            keep[b, h] = keys[chosen]
    return pages, arena, src_slots, k, v, keep, dst_slots


def present(case: Case, slots: Tensor) -> Tensor:
    """Indices of a head's keys in the order of window_scores."""
    rows = [i * case.page_size + torch.arange(int(slot) & ROWS_MASK) for i, slot in enumerate(slots)]
    return torch.cat([*rows, len(slots) * case.page_size + torch.arange(case.n)]).long()
