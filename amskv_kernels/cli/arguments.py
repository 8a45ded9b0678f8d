"""Kinds of command-line arguments: each refuses a wrong one in a line of its own, before anything is measured."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.files import check_folder, check_writable

if TYPE_CHECKING:
    from amskv_kernels.schedule import ScaleSchedule
    from amskv_kernels.shapes import ModelShape

MOST = 10**6  # of anything that is counted
MOST_LAYERS, MOST_SIDE, MOST_SCALES = 1000, 4096, 64
_UNITS = {"MiB": 2**20, "GiB": 2**30}
_SHAPE = ("layers", "heads", "kv_heads", "head_dim")


def command(commands: Any, name: str, summary: str, after: str) -> argparse.ArgumentParser:
    """A command of the parser's; `after` says what to do next, at the end of its help."""
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=after, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return added


def picture(text: str) -> Path:
    """A file for a picture."""
    from amskv_kernels.cli.plots import picture_path

    try:
        return picture_path(text)
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """A file that can be written."""
    try:
        check_writable(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder that files can be written to."""
    try:
        check_folder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """What reads a whole number within least … most."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            shown = text if len(text) <= 24 else f"{text[:20]}…"
            raise argparse.ArgumentTypeError(f"{shown!r} is not a whole number within {least} … {most}")
        return int(text)

    return read


def memory(text: str) -> int:
    """Bytes that "8GiB" or "512MiB" means."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(MiB|GiB)", text)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory; it must be a number with MiB or GiB, such as 8GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def number(text: str) -> float:
    """A finite one; argparse says this name where the text is none."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite; it must be a similarity to compare with")
    return float(text)


def seed(text: str) -> int:
    """One that torch takes."""
    if not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is out of range; a seed has 64 bits")
    return int(text)


def device(text: str) -> str:
    """One that there is."""
    import torch

    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one to measure on; it must be cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there; torch sees {torch.cuda.device_count()} such devices")
    return text


def default_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Three ways to say which model, and which schedule it draws."""
    from amskv_kernels.schedule import ScaleSchedule
    from amskv_kernels.shapes import ModelShape

    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help=", ".join(ModelShape.names()))
    model.add_argument("--shape", metavar="SHAPE", help="any other: layers=8,heads=4,kv_heads=2,head_dim=64")
    model.add_argument(
        "--checkpoint", metavar="FILE", help="a VAR's or Infinity's .pth or safetensors, which show their sizes"
    )
    known = ", ".join(ScaleSchedule.names())
    parser.add_argument("--schedule", help=f"another than the model's own: sizes such as 1,2,3x4, or one of {known}")


def model_shape(arguments: argparse.Namespace) -> ModelShape:
    """The shape that --model, --shape or --checkpoint, and --schedule, say.

    Raises:
        ValueError: they say none.
    """
    from dataclasses import replace

    from amskv_kernels.shapes import ModelShape

    schedule = None if arguments.schedule is None else _schedule(arguments.schedule)
    if arguments.model is not None:
        named = ModelShape.named(arguments.model)
        return named if schedule is None else replace(named, schedule=schedule)
    if arguments.shape is not None:
        if schedule is None:
            raise ValueError("--shape says nothing of the maps; add --schedule, a name or sizes such as 1,2,3,4")
        return ModelShape("custom", **_sizes(arguments.shape), schedule=schedule)
    from amskv_kernels.models import checkpoint

    return checkpoint.model_shape(arguments.checkpoint, schedule)


def _sizes(text: str) -> dict[str, int]:
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    given = dict(pairs)
    if len(pairs) != len(given) or not {"layers", "heads", "head_dim"} <= given.keys() <= set(_SHAPE):
        raise ValueError(f"--shape is {text[:80]!r}; it must be like layers=8,heads=4,kv_heads=2,head_dim=64")
    given.setdefault("kv_heads", given["heads"])
    sizes = {}
    for name, value in given.items():
        try:
            sizes[name] = whole(1, MOST_LAYERS)(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--shape has {name} {error}") from error
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(f"--shape has kv_heads {sizes['kv_heads']}; it must divide heads, which is {sizes['heads']}")
    return sizes


def _schedule(text: str) -> ScaleSchedule:
    """A published one by its name, or any by its sizes: sides of square maps, h x w of others."""
    from amskv_kernels.schedule import ScaleSchedule

    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?(,[0-9]{1,9}(x[0-9]{1,9})?)*", text):
        return ScaleSchedule.named(text)
    sizes = [[int(side) for side in part.split("x")] * (1 if "x" in part else 2) for part in text.split(",")]
    if len(sizes) > MOST_SCALES or max(map(max, sizes)) > MOST_SIDE:
        raise ValueError(
            f"--schedule is {text[:80]!r}; it must have at most {MOST_SCALES} scales with sides of at most {MOST_SIDE}"
        )
    return ScaleSchedule(sizes)
