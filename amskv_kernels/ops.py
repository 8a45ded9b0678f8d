"""`torch.ops.amskv.*`: schemas, fake kernels, and which implementation serves a call.

The layout of `pages`, `arena` and slots stands in `amskv_kernels.layout`. Inference only: no autograd formula
is registered, outputs never require grad. Every implementation gets arguments that `checks` has passed.
"""

from __future__ import annotations

from types import ModuleType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from amskv_kernels import hopper, native, torch_ops
from amskv_kernels.checks import (
    check_append,
    check_attn,
    check_compact,
    check_keep,
    check_prepare_qk,
    check_tables,
    check_window_scores,
    refuse_gradients,
)
from amskv_kernels.triton_ops import backend as triton_backend

SCHEMAS = {
    "attn": "(Tensor q, Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor read_slots, Tensor write_slots, "
    "float softmax_scale) -> (Tensor, Tensor)",
    "append": "(Tensor k, Tensor v, Tensor(a!) pages, Tensor arena, Tensor write_slots) -> ()",
    "prepare_qk": "(Tensor qkv, int kv_heads, Tensor? q_scale=None, Tensor? cos=None, Tensor? sin=None, "
    "bool l2norm=False, float eps=1e-12) -> (Tensor, Tensor)",
    "window_scores": "(Tensor q_window, Tensor k, Tensor pages, Tensor arena, Tensor read_slots, "
    'float softmax_scale, str mode="softmax") -> Tensor',
    "compact": "(Tensor(a!) pages, Tensor arena, Tensor src_slots, Tensor k, Tensor v, Tensor keep, "
    "Tensor dst_slots) -> ()",
}

# Implementations, the one to prefer first; each module has one function per op it serves.
_BACKENDS: dict[str, ModuleType] = {
    "hopper": hopper, "cuda": native, "triton": triton_backend, "torch": torch_ops,
}  # fmt: skip
_OF_LIBRARY = ("hopper", "cuda")
_python_on_cuda: list[torch.library.Library] = []  # the registration of attn and append, while Python has them
_settings: dict[str, object] = {"backend": "auto", "debug": False}


class Choice(NamedTuple):
    """The backend that serves an op on a device type, and why."""

    backend: str
    reason: str


class _Setting:
    """A setting just made, and undone at the end of a `with` block if it opens one."""

    def __init__(self, name: str, value: object) -> None:
        self._name, self._before = name, _settings[name]
        _settings[name] = value
        _route_cuda(False)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        _settings[self._name] = self._before
        _route_cuda(False)


def backend(name: str) -> _Setting:
    """Force one implementation, "auto" to choose by itself again; in a `with` block, for its length.

    "hopper" and "cuda" have attn and append; the other ops stay with who would serve them anyway.

    Raises:
        ValueError: no backend of that name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in _BACKENDS):
        raise ValueError(f"backend {name!r} is not known; known: auto, {', '.join(_BACKENDS)}")
    return _Setting("backend", name)


def debug(on: bool = True) -> _Setting:
    """Check slot tables on the device at every raw op call, so that a bad one raises instead of faulting.

    Waits for the device each time. On the CPU the tables are always checked.
    """
    return _Setting("debug", bool(on))


def choose(op: str, device_type: str) -> Choice:
    """Which backend serves `op` for tensors on `device_type` ("cpu", "cuda").

    A forced backend that has no kernel of its own for an op leaves it to the others: the CUDA library has attn and
    append alone.

    Raises:
        RuntimeError: the forced backend has the op, but cannot serve it there.
    """
    forced = _settings["backend"]
    if forced != "auto" and not hasattr(_BACKENDS[str(forced)], op):
        forced = "auto"
    passed_over: list[str] = []
    for name, module in _BACKENDS.items():
        if forced not in ("auto", name):
            continue
        missing = _missing(module, op, device_type, forced == name)
        if missing is None:
            if forced == name:
                return Choice(name, "forced")
            return Choice(name, f"instead of {'; '.join(passed_over)}" if passed_over else "preferred")
        passed_over.append(f"{name}: {missing}")
    raise RuntimeError(f"backend {forced!r} cannot serve {op} on {device_type}: {'; '.join(passed_over)}")


def _missing(module: ModuleType, op: str, device_type: str, forced: bool) -> str | None:
    """Why a backend does not serve an op, None if it does."""
    if not hasattr(module, op):
        return f"has no {op}"
    unavailable = getattr(module, "unavailable", None)
    return None if unavailable is None else unavailable(device_type, forced)


def _backend(op: str, x: Tensor) -> ModuleType:
    """The backend that serves this call; where it is the CUDA library by itself, later calls go there directly."""
    name = choose(op, x.device.type).backend
    if name in _OF_LIBRARY and x.dtype == torch.float32 and _settings["backend"] != "auto":
        raise TypeError(f"q or k is float32; backend {name!r} takes float16 and bfloat16")
    if name in _OF_LIBRARY and _settings["backend"] == "auto":
        if x.dtype == torch.float32:  # the library's kernels take 16-bit elements
            others = [module for other, module in _BACKENDS.items() if other not in _OF_LIBRARY]
            return next(module for module in others if _missing(module, op, "cuda", False) is None)
        if not _settings["debug"]:
            _route_cuda(True, name == "hopper")
    return _BACKENDS[name]


def _route_cuda(direct: bool, to_hopper: bool = False) -> None:
    """Put attn and append on CUDA tensors straight behind the dispatcher, or give them back to Python.

    Python's own registration goes first and comes back after: two at a time would make torch warn.
    """
    if direct == (not _python_on_cuda):
        return
    if direct:
        for library in _python_on_cuda:
            library._destroy()
        _python_on_cuda.clear()
        torch.ops.amskv.serve_cuda(True, to_hopper)
        return
    torch.ops.amskv.serve_cuda(False)
    _register_on_cuda()


def _register_on_cuda() -> None:
    library = torch.library.Library("amskv", "IMPL", "CUDA")
    library.impl("attn", attn)
    library.impl("append", append)
    _python_on_cuda.append(library)


def attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
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
        pages: (num_pages, 2, page_size, D), q's dtype, contiguous; page_size is 16, 32, 64 or 128. Of a page named in
            part, the other rows must be finite: they are fetched and weighed 0. Stores leave zeros there.
        arena: (B, Hkv) int32.
        read_slots: (B|1, Hkv|1, S) int32; size-1 dimensions broadcast, S may be 0.
        write_slots: as read_slots, with its own S.
        softmax_scale: finite and above 0.

    Returns:
        out (B, n, H, D), contiguous, q's dtype, and lse (B, H, n) fp32, natural log.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride, head count or slot table.
        RuntimeError: autograd would record the call.
    """
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale)
    refuse_gradients(q, k, v, pages)
    if _settings["debug"]:
        check_tables(pages, arena, read_slots, write_slots, k.shape[1])
    module = _backend("attn", q)
    return module.attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale)


def append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    """The store of `attn` alone, for a framework that attends by other means: `torch.ops.amskv.append`.

    Arguments and errors as for `attn`.
    """
    check_append(k, v, pages, arena, write_slots)
    refuse_gradients(k, v, pages)
    if _settings["debug"]:
        check_tables(pages, arena, write_slots[..., :0].contiguous(), write_slots, k.shape[1])
    module = _backend("append", k)
    module.append(k, v, pages, arena, write_slots)


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
        cos: (n, D / 2) fp32, see `amskv_kernels.rope.rope2d_tables`.
        sin: as cos.
        l2norm: whether q and k are normalised.
        eps: the least norm divided by.

    Returns:
        q (B, n, H, D) and k (B, n, Hkv, D), contiguous, qkv's dtype. v needs nothing: slice it.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride or head count.
    """
    check_prepare_qk(qkv, kv_heads, q_scale, cos, sin, eps)
    refuse_gradients(*(x for x in (qkv, q_scale, cos, sin) if x is not None))
    module = _BACKENDS[choose("prepare_qk", qkv.device.type).backend]
    return module.prepare_qk(qkv, kv_heads, q_scale, cos, sin, l2norm, eps)


def window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor,
    softmax_scale: float, mode: str = "softmax",
) -> Tensor:  # fmt: skip
    """How much an observation window of queries attends to each key, for token policies.

    Keys stand in this order: page_size rows of every entry of `read_slots`, named or not, then the rows of k.

    Args:
        q_window: (B, W, H, D), k's dtype; usually 16 queries spread over the current scale.
        k: (B, n, Hkv, D), pages, arena, read_slots: as for `attn`.
        softmax_scale: finite and above 0.
        mode: "softmax" sums each query's probabilities over all keys, "sum_logits" its scaled logits.

    Returns:
        (B, Hkv, S · page_size + n) fp32: summed over the window and over the query heads of a KV head; −inf for
        rows that no entry names.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride, head count, mode or slot table.
    """
    check_window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode)
    refuse_gradients(q_window, k, pages)
    if _settings["debug"]:
        check_tables(pages, arena, read_slots, read_slots[..., :0].contiguous(), k.shape[1])
    module = _BACKENDS[choose("window_scores", k.device.type).backend]
    return module.window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode)


def compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor
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

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong device, shape, stride or table.
    """
    check_compact(pages, arena, src_slots, k, v, keep, dst_slots)
    refuse_gradients(k, v, pages)
    if _settings["debug"]:
        check_keep(pages, arena, src_slots, keep, dst_slots, k.shape[1])
    module = _BACKENDS[choose("compact", k.device.type).backend]
    module.compact(pages, arena, src_slots, k, v, keep, dst_slots)


def _fake_attn(
    q: Tensor, k: Tensor, v: Tensor, pages: Tensor, arena: Tensor,
    read_slots: Tensor, write_slots: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_attn(q, k, v, pages, arena, read_slots, write_slots, softmax_scale)
    batch, n, heads, head_dim = q.shape
    return q.new_empty(batch, n, heads, head_dim), q.new_empty(batch, heads, n, dtype=torch.float32)


def _fake_append(k: Tensor, v: Tensor, pages: Tensor, arena: Tensor, write_slots: Tensor) -> None:
    check_append(k, v, pages, arena, write_slots)


def _fake_prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    l2norm: bool = False, eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_prepare_qk(qkv, kv_heads, q_scale, cos, sin, eps)
    batch, n, rows, head_dim = qkv.shape
    return qkv.new_empty(batch, n, rows - 2 * kv_heads, head_dim), qkv.new_empty(batch, n, kv_heads, head_dim)


def _fake_window_scores(
    q_window: Tensor, k: Tensor, pages: Tensor, arena: Tensor, read_slots: Tensor,
    softmax_scale: float, mode: str = "softmax",
) -> Tensor:  # fmt: skip
    check_window_scores(q_window, k, pages, arena, read_slots, softmax_scale, mode)
    keys = read_slots.shape[2] * pages.shape[2] + k.shape[1]
    return k.new_empty(k.shape[0], k.shape[2], keys, dtype=torch.float32)


def _fake_compact(
    pages: Tensor, arena: Tensor, src_slots: Tensor, k: Tensor, v: Tensor, keep: Tensor, dst_slots: Tensor
) -> None:  # fmt: skip
    check_compact(pages, arena, src_slots, k, v, keep, dst_slots)


for _real, _fake in (
    (attn, _fake_attn),
    (append, _fake_append),
    (prepare_qk, _fake_prepare_qk),
    (window_scores, _fake_window_scores),
    (compact, _fake_compact),
):
    _name = _real.__name__
    torch.library.define(f"amskv::{_name}", SCHEMAS[_name])
    torch.library.impl(f"amskv::{_name}", "cpu" if _name in ("attn", "append") else ("cpu", "cuda"), _real)
    torch.library.register_fake(f"amskv::{_name}", _fake)

# While the CUDA library serves attn and append, it hands what it has no kernel for (fp32) to these.
for _name in ("attn", "append"):
    torch.library.define(f"amskv::{_name}_python", SCHEMAS[_name])
    torch.library.impl(f"amskv::{_name}_python", "cuda", globals()[_name])
_register_on_cuda()
