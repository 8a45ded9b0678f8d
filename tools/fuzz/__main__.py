"""`python -m tools.fuzz`: random calls of every backend that serves a CPU, and random plans, against the slow truth.

python -m tools.fuzz                             a short run: seconds
python -m tools.fuzz --calls 100000 --plans 10000 --out tools/reports/fuzz.json
python -m tools.fuzz --backend torch --at 4711   one call again, to look at

The same seed draws the same calls. With --out the counts are saved as it goes, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from amskv_kernels import backend, ops
from amskv_kernels.cli import console
from amskv_kernels.files import write_text
from amskv_kernels.version import __version__
from tools.fuzz.calls import NARROW, WIDE, Call, Sizes, draw_call, judge
from tools.fuzz.interpreter import hasten
from tools.fuzz.malformed import refused, spoil
from tools.fuzz.plans import judge_plan

SAVE_SECONDS = 10.0
STRIDE = 10**9  # between the numbers of two seeds
MALFORMED = 5  # every so manieth call has a mistake
MODES = {
    "plain": torch.no_grad,
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
SIZES = {"triton": NARROW}  # of the backends that are not given WIDE


def in_mode(mode: str) -> Callable[[Call], Any]:
    """A call through the dispatcher, in a mode of torch that must not matter."""

    def run(call: Call) -> Any:
        with MODES[mode]():
            return getattr(torch.ops.amskv, call.op).default(**call.args)

    return run


def judge_call(number: int, sizes: Sizes = WIDE) -> str | None:
    """What is wrong with what this backend makes of the call that this number draws, None if nothing is."""
    call = draw_call(number, sizes)
    if number % MALFORMED == 0:
        spoilt, way = spoil(call, number)
        wrong = refused(spoilt)
        return wrong and f"{way}: {wrong}"
    mode = list(MODES)[number // MALFORMED % len(MODES)]
    torch.use_deterministic_algorithms(number % 7 == 0)
    try:
        return judge(call, in_mode(mode))
    except Exception as error:
        return f"{type(error).__name__} in mode {mode}: {str(error)[:200]}"
    finally:
        torch.use_deterministic_algorithms(False)


def backends() -> list[str]:
    """Those that can serve attention on the CPU when forced; Triton's interpreter needs a process of its own."""
    able = []
    for name in ops.dispatch.BACKENDS:
        try:
            with backend(name):
                ops.choose("attn", "cpu")
        except RuntimeError:
            continue
        able.append(name)
    return able


def fuzz(
    name: str, judged: Callable[[int], str | None], count: int, seed: int, found: dict[str, Any],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Judge numbers that have not been judged, up to `count`; what is wrong goes into `found`."""
    row = found.setdefault(name, {"done": 0, "wrong": [], "seconds": 0.0})
    saved = began = time.monotonic()
    before = row["seconds"]
    with tqdm(total=count, initial=row["done"], desc=name, unit="", disable=None) as bar:
        for i in range(row["done"], count):
            if (wrong := judged(seed * STRIDE + i)) is not None:
                row["wrong"].append([i, wrong])
                print(f"{name} {i}: {wrong}", file=sys.stderr)
            row["done"] = i + 1
            bar.update()
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                row["seconds"] = round(before + saved - began, 1)
                save()
    row["seconds"] = round(before + time.monotonic() - began, 1)
    save()


def interpreted(arguments: argparse.Namespace) -> int:
    """The Triton part, in a process that has the interpreter on from its start."""
    command = [sys.executable, "-m", "tools.fuzz", "--backend", "triton", "--plans", "0"]
    for name in ("calls", "seed", "out", "at"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", str(value)]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=500, help="random calls per backend (default 500)")
    parser.add_argument("--plans", type=int, default=200, help="random plans (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", help="one backend alone (default: every one that serves the CPU)")
    parser.add_argument("--at", type=int, help="this one call or plan alone")
    parser.add_argument("--out", type=Path, help="file for the counts; an unfinished one is continued")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """1 if anything was wrong."""
    arguments = _parse(argv)
    here = backends()
    names = [arguments.backend] if arguments.backend else here
    if arguments.backend and arguments.backend not in here:
        hint = "; it needs TRITON_INTERPRET=1" if arguments.backend == "triton" else ""
        print(f"--backend {arguments.backend} serves no CPU here{hint}; these do: {', '.join(here)}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the calls are small
    if os.environ.get("TRITON_INTERPRET") == "1":
        hasten()
    if arguments.at is not None:
        with backend(names[0]):
            print(judge_call(arguments.seed * STRIDE + arguments.at, SIZES.get(names[0], WIDE)) or "right")
        return 0
    header = {"version": __version__, "torch": torch.__version__, "machine": platform.machine(), "seed": arguments.seed}
    state: dict[str, Any] = {**header, "found": {}}
    if arguments.out is not None and arguments.out.exists():
        state = json.loads(arguments.out.read_text(encoding="utf-8"))
        if {name: state[name] for name in header} != header:
            print(f"{arguments.out} has other calls or another version in it; name another file", file=sys.stderr)
            return 2

    def save() -> None:
        if arguments.out is not None:
            write_text(arguments.out, json.dumps(state, indent=1) + "\n")

    for name in names:
        judged = functools.partial(judge_call, sizes=SIZES.get(name, WIDE))
        with backend(name):
            fuzz(name, judged, arguments.calls, arguments.seed, state["found"], save)
    if arguments.plans:
        fuzz("plans", judge_plan, arguments.plans, arguments.seed, state["found"], save)
    failed = any(row["wrong"] for row in state["found"].values())
    if not arguments.backend and "triton" not in here:
        failed |= bool(interpreted(arguments))
    return int(failed)


if __name__ == "__main__":
    sys.exit(console.run(main))
