"""Triton's interpreter without what it does again for nothing: half of a call's time."""

from __future__ import annotations

import dataclasses
import types
from typing import Any


class _Done:
    """The scope of a patch that stays."""

    def restore(self) -> None:
        """Nothing: the process interprets to its end."""


def hasten() -> None:
    """For a process that only interprets, with TRITON_INTERPRET=1 from its start.

    Every function called in a kernel puts the interpreter's operations in the place of the language's anew, and leaves
    them there: once is enough. And the overflow test of integer arithmetic, in 64 bits, is worked out but not looked
    at unless the `debug` option is on.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    inner: Any = interpreter
    # The kernels name the language `tl`, its own library `core`.
    inner._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    inner._patch_lang = lambda fn: _Done()
    inner.interpreter_builder.options = dataclasses.replace(inner.interpreter_builder.options, sanitize_overflow=False)
