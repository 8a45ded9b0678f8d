"""`torch.ops.amskv.*`: the typed public functions.

The layout of `pages`, `arena` and slots stands in `amskv_kernels.planning.layout`, the contract with a worked call in
docs/op.md. Inference only: the Autograd keys raise, outputs never require grad.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.arguments import instance_of, real_number, whole_number
from amskv_kernels.ops import register  # noqa: F401 - registers torch.ops.amskv
from amskv_kernels.ops.checks import check_tensors
from amskv_kernels.ops.dispatch import backend, choose, debug
from amskv_kernels.ops.schemas import SCHEMAS

__all__ = [
    "SCHEMAS",
    "append",
    "attn",
    "attn_ragged",
    "backend",
    "choose",
    "compact",
    "debug",
    "prepare_qk",
    "window_scores",
]


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over paged history and the current scale, which is stored on the way: `torch.ops.amskv.attn`.

    Keys are every row that `read_slots` name, then the n rows of k; none is masked. Query head h uses KV head
    h // (H // Hkv). `write_slots` take the rows of k, v in order, page by page, and the rest of every written
    page becomes zero; empty stores nothing. Where their rows sum to n + r, the first page already holds r rows
    and keeps them: that page may be read by the same call, no other written page may.

    Args:
        q: (B, n, H, D) fp16, bf16 or fp32; any strides whose last is 1. D is 64, 96 or 128.
        k: (B, n, Hkv, D), as q.
        v: as k.
        pages: (num_pages, 2, page_size, D), q's dtype or int8, contiguous; page_size is 16, 32, 64 or 128. Of a page
            named in part, the other rows must be finite: they are fetched and weighed 0. Stores leave zeros there.
        arena: (B, Hkv) int32.
        read_slots: (B|1, Hkv|1, S) int32; size-1 dimensions broadcast, S may be 0.
        write_slots: as read_slots, with its own S.
        softmax_scale: finite and above 0. Logits are exact up to 1.8 · 10⁸ in magnitude, as far as fp32 holds the
            products q · k; beyond, up to 10³², only weights below 2⁻¹⁶ of a row's largest are lost. Where Triton
            splits a row's keys, each part's weight carries the rounding of its lse, 2⁻²⁴ of it.
        page_scales: (num_pages, 2, page_size) fp32, contiguous: what the bytes of each row of int8 pages are multiplied
            by. Written as pages are; see `amskv_kernels.ops.quantise` for how rows are rounded. The current rows are
            attended to as they are.

    Returns:
        out (B, n, H, D), contiguous, q's dtype, and lse (B, H, n) fp32, natural log.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride, head count or slot table.
        RuntimeError: autograd would record the call.
    """
    check_tensors(q=q, k=k, v=v, pages=pages, arena=arena, read_slots=read_slots, write_slots=write_slots)
    real_number("softmax_scale", softmax_scale)
    return torch.ops.amskv.attn.default(q, k, v, pages, arena, read_slots, write_slots, softmax_scale, page_scales)


def attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attn` for sequences of different lengths, packed one after the other: `torch.ops.amskv.attn_ragged`.

    One launch for N sequences that may each be at another step; to rounding what N calls of `attn` give, one sequence
    each, and bit for bit on the CPU. Pages of int8 are as there.

    Args:
        q: (T, H, D), the rows of all sequences; strides and dtypes as for `attn`.
        k: (T, Hkv, D), as q.
        v: as k.
        pages: as for `attn`.
        arena: (N, Hkv) int32.
        read_slots: (N|1, Hkv|1, S) int32, short tables padded with 0.
        write_slots: as read_slots, with its own S. A page that one sequence writes no other may read.
        row_starts: (N + 1,) int32 on q's device, ascending from 0 to T: sequence i has the rows row_starts[i] …
            row_starts[i + 1] − 1. Held against T on the CPU and in debug mode.
        softmax_scale: as for `attn`.
        page_scales: as for `attn`.

    Returns:
        out (T, H, D), contiguous, q's dtype, and lse (H, T) fp32, natural log.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride, head count, slot table or row start.
        RuntimeError: autograd would record the call.
    """
    check_tensors(
        q=q, k=k, v=v, pages=pages, arena=arena, read_slots=read_slots, write_slots=write_slots, row_starts=row_starts
    )
    real_number("softmax_scale", softmax_scale)
    return torch.ops.amskv.attn_ragged.default(
        q, k, v, pages, arena, read_slots, write_slots, row_starts, softmax_scale, page_scales
    )


def append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None = None
) -> None:  # fmt: skip
    """The store of `attn` alone, for a framework that attends by other means: `torch.ops.amskv.append`.

    Arguments and errors as for `attn`.
    """
    check_tensors(k=k, v=v, pages=pages, arena=arena, write_slots=write_slots)
    torch.ops.amskv.append.default(k, v, pages, arena, write_slots, page_scales)


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    l2norm: bool = False, eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a model does to q and k before attention, in one pass and in fp32: `torch.ops.amskv.prepare_qk`.

    L2 norm of each head (as `torch.nn.functional.normalize`), q times its head's scale, rotation of the pairs
    (2i, 2i + 1) by the token's angles; each only if asked for, rounded once at the end.

    Args:
        qkv: (B, n, H + 2 · Hkv, D): the heads of q, then of k, then of v; any strides whose last is 1. VAR's
            (B, n, 3, H, D) is this with Hkv = H after `flatten(2, 3)`.
        kv_heads: Hkv.
        q_scale: (H,) fp32.
        cos: (n, D / 2) fp32, see `amskv_kernels.models.rope.rope2d_tables`.
        sin: as cos.
        l2norm: whether q and k are normalised.
        eps: the least norm divided by.

    Returns:
        q (B, n, H, D) and k (B, n, Hkv, D), contiguous, qkv's dtype. v needs nothing: slice it.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong device, shape, stride or head count.
    """
    given = {"q_scale": q_scale, "cos": cos, "sin": sin}
    check_tensors(qkv=qkv, **{name: table for name, table in given.items() if table is not None})
    whole_number("kv_heads", kv_heads, 1)
    instance_of("l2norm", l2norm, bool)
    real_number("eps", eps)
    return torch.ops.amskv.prepare_qk.default(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor,
    softmax_scale: float, mode: str = "softmax", page_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """How much an observation window of queries attends to each key, for token policies.

    Keys stand in this order: page_size rows of every entry of `read_slots`, named or not, then the rows of k.

    Args:
        q_window: (B, W, H, D), k's dtype; usually 16 queries spread over the current scale.
        k: (B, n, Hkv, D), pages, arena, read_slots: as for `attn`.
        softmax_scale: finite and above 0.
        mode: "softmax" sums each query's probabilities over all keys, "sum_logits" its scaled logits.
        page_scales: as for `attn`.

    Returns:
        (B, Hkv, S · page_size + n) fp32: summed over the window and over the query heads of a KV head; −inf for
        rows that no entry names.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride, head count, mode or slot table.
    """
    check_tensors(q_window=q_window, k=k, pages=pages, arena=arena, read_slots=read_slots)
    real_number("softmax_scale", softmax_scale)
    instance_of("mode", mode, str)
    return torch.ops.amskv.window_scores.default(
        q_window, k, pages, arena, read_slots, softmax_scale, mode, page_scales
    )


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy chosen rows of [history, k and v] into fresh pages: `torch.ops.amskv.compact`.

    Args:
        pages: as for `attn`.
        arena: as for `attn`.
        src_slots: the history, as `window_scores` took it.
        k: (B, n, Hkv, D), the current rows.
        v: as k.
        keep: (B, Hkv, M) int32 or int64, ascending: the keys to keep, counted as `window_scores` orders them.
        dst_slots: (B|1, Hkv|1, S) int32; they name M rows, in pages that src_slots do not name. The rest of every
            page becomes zero.
        page_scales: as for `attn`. Rows that come from pages keep their bytes and scale; none is rounded twice.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride or table.
    """
    check_tensors(pages=pages, arena=arena, src_slots=src_slots, k=k, v=v, keep=keep, dst_slots=dst_slots)
    torch.ops.amskv.compact.default(pages, arena, src_slots, k, v, keep, dst_slots, page_scales)


for _function in (attn, attn_ragged, append, prepare_qk, window_scores, compact):
    getattr(torch.ops.amskv, _function.__name__).__doc__ = _function.__doc__
