"""Which backend serves a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amskv_kernels.ops.backends import torch as torch_backend
from amskv_kernels.ops.backends.library import hopper, portable
from amskv_kernels.ops.backends.triton import backend as triton_backend
from amskv_kernels.ops.schemas import FAKES, SCHEMAS

# Implementations, the one to prefer first; each module has one function per op it serves.
BACKENDS: dict[str, ModuleType] = {
    "hopper": hopper, "cuda": portable, "triton": triton_backend, "torch": torch_backend,
}  # fmt: skip
_OF_LIBRARY = ("hopper", "cuda")
_DIRECT = ("attn", "append")  # what the CUDA library can take straight behind the dispatcher
_public: dict[str, Callable[..., Any]] = {}
_python_on_cuda: list[torch.library.Library] = []  # the registration of attn and append, while Python has them
settings: dict[str, object] = {"backend": "auto", "debug": False}


class Choice(NamedTuple):
    """The backend that serves an op on a device type, and why."""

    backend: str
    reason: str


class _Setting:
    """A setting just made, and undone at the end of a `with` block if it opens one."""

    def __init__(self, name: str, value: object) -> None:
        self._name, self._before = name, settings[name]
        settings[name] = value
        _route_cuda(False)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        settings[self._name] = self._before
        _route_cuda(False)


def backend(name: str) -> _Setting:
    """Force one implementation, "auto" to choose by itself again; in a `with` block, for its length.

    "hopper" and "cuda" have attn and append; the other ops stay with who would serve them anyway.

    Raises:
        ValueError: no backend of that name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"backend {name!r} is not known; known: auto, {', '.join(BACKENDS)}")
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
    forced = settings["backend"]
    if forced != "auto" and not hasattr(BACKENDS[str(forced)], op):
        forced = "auto"
    passed_over: list[str] = []
    for name, module in BACKENDS.items():
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


def backend_of(op: str, x: Tensor) -> ModuleType:
    """The backend that serves this call; where it is the CUDA library by itself, later calls go there directly."""
    name = choose(op, x.device.type).backend
    if name in _OF_LIBRARY and x.dtype == torch.float32 and settings["backend"] != "auto":
        raise TypeError(f"q or k is float32; backend {name!r} takes float16 and bfloat16")
    if name in _OF_LIBRARY and settings["backend"] == "auto":
        if x.dtype == torch.float32:  # the library's kernels take 16-bit elements
            others = [module for other, module in BACKENDS.items() if other not in _OF_LIBRARY]
            return next(module for module in others if _missing(module, op, "cuda", False) is None)
        if not settings["debug"]:
            _route_cuda(True, name == "hopper")
    return BACKENDS[name]


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
    for name in _DIRECT:
        library.impl(name, _public[name])
    _python_on_cuda.append(library)


def register(functions: tuple[Callable[..., Any], ...]) -> None:
    """Define `torch.ops.amskv.*` with the public functions as their implementations."""
    for function in functions:
        name = function.__name__
        _public[name] = function
        torch.library.define(f"amskv::{name}", SCHEMAS[name])
        torch.library.impl(f"amskv::{name}", "cpu" if name in _DIRECT else ("cpu", "cuda"), function)
        torch.library.register_fake(f"amskv::{name}", FAKES[name])
    for name in _DIRECT:  # while the CUDA library serves them, it hands what it has no kernel for (fp32) to these
        torch.library.define(f"amskv::{name}_python", SCHEMAS[name])
        torch.library.impl(f"amskv::{name}_python", "cuda", _public[name])
    _register_on_cuda()
