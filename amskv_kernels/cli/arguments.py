"""Kinds of command-line arguments: each refuses a wrong one in a line of its own."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def picture(text: str) -> Path:
    from amskv_kernels.cli.plots import picture_path

    try:
        return picture_path(text)
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    if not Path(text).name or text.endswith("/") or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a directory' if text else 'empty'}; it must name a file")
    return Path(text)


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
