"""Calls that must be refused: a good one with one thing wrong. A refusal is a TypeError or ValueError of one line."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amskv_kernels import ops
from amskv_kernels.planning.layout import ROWS_BITS
from tools.fuzz.calls import Call

Args = dict[str, Any]
ROWS = ("q", "k", "v", "qkv", "q_window")
TABLES = ("arena", "read_slots", "write_slots", "src_slots", "dst_slots", "keep")
WRITTEN = ("write_slots", "dst_slots")
NAN, INF = float("nan"), float("inf")
WRONG_NUMBERS: dict[str, tuple[Any, ...]] = {
    "softmax_scale": (0.0, -1.0, NAN, INF, 1e300, None, "1"),
    "kv_heads": (0, -1, 99, 1.5, None),
    "eps": (-1.0, NAN, INF, None),
}


def refused(call: Call) -> str | None:
    """What is wrong with how the call was refused, None if nothing is."""
    pages = call.args.get("pages")
    before = pages.clone() if isinstance(pages, Tensor) and pages.device.type == "cpu" else None
    try:
        getattr(ops, call.op)(**call.args)
    except (TypeError, ValueError) as error:
        if "\n" in str(error) or not str(error):
            return f"the refusal is no line: {str(error)!r}"
    except Exception as error:
        return f"{type(error).__name__} is raised: {str(error).splitlines()[:1]}"
    else:
        return "a malformed call is taken"
    if before is not None and not torch.equal(
        before.contiguous().view(torch.uint8), pages.contiguous().view(torch.uint8)
    ):
        return "a refused call changes the pool"
    return None


def spoil(call: Call, number: int) -> tuple[Call, str]:
    """The call with one mistake, and its name."""
    rng = random.Random(number)
    ways = list(WAYS)
    while True:
        way = ways.pop(rng.randrange(len(ways)))
        spoilt = WAYS[way](call.copy().args, rng)
        if spoilt is not None:
            return Call(call.op, spoilt), way


def _pick(args: Args, rng: random.Random, names: tuple[str, ...], least: int = 0) -> str | None:
    found = [name for name in names if isinstance(args.get(name), Tensor) and args[name].numel() >= least]
    return rng.choice(found) if found else None


def _changed(
    names: tuple[str, ...], change: Callable[[Tensor, random.Random], Any], least: int = 0
) -> Callable[[Args, random.Random], Args | None]:
    def spoil(args: Args, rng: random.Random) -> Args | None:
        name = _pick(args, rng, names, least)
        return None if name is None else args | {name: change(args[name], rng)}

    return spoil


def _nonsense(args: Args, rng: random.Random) -> Args:
    given = [name for name, value in args.items() if isinstance(value, Tensor)]
    name = rng.choice(given)
    optional = name in ("q_scale", "cos", "sin")
    return args | {name: rng.choice(("x", [1.0], 3) if optional else (None, "x", [1.0], 3))}


def _number(args: Args, rng: random.Random) -> Args | None:
    names = [name for name in ("softmax_scale", "eps", "kv_heads") if name in args]
    if "qkv" in args:
        names.append("eps")
    if not names:
        return None
    name = rng.choice(names)
    return args | {name: rng.choice(WRONG_NUMBERS[name])}


def _entry(change: Callable[[int, random.Random], int]) -> Callable[[Args, random.Random], Args | None]:
    """Change one entry of a slot table."""

    def spoil(args: Args, rng: random.Random) -> Args | None:
        name = _pick(args, rng, ("read_slots", "write_slots", "src_slots", "dst_slots"), 1)
        if name is None or args["arena"].numel() == 0:
            return None
        table = args[name].clone()
        at = rng.randrange(table.numel())
        table.view(-1)[at] = change(int(table.view(-1)[at]), rng)
        return args | {name: table}

    return spoil


def _aliased(args: Args, rng: random.Random) -> Args | None:
    """Rows that lie in the pool which the call writes."""
    name = _pick(args, rng, ("q", "k", "v"), 1)
    if name is None or "pages" not in args or not any(args[w].numel() for w in WRITTEN if w in args):
        return None
    rows, pool = args[name], args["pages"].view(-1, args["pages"].shape[3])
    if rows.shape[:3].numel() > len(pool):
        return None
    return args | {name: pool[: rows.shape[:3].numel()].view(rows.shape)}


def _last_stride(x: Tensor, rng: random.Random) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.shape[-2] > 1 else x[..., ::2]


WAYS: dict[str, Callable[[Args, random.Random], Args | None]] = {
    "nonsense": _nonsense,
    "number": _number,
    "dtype of rows": _changed(ROWS, lambda x, rng: x.to(rng.choice((torch.float64, torch.int32, torch.complex64)))),
    "rank of rows": _changed(ROWS, lambda x, rng: rng.choice((x[None], x.flatten(1, 2)))),
    "head size": _changed(ROWS, lambda x, rng: x[..., : rng.choice((0, 1, 48, 80))].contiguous()[..., :63]),
    "stride of rows": _changed(ROWS, _last_stride, 2),
    "no heads": _changed(ROWS, lambda x, rng: x[:, :, :0]),
    "batch": _changed(ROWS[:3], lambda x, rng: torch.cat([x, x, x.new_zeros(1, *x.shape[1:])])),
    "tokens": _changed(("q", "v"), lambda x, rng: torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)),
    "device": _changed((*ROWS[:3], *TABLES, "pages", "q_window"), lambda x, rng: x.to("meta")),
    "dtype of pages": _changed(("pages",), lambda x, rng: x.double()),
    "shape of pages": _changed(("pages",), lambda x, rng: rng.choice((x[0], x[:, :1], x[:, :, :12], x[..., :32]))),
    "strides of pages": _changed(("pages",), lambda x, rng: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "dtype of a table": _changed(TABLES, lambda x, rng: x.to(rng.choice((torch.float32, torch.int16)))),
    "rank of a table": _changed(TABLES, lambda x, rng: rng.choice((x[None], x.flatten()))),
    "lead of a table": _changed(TABLES, lambda x, rng: torch.cat([x] * 5 + [x.new_zeros(1, *x.shape[1:])] * 5)),
    "page outside": _entry(lambda entry, rng: (rng.choice((5000, 1 << 22)) << ROWS_BITS) | max(1, entry & 0xFF)),
    "rows of an entry": _entry(lambda entry, rng: entry | 0xFF),
    "negative entry": _entry(lambda entry, rng: -1 - entry),
    "aliased rows": _aliased,
}  # fmt: skip
