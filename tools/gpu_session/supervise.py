"""One command under watch: its output into a file of bounded size, itself and its children gone when its time is up."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

LOG_BYTES = 12 << 20  # of all output of a phase: what comes back from a GPU machine is limited, 16 MiB a file
POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0  # for a command to write down what it has
PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies


class Ending(NamedTuple):
    """How a command ended: its exit code, or None and why it was stopped."""

    code: int | None
    stopped: str
    seconds: float


def died(code: int | None) -> str:
    """What an exit code means."""
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def missing(command: Sequence[str]) -> str | None:
    """The program that this machine does not have."""
    return None if shutil.which(command[0]) else command[0]


def run(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str],
    watch: Callable[[], str | None] = lambda: None, folder: Path | None = None,
) -> Ending:  # fmt: skip
    """Run until it ends, `seconds` are over or `watch` gives a reason to stop it; output goes to the end of `log`."""
    started = time.monotonic()
    with open(log, "ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, preexec_fn=_child,
        )  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, out), daemon=True)
        reader.start()
        stopped = ""
        while process.poll() is None:
            if time.monotonic() - started > seconds:
                stopped = f"stopped after {seconds:.0f} s"
            stopped = stopped or watch() or ""
            if stopped:
                _end(process)
                break
            time.sleep(POLL_SECONDS)
        reader.join(GRACE_SECONDS)
    return Ending(None if stopped else process.returncode, stopped, time.monotonic() - started)


def _child() -> None:
    """In the child: a group of its own, so that it ends with its children; and it does not outlive this process."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait a little, kill: a process that waits for a GPU that hangs does not answer."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    if process.poll() is None:
        print(f"process {process.pid} does not end", file=sys.stderr)


def _copy(source: IO[bytes], out: IO[bytes]) -> None:
    """Lines from a pipe to the log, as long as it has room."""
    for line in source:
        if out.tell() + len(line) < LOG_BYTES:
            out.write(line)
            out.flush()
