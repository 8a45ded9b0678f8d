"""The command line: `amskv`, or `python -m amskv_kernels`; one file per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from amskv_kernels.cli import calibrate, console, doctor, evaluate, fit, generate, plan, serve
from amskv_kernels.version import __version__

DESCRIPTION = """\
Attention over a planned, paged KV cache for next-scale (VAR) image models.

start here:
  amskv doctor                                                what this machine can run, and why
  amskv plan --model var-d30 --policy ams-kv:75 --images 64   exact cache memory, before running anything
  amskv generate                                              images under a policy, of your checkpoint or of the digits
  amskv evaluate --policies ams-kv:75,sink:2,1                what policies cost in quality, on the same models
  amskv serve                                                 an HTTP endpoint as OpenAI's images API, and a page
  amskv fit --help                                            which policy should I use? measured on your checkpoint
  amskv calibrate --help                                      measure your checkpoint for one policy: a file for it
"""
LONGEST_COMPLAINT = 500  # characters


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, no usage block."""
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def _complain(message: str) -> int:
    line = " ".join(message.split())
    half = LONGEST_COMPLAINT // 2
    print(f"amskv: {line if len(line) <= 2 * half else f'{line[:half]} … {line[-half:]}'}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="amskv", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"amskv_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (plan, generate, evaluate, serve, fit, calibrate, doctor):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for anything the user can mend."""
    return console.run(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if value == []:  # what argparse makes of "--name=--"
            parser.error(f"argument --{name}: expected one argument")
    if arguments.command is None:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        return _complain((str(error).strip() or type(error).__name__).splitlines()[0])
