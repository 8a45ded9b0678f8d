"""Which backend serves a call, and why. Nothing is ever registered anew: a choice is looked up, not installed."""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from amskv_kernels.arguments import instance_of, shown
from amskv_kernels.ops.backends import torch as torch_backend
from amskv_kernels.ops.backends.library import cpu, hopper, portable
from amskv_kernels.ops.backends.triton import backend as triton_backend

# Implementations, the one to prefer first; each module has one function per op it serves.
BACKENDS: dict[str, ModuleType] = {
    "hopper": hopper, "cuda": portable, "cpu": cpu, "triton": triton_backend, "torch": torch_backend,
}  # fmt: skip


class Settings(NamedTuple):
    """What this thread, or this task of an event loop, has asked for."""

    backend: str = "auto"
    debug: bool = False


_DEFAULT = Settings()
_settings: ContextVar[Settings] = ContextVar("amskv_kernels", default=_DEFAULT)
settings = _settings.get


class Choice(NamedTuple):
    """The backend that serves an op on a device, and why."""

    backend: str
    reason: str


class _Setting:
    """A setting just made in this context, and undone at the end of a `with` block if it opens one."""

    def __init__(self, **changed: object) -> None:
        self._before = {name: getattr(settings(), name) for name in changed}
        self._set(changed)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._set(self._before)

    def _set(self, changed: dict[str, object]) -> None:
        _settings.set(settings()._replace(**changed))  # type: ignore[arg-type]


def backend(name: str) -> _Setting:
    """Force one implementation, "auto" to choose by itself again; in a `with` block, for its length.

    It holds for the thread, or the task of an event loop, that asks: a context variable, as a new thread it begins
    with "auto". "hopper" and "cuda" have attn and append, "cpu" prepare_qk and compact too; the other ops stay with
    who would serve them anyway.

    Raises:
        ValueError: no backend of that name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ValueError(f"backend {shown(name)} is not known; known: auto, {', '.join(BACKENDS)}")
    return _Setting(backend=name)


def debug(on: bool = True) -> _Setting:
    """Check slot tables on the device at every call of this thread or task, so that a bad one raises, never faults.

    Waits for the device each time. On the CPU the tables of raw op calls are always checked.

    Raises:
        TypeError: `on` is neither True nor False.
    """
    instance_of("on", on, bool)
    return _Setting(debug=on)


def choose(
    op: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, pages: torch.dtype | None = None
) -> Choice:  # fmt: skip
    """Which backend serves `op` for tensors of `dtype` on a device ("cpu", "cuda", "cuda:1"), with the reason.

    `pages` is the pages' dtype, that of the tensors unless given.
    A forced backend that has no kernel of its own for an op leaves it to the others: the CUDA library has attn and
    append alone.

    Raises:
        RuntimeError: the forced backend has the op, but cannot serve it there.
        TypeError: the forced backend has the op, but not for that dtype, of tensors or of pages.
    """
    device, forced, pages = torch.device(device), settings().backend, pages or dtype
    name = _find(op, device, dtype, pages, forced)
    if name == forced:
        return Choice(name, "forced")
    earlier = list(BACKENDS)[: list(BACKENDS).index(name)]
    passed_over = [f"{each}: {_missing(BACKENDS[each], op, device, dtype, pages, False)}" for each in earlier]
    return Choice(name, f"instead of {'; '.join(passed_over)}" if passed_over else "preferred")


def backend_of(op: str, device: torch.device, dtype: torch.dtype, pages: torch.dtype) -> ModuleType:
    """The backend that serves this call; errors as of `choose`."""
    return BACKENDS[_found(op, device, dtype, pages, settings().backend)]


def _find(op: str, device: torch.device, dtype: torch.dtype, pages: torch.dtype, forced: str) -> str:
    """The name of the backend that serves this call."""
    if forced != "auto" and hasattr(BACKENDS[forced], op):
        module = BACKENDS[forced]
        missing = module.unavailable(device, True)
        if missing is not None:
            raise RuntimeError(f"backend {forced!r} cannot serve {op} on {device.type}: {forced}: {missing}")
        if dtype not in module.DTYPES:
            raise TypeError(f"q or k is {_plain(dtype)}; backend {forced!r} takes {_plain(*module.DTYPES)}")
        if pages not in module.PAGE_DTYPES:
            raise TypeError(f"pages is {_plain(pages)}; backend {forced!r} takes {_plain(*module.PAGE_DTYPES)}")
        return forced
    for name, module in BACKENDS.items():
        if _missing(module, op, device, dtype, pages, False) is None:
            return name
    raise RuntimeError(f"no backend serves {op} on {device}")  # the plain PyTorch backend serves everything


_found = cache(_find)  # what a machine can serve does not change while a process runs


def _missing(
    module: ModuleType, op: str, device: torch.device, dtype: torch.dtype, pages: torch.dtype, forced: bool
) -> str | None:  # fmt: skip
    """Why a backend does not serve an op, None if it does."""
    if not hasattr(module, op):
        return f"has no {op}"
    if dtype not in module.DTYPES:
        return f"takes {_plain(*module.DTYPES)}, not {_plain(dtype)}"
    if pages not in module.PAGE_DTYPES:
        return f"takes pages of {_plain(*module.PAGE_DTYPES)}, not {_plain(pages)}"
    found: str | None = module.unavailable(device, forced)
    return found


def _plain(*dtypes: torch.dtype) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
