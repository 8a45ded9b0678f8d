"""What every command of the project owes the console it runs on, whatever its encoding and whoever leaves early."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress


def run(main: Callable[[], int | None]) -> int:
    """A command's exit code, 0 where `main` returns None.

    Signs that the console cannot show become "?". Where the reader of a pipe leaves, or the user interrupts, the
    command ends quietly with the shell's own codes, 141 and 130; whatever else `main` raises is its caller's.
    """
    _prepare()
    try:
        code = _code_of(main)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon_stdout()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None:
            raise
        _abandon_stdout()
        print(f"standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _prepare() -> None:
    """Streams that take any text; a process without them gets ones that take it nowhere."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _code_of(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1


def _abandon_stdout() -> None:
    """What is left in the buffer goes nowhere, so that the interpreter's own flush at the end has nothing to say."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
