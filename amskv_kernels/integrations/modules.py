"""How a patch gets hold of a module: a subclass takes the place of its class, so every method finds its own `self`.

A copy is therefore never run with the original's weights. What `copy.deepcopy`, pickle and `torch.save` make of a
patched module is plainly unpatched; a shallow copy (a replica of `torch.nn.DataParallel`) refuses to generate.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

# Where wrappers keep the module that they wrap: torch.compile, FSDP, activation checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Binding:
    """What a patch knows of one module that it has taken over.

    Args:
        module: whose class gives way to a subclass of `kind` and of its own.
        kind: what replaces the methods that it names in `replaced`.
        patch: what it is a part of, and is undone with.
    """

    def __init__(self, module: nn.Module, kind: type[PatchedModule], patch: Any) -> None:
        self.patch = patch
        self.module, self._original, self._replaced = module, type(module), kind.replaced
        if getattr(module, "_amskv", None) is not None:
            raise ValueError("model is patched already; undo() that patch first, or call unpatch(model)")
        self._class = _subclass(kind, type(module))  # type: ignore[arg-type]  # mypy: a class of modules has no hash
        # A wrapper of one method (accelerate's hooks) that keeps the method it wraps on the module calls ours instead;
        # any other has the stock method out of reach, and is put aside until the patch is undone.
        redirected = _redirect(vars(module), module, dict.fromkeys(self._replaced, (self._original, self._class)))
        self._aside = {
            name: vars(module).pop(name)
            for name in self._replaced
            if name in vars(module) and name not in redirected
        }  # fmt: skip
        vars(module)["_amskv"] = self
        module.__class__ = self._class

    def undo(self) -> None:
        """Give the module its class and its wrappers back."""
        self.restore(vars(self.module))
        if type(self.module) is self._class:  # else something wrapped the class since, and finds nothing to do in it
            self.module.__class__ = self._original

    def restore(self, state: dict[str, Any]) -> None:
        """Turn a module's attributes, or a copy of them, into those of an unpatched one."""
        del state["_amskv"]
        _redirect(state, self.module, dict.fromkeys(self._replaced, (self._class, self._original)), self._aside)
        state.update({name: wrapper for name, wrapper in self._aside.items() if name not in state})

    def of(self, module: nn.Module) -> Binding:
        """Itself, for the module that was patched.

        Raises:
            RuntimeError: `module` is a shallow copy of it.
        """
        if module is not self.module:
            raise RuntimeError(
                "this module is a shallow copy of a patched one, such as a replica of torch.nn.DataParallel, without "
                "a cache of its own; patch a copy of the whole model on each device instead"
            )
        return self


class PatchedModule(nn.Module):
    """What a patch puts before a module's own class; `replaced` are the methods that it takes over."""

    replaced: tuple[str, ...] = ("forward",)
    _amskv: Any = None  # the Binding, on patched instances
    _amskv_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the module's own class, unpatched."""
        if self._amskv is None:
            return super().__reduce_ex__(protocol)
        plain = dict(vars(self))
        self._amskv.restore(plain)
        return copyreg._reconstructor, (stock(self), object, None), plain  # type: ignore[attr-defined]


def eager(function: F) -> F:
    """Compilers stop at this method: what it does depends on step and layer, and would be compiled anew for each.

    They are told when a module is patched: telling them imports the compiler, a second or so, and Triton with it.
    """
    function._amskv_eager = True  # type: ignore[attr-defined]
    return function


def stock(module: nn.Module) -> Any:
    """The class whose methods are the module's own; also where a wrapper calls a patch that was undone meanwhile."""
    return getattr(module, "_amskv_original", type(module))


def unwrapped(module: Any) -> Any:
    """The module inside wrappers that pass attributes through."""
    while isinstance(module, nn.Module):
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if inner is None:
            break
        module = inner
    return module


def missing_of(owner: object, attributes: tuple[str, ...]) -> list[str]:
    """The attributes that `owner` lacks."""
    return [attribute for attribute in attributes if not hasattr(owner, attribute)]


def parameters_of(owner: object, method: str) -> tuple[str, ...]:
    """What a method of `owner`'s class takes beside self; nothing where there is no such method."""
    function = getattr(stock(owner), method, None)  # type: ignore[arg-type]
    return () if function is None else tuple(inspect.signature(function).parameters)[1:]


def require(owner: object, name: str, attributes: tuple[str, ...], whose: str) -> None:
    """Raise TypeError where `owner` lacks what a patch needs of `whose` public class."""
    missing = missing_of(owner, attributes)
    if missing:
        raise TypeError(
            f"{name} is a {type(owner).__name__} without {', '.join(missing)}; it must be the public {whose}'s"
        )


def require_signature(owner: object, name: str, method: str, parameters: tuple[str, ...], whose: str) -> None:
    """Raise TypeError where a method of `owner`'s class does not take just `parameters`, in this order."""
    own = parameters_of(owner, method)
    if own == parameters:
        return
    more = [each for each in own if each not in parameters]
    fewer = [each for each in parameters if each not in own]
    parts = [f"{words} {', '.join(found)}" for words, found in (("also", more), ("not", fewer)) if found]
    raise TypeError(
        f"{name} is a {type(owner).__name__} whose {method} takes {' and '.join(parts) or ', '.join(own)}; it must "
        f"take ({', '.join(parameters)}), as the public {whose}'s does"
    )


@functools.cache
def _subclass(kind: type[PatchedModule], original: type[nn.Module]) -> type[nn.Module]:
    if issubclass(original, kind):  # a class that was wrapped while patched, as FSDP does, and never left
        return original
    methods = {name: method for base in reversed(kind.__mro__) for name, method in vars(base).items()}
    own = {name: _disabled(method) for name, method in methods.items() if getattr(method, "_amskv_eager", False)}
    return type(f"Patched{original.__name__}", (kind, original), {"_amskv_original": original, **own})


def _disabled(method: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return torch.compiler.disable(method)
    except Exception:  # a broken Triton: what cannot be imported will not compile anything either
        return method


def _redirect(
    state: dict[str, Any],
    module: nn.Module,
    methods: dict[str, tuple[type, type]],
    wrappers: dict[str, Callable[..., Any]] | None = None,
) -> set[str]:
    """Let bound methods of the module that lie among its attributes be those of another class, or its wrappers.

    Returns:
        The names of the methods that were found.
    """
    found = set()
    for key, value in state.items():
        if not isinstance(value, MethodType) or value.__self__ is not module:
            continue
        for name, (before, after) in methods.items():
            if value.__func__ is getattr(before, name):
                state[key] = (wrappers or {}).get(name, MethodType(getattr(after, name), module))
                found.add(name)
    return found
