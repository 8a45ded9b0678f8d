"""Argument checks of the ops: every mistake is named, with what it was and what it must be, before any launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from amskv_kernels.arguments import instance_of, one_of, shown, whole_number
from amskv_kernels.planning.layout import HEAD_DIMS, PAGE_SIZES

SCORE_MODES = ("softmax", "sum_logits")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of q, k and v
PAGE_DTYPES = (*DTYPES, torch.int8)
LEAST_SCALE = torch.finfo(torch.float32).tiny
MOST_SCALE = torch.finfo(torch.float32).max / 2  # half: kernels multiply it by log2(e)


class PlannedAttn(NamedTuple):
    """What is known of a call of `attn` before it is made: pool and tables, which its plan has validated, and sizes.

    Attributes:
        pages: the pool: B · Hkv arenas of equal size, B where heads share one, in the order of `arena`.
        arena: (B, Hkv) int32.
        read_slots: (1, 1|Hkv, S) int32.
        write_slots: as read_slots, with its own S.
        n: tokens of the call.
        dtype: of q, k and v.
        page_scales: (num_pages, 2, page_size) fp32 where pages are int8.
    """

    pages: Tensor
    arena: Tensor
    read_slots: Tensor
    write_slots: Tensor
    n: int
    dtype: torch.dtype
    page_scales: Tensor | None = None

    def takes(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> bool:
        """Whether these are arguments that `check_attn` and `check_apart` pass, in 3 µs."""
        pages, (batch, kv_heads) = self.pages, self.arena.shape
        head_dim, dtype, device = pages.shape[3], self.dtype, pages.device
        heads = q.shape[2] if q.dim() == 4 else 0
        written = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in (pages, self.page_scales) if x is not None]
        return (
            heads > 0
            and heads % kv_heads == 0
            and q.shape == (batch, self.n, heads, head_dim)
            and k.shape == v.shape == (batch, self.n, kv_heads, head_dim)
            and q.dtype is k.dtype is v.dtype is dtype
            and q.device == k.device == v.device == device
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
            and not any(start <= x.data_ptr() < end for start, end in written for x in (q, k, v))
            and LEAST_SCALE <= softmax_scale <= MOST_SCALE
        )


def check_attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float, page_scales: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `attn` cannot take."""
    _check_rows("q", q, "(B, n, H, D)")
    _check_current(k, v, pages, arena, page_scales)
    _check_queries("q", q, k, same_rows=True)
    _check_slots("read_slots", read_slots, k)
    _check_slots("write_slots", write_slots, k)
    _check_scale(softmax_scale)


def check_attn_ragged(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, write_slots: Tensor,
    row_starts: Tensor, softmax_scale: float, page_scales: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `attn_ragged` cannot take."""
    _check_rows("q", q, "(T, H, D)")
    _check_rows("k", k, "(T, Hkv, D)")
    _check_table("row_starts", row_starts, k)
    if row_starts.dim() != 1 or not len(row_starts):
        raise ValueError(f"row_starts has shape {_shape(row_starts)}; it must be (N + 1,) for N sequences")
    sequences = len(row_starts) - 1
    _check_current(k, v, pages, arena, page_scales, "(T, Hkv, D)", sequences)
    _check_queries("q", q, k, same_rows=True)
    _check_slots("read_slots", read_slots, k, sequences)
    _check_slots("write_slots", write_slots, k, sequences)
    _check_scale(softmax_scale)


def check_append(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor, page_scales: Tensor | None
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `append` cannot take."""
    _check_current(k, v, pages, arena, page_scales)
    _check_slots("write_slots", write_slots, k)


def check_pool(
    batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> None:  # fmt: skip
    """Check what a pool is to be made of, before anything is allocated.

    Raises:
        TypeError: a dtype that pages cannot have, or a device that is neither a torch.device nor a string.
        ValueError: a size out of range, or a device that torch does not know or does not see.
    """
    whole_number("batch", batch, 1)
    whole_number("kv_heads", kv_heads, 1)
    one_of("head_dim", head_dim, HEAD_DIMS)
    if not isinstance(dtype, torch.dtype) or dtype not in PAGE_DTYPES:
        raise TypeError(f"dtype is {shown(dtype)}; it must be one of {', '.join(str(d) for d in PAGE_DTYPES)}")
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device is {shown(device)}; it must be a torch.device or a string such as 'cuda:0'")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device is {shown(device)}; it must be one that torch knows, such as 'cpu' or 'cuda:0'"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {found}; it must be one of the {torch.cuda.device_count()} that torch sees")


def check_tensors(**named: object) -> None:
    """Raise TypeError that names what is no tensor."""
    for name, value in named.items():
        instance_of(name, value, Tensor)


def check_apart(pages: Tensor, page_scales: Tensor | None, write_slots: Tensor, **rows: Tensor) -> None:
    """Raise ValueError where rows lie in the pool that the same call writes: what is read may be written by then."""
    if write_slots.shape[-1] == 0:
        return
    for written, pool in (("pages", pages), ("page_scales", page_scales)):
        if pool is None:
            continue
        start = pool.data_ptr()
        end = start + pool.numel() * pool.element_size()
        for name, x in rows.items():
            first = x.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            if x.numel() and first < end and first + (last + 1) * x.element_size() > start:
                raise ValueError(
                    f"{name} shares memory with {written}, which this call writes; it must be a tensor of its own"
                )


def refuse_gradients(*tensors: Tensor) -> None:
    """Raise RuntimeError where autograd, backward or forward mode, would record a call: the ops have no backward."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if recorded or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise RuntimeError("the amskv ops have no backward; call the model under torch.no_grad()")


def check_prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `prepare_qk` cannot take."""
    _check_rows("qkv", qkv, "(B, n, H + 2·Hkv, D)")
    _, n, rows, head_dim = qkv.shape
    heads = rows - 2 * kv_heads
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"kv_heads is {kv_heads}; the {rows} heads of qkv must be H + 2·kv_heads with H a multiple of kv_heads"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together, or neither")
    tables = (("q_scale", q_scale, (heads,)), ("cos", cos, (n, head_dim // 2)), ("sin", sin, (n, head_dim // 2)))
    for name, table, shape in tables:
        if table is None:
            continue
        if table.dtype != torch.float32:
            raise TypeError(f"{name} is {table.dtype}; it must be torch.float32")
        if table.device != qkv.device:
            raise ValueError(f"{name} is on {table.device}; it must be on {qkv.device}, as qkv")
        if tuple(table.shape) != shape:
            raise ValueError(f"{name} has shape {_shape(table)}; it must be {shape}")
        if not table.is_contiguous():
            raise ValueError(f"{name} has strides {tuple(table.stride())}; it must be contiguous")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is {eps}; it must be finite and not below 0")


def check_window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor, softmax_scale: float, mode: str,
    page_scales: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `window_scores` cannot take."""
    _check_rows("q_window", q_window, "(B, W, H, D)")
    _check_current(k, k, pages, arena, page_scales)
    _check_queries("q_window", q_window, k, same_rows=False)
    if q_window.shape[1] < 1:
        raise ValueError("q_window has no queries; it must have at least 1")
    _check_slots("read_slots", read_slots, k)
    _check_scale(softmax_scale)
    if mode not in SCORE_MODES:
        raise ValueError(f"mode is {shown(mode)}; it must be one of {SCORE_MODES}")


def check_compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor,
    page_scales: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError (dtype) or ValueError (anything else) for arguments that `compact` cannot take."""
    _check_current(k, v, pages, arena, page_scales)
    _check_slots("src_slots", src_slots, k)
    _check_slots("dst_slots", dst_slots, k)
    instance_of("keep", keep, Tensor)
    if keep.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"keep is {keep.dtype}; it must be torch.int32 or torch.int64")
    if keep.device != k.device:
        raise ValueError(f"keep is on {keep.device}; it must be on {k.device}, as k")
    if keep.dim() != 3 or keep.shape[0] != k.shape[0] or keep.shape[1] != k.shape[2]:
        raise ValueError(
            f"keep has shape {_shape(keep)}; it must be (B, Hkv, M) with B, Hkv = {k.shape[0]}, {k.shape[2]}"
        )
    if not keep.is_contiguous():
        raise ValueError(f"keep has strides {tuple(keep.stride())}; it must be contiguous")


def _check_queries(name: str, q: Tensor, k: Tensor, same_rows: bool) -> None:
    if q.dtype != k.dtype:
        raise TypeError(f"{name} is {q.dtype}; it must be {k.dtype}, as k")
    if q.device != k.device:
        raise ValueError(f"{name} is on {q.device}; it must be on {k.device}, as k")
    dims = tuple(range(k.dim() - 2)) if same_rows else (0,)
    if any(q.shape[i] != k.shape[i] for i in (*dims, -1)):
        which = ("T and D" if k.dim() == 3 else "B, n and D") if same_rows else "B and D"
        raise ValueError(f"{name} has shape {_shape(q)}; its {which} must be those of k, which has shape {_shape(k)}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{name} has {q.shape[-2]} heads; they must be a multiple of the {k.shape[-2]} KV heads of k")


def _check_scale(softmax_scale: float) -> None:
    if not LEAST_SCALE <= softmax_scale <= MOST_SCALE:
        raise ValueError(f"softmax_scale is {softmax_scale}; it must be finite and above 0, in fp32 as well")


def _check_current(
    k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, page_scales: Tensor | None, layout: str = "(B, n, Hkv, D)",
    sequences: int | None = None,
) -> None:  # fmt: skip
    _check_rows("k", k, layout)
    _check_rows("v", v, layout)
    instance_of("pages", pages, Tensor)
    if v.shape != k.shape:
        raise ValueError(f"v has shape {_shape(v)}; it must have that of k, {_shape(k)}")
    if v.dtype != k.dtype:
        raise TypeError(f"v is {v.dtype}; it must be {k.dtype}, as k")
    if pages.dtype not in (k.dtype, torch.int8):
        raise TypeError(f"pages is {pages.dtype}; it must be {k.dtype}, as k, or torch.int8")
    for name, tensor in (("v", v), ("pages", pages)):
        if tensor.device != k.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {k.device}, as k")
    if pages.dim() != 4 or pages.shape[1] != 2 or pages.shape[3] != k.shape[-1]:
        raise ValueError(f"pages has shape {_shape(pages)}; it must be (num_pages, 2, page_size, D = {k.shape[-1]})")
    if pages.shape[2] not in PAGE_SIZES:
        raise ValueError(f"pages has a page_size of {pages.shape[2]}; it must be one of {PAGE_SIZES}")
    if not pages.is_contiguous():
        raise ValueError(f"pages has strides {tuple(pages.stride())}; it must be contiguous")
    _check_page_scales(page_scales, pages)
    _check_table("arena", arena, k)
    batch, heads = len(k) if sequences is None else sequences, k.shape[-2]
    if arena.dim() != 2 or arena.shape[0] != batch or arena.shape[1] != heads:
        which = "B" if sequences is None else "N"
        raise ValueError(f"arena has shape {_shape(arena)}; it must be ({which}, Hkv) = ({batch}, {heads})")


def _check_page_scales(page_scales: Tensor | None, pages: Tensor) -> None:
    if pages.dtype != torch.int8:
        if page_scales is not None:
            raise ValueError(f"page_scales is given for pages of {pages.dtype}; only pages of torch.int8 have scales")
        return
    if page_scales is None:
        raise ValueError("page_scales is None; pages of torch.int8 need the scale of every row")
    instance_of("page_scales", page_scales, Tensor)
    if page_scales.dtype != torch.float32:
        raise TypeError(f"page_scales is {page_scales.dtype}; it must be torch.float32")
    if page_scales.device != pages.device:
        raise ValueError(f"page_scales is on {page_scales.device}; it must be on {pages.device}, as pages")
    if page_scales.shape != pages.shape[:3]:
        raise ValueError(
            f"page_scales has shape {_shape(page_scales)}; it must be (num_pages, 2, page_size) = "
            f"({pages.shape[0]}, 2, {pages.shape[2]})"
        )
    if not page_scales.is_contiguous():
        raise ValueError(f"page_scales has strides {tuple(page_scales.stride())}; it must be contiguous")


def _check_rows(name: str, x: Tensor, layout: str) -> None:
    instance_of(name, x, Tensor)
    dims = layout.count(",") + 1
    if x.dim() != dims:
        raise ValueError(f"{name} has {x.dim()} dimensions; it must have {dims}, {layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}; it must be one of {', '.join(str(d) for d in DTYPES)}")
    if x.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"{name} has head_dim {x.shape[-1]}; it must be one of {HEAD_DIMS}")
    if x.shape[-2] < 1:
        raise ValueError(f"{name} has no heads; it must have at least 1")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; it must be 1")


def _check_slots(name: str, slots: Tensor, k: Tensor, sequences: int | None = None) -> None:
    _check_table(name, slots, k)
    which, batch, heads = "B" if sequences is None else "N", len(k) if sequences is None else sequences, k.shape[-2]
    if slots.dim() != 3 or slots.shape[0] not in (1, batch) or slots.shape[1] not in (1, heads):
        raise ValueError(
            f"{name} has shape {_shape(slots)}; it must be ({which}|1, Hkv|1, S) with {which} = {batch}, Hkv = {heads}"
        )


def _check_table(name: str, table: Tensor, k: Tensor) -> None:
    instance_of(name, table, Tensor)
    if table.dtype != torch.int32:
        raise TypeError(f"{name} is {table.dtype}; it must be torch.int32")
    if table.device != k.device:
        raise ValueError(f"{name} is on {table.device}; it must be on {k.device}, as k")
    if not table.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(table.stride())}; it must be contiguous")


def _shape(x: Tensor) -> str:
    return "(" + ", ".join(str(s) for s in x.shape) + ")"
