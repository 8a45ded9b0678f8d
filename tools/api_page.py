"""The text of docs/api.md, from the docstrings of what modules offer in their `__all__`; `make readme` writes it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

MODULES = (
    "amskv_kernels", "amskv_kernels.integrations", "amskv_kernels.cache", "amskv_kernels.ops", "amskv_kernels.policies",
    "amskv_kernels.planning", "amskv_kernels.serving", "amskv_kernels.calibrate", "amskv_kernels.models",
    "amskv_kernels.models.checkpoint", "amskv_kernels.models.tensor_parallel",
)  # fmt: skip
_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def render() -> str:
    """A chapter per module, an entry per name; a name that several modules offer stands in the first."""
    shown: set[int] = set()
    lines: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        entries = [(each, getattr(module, each)) for each in module.__all__]
        new = [(each, what) for each, what in entries if callable(what) and id(what) not in shown]
        shown |= {id(what) for _, what in new}
        if new:
            lines += [f"## {name}", "", (inspect.getdoc(module) or "").partition("\n\n")[0], ""]
            lines += [line for each, what in new for line in entry(each, what)]
    return "\n".join(lines).rstrip()


def entry(name: str, what: object) -> Iterator[str]:
    """A function or a class with its methods."""
    yield from (f"### `{name}{signature(what)}`", "", *markdown(inspect.getdoc(what) or ""), "")
    if inspect.isclass(what):
        methods = list(_methods(what))
        yield from methods
        if methods:
            yield ""


def _methods(owner: type) -> Iterator[str]:
    """The public ones, a line each."""
    for name, member in vars(owner).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        first = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        dot = f"{owner.__name__}." if isinstance(member, classmethod | staticmethod) else "."
        yield f"- `{dot}{name}{'' if isinstance(member, property) else signature(function)}`: {first}"


def signature(what: object) -> str:
    """As it is called: without self and cls, defaults as they are written."""
    try:
        found = inspect.signature(what)  # type: ignore[arg-type]
    except ValueError:
        return ""
    kept = [
        each.replace(annotation=_Bare(each.annotation) if isinstance(each.annotation, str) else each.annotation)
        for each in found.parameters.values()
        if each.name not in ("self", "cls") and not each.name.startswith("_")
    ]
    return str(found.replace(parameters=kept, return_annotation=inspect.Signature.empty)).replace("<factory>", "…")


class _Bare(str):
    """An annotation that is shown as it is written, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def markdown(doc: str) -> Iterator[str]:
    """A docstring: what its sections list becomes a list."""
    section = None
    for line in doc.splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        listed = re.fullmatch(r"    (\S[^:]*): (.*)", line)
        if heading and heading[1] in _SECTIONS:
            section = heading[1]
            yield from (f"*{section}*", "")
        elif section and listed and section not in ("Returns", "Yields"):
            yield f"- `{listed[1]}`: {listed[2]}"
        elif section and line.startswith("    "):
            yield f"  {line.strip()}" if section not in ("Returns", "Yields") else line.strip()
        else:
            section = section if not line else None
            yield line
