"""Random calls of the ops: drawn from a number, judged against the fp64 reference.

Everything that no slot names holds NaN; rows come packed, transposed, expanded, unaligned; tables differ by head and by
sequence. The same number always gives the same call.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amskv_kernels.ops import reference
from amskv_kernels.planning.layout import HEAD_DIMS, ROWS_BITS

Tables = list[list[list[int]]]

OPS = {"attn": 12, "append": 3, "prepare_qk": 2, "window_scores": 4, "compact": 4}  # how often, of 25
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Largest error of out, in units of the largest value, and of lse: what the rounding of probabilities and products comes
# to, with room; a wrong row is off by a thousand times as much.
OUT_LIMIT = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
LSE_LIMIT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SCORE_LIMIT = 1e-3


class Sizes(NamedTuple):
    """What the shape of a call is drawn from, every entry as likely as the next.

    Attributes:
        batch: sequences.
        kv_heads: KV heads.
        group: query heads of each.
        tokens: rows of k of this call.
        entries: pages of history.
        page_sizes: tokens of a page.
        window: query rows of `window_scores`.
    """

    batch: tuple[int, ...]
    kv_heads: tuple[int, ...]
    group: tuple[int, ...]
    tokens: tuple[int, ...]
    entries: tuple[int, ...]
    page_sizes: tuple[int, ...]
    window: tuple[int, ...]


WIDE = Sizes(
    batch=(0, 1, 1, 2, 2, 3), kv_heads=(1, 1, 2, 3), group=(1, 1, 2, 3), tokens=(0, 1, 1, 2, 5, 9, 16, 17, 30),
    entries=(0, 0, 1, 2, 3), page_sizes=(16, 32, 64), window=(1, 3, 16),
)  # fmt: skip
# Of Triton's interpreter: it takes its time for each program and tile, however many numbers they hold. So mostly one
# sequence and one head, and few pages; every kind of call stays: none and two sequences, several heads, GQA, odd
# lengths, every line of the tile table (rows of q up to 16, 32, 64, 128 and above), and histories of 14 pages, whose
# keys are cut into shares.
NARROW = Sizes(
    batch=(0,) * 3 + (1,) * 12 + (2,) * 2, kv_heads=(1,) * 10 + (2, 2, 3), group=(1, 1, 2, 3),
    tokens=(0, 1, 1, 2, 2, 3, 5, 5, 7, 9, 11, 15, 16, 17, 24, 30, 45),
    entries=(0,) * 12 + (1,) * 14 + (2,) * 9 + (3,) * 5 + (4, 14), page_sizes=(16,) * 4 + (32,), window=(1, 3, 16),
)  # fmt: skip


@dataclass
class Call:
    """One call: the op, its arguments by name, and the names of those that it changes."""

    op: str
    args: dict[str, Any]

    def copy(self) -> Call:
        """The same call on a pool of its own; the rest it only reads."""
        pages = self.args.get("pages")
        return Call(self.op, self.args | ({} if pages is None else {"pages": pages.clone()}))


class Draw:
    """What one number decides."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator("cpu").manual_seed(number)

    def chance(self, share: float) -> bool:
        """True so often."""
        return self.random.random() < share

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu").to(dtype)


def draw_call(number: int, sizes: Sizes = WIDE) -> Call:
    """A call that must work."""
    draw = Draw(number)
    rng = draw.random
    op = rng.choices(list(OPS), list(OPS.values()))[0]
    dtype, head_dim, page_size = rng.choice(DTYPES), rng.choice(HEAD_DIMS), rng.choice(sizes.page_sizes)
    batch, kv_heads, group = rng.choice(sizes.batch), rng.choice(sizes.kv_heads), rng.choice(sizes.group)
    n = rng.choice(sizes.tokens)
    if op == "prepare_qk":
        return _prepare_qk(draw, batch, n, kv_heads, group, head_dim, dtype)
    history = [rng.choice((page_size, rng.randint(0, page_size))) for _ in range(rng.choice(sizes.entries))]
    stored, held = _stored(rng, n, page_size)
    if op == "compact":
        stored, held = [], 0
    pool = _Pool(draw, batch, kv_heads, page_size, head_dim, dtype, history, stored, held)
    q, k, v = _rows(draw, (batch, n, kv_heads * group, head_dim), (batch, n, kv_heads, head_dim), dtype)
    tables = {"pages": pool.pages, "arena": pool.arena}
    scale = rng.choice((head_dim**-0.5, 1.0, 0.05))
    if op == "attn":
        rest = {"read_slots": pool.read, "write_slots": pool.write, "softmax_scale": scale}
        return Call(op, {"q": q, "k": k, "v": v, **tables, **rest})
    if op == "append":
        return Call(op, {"k": k, "v": v, **tables, "write_slots": pool.write})
    if op == "window_scores":
        window = draw.normal(batch, rng.choice(sizes.window), kv_heads * group, head_dim, dtype=dtype)
        mode = rng.choice(("softmax", "sum_logits"))
        return Call(
            op, {"q_window": window, "k": k, **tables, "read_slots": pool.read, "softmax_scale": scale, "mode": mode}
        )
    keep, target = pool.choose(n)
    return Call(op, {**tables, "src_slots": pool.read, "k": k, "v": v, "keep": keep, "dst_slots": target})


def _prepare_qk(
    draw: Draw, batch: int, n: int, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> Call:  # fmt: skip
    heads = kv_heads * group
    wide = draw.normal(batch, n, heads + 2 * kv_heads + 1, head_dim, dtype=dtype)
    angle = draw.normal(n, head_dim // 2, dtype=torch.float32) * 3
    args: dict[str, Any] = {"qkv": wide[:, :, 1:], "kv_heads": kv_heads, "l2norm": draw.chance(0.5)}
    if draw.chance(0.5):
        args["q_scale"] = draw.normal(heads, dtype=torch.float32).abs() + 0.5
    if draw.chance(0.5):
        args |= {"cos": angle.cos(), "sin": angle.sin()}
    return Call("prepare_qk", args)


def _stored(rng: random.Random, n: int, page_size: int) -> tuple[list[int], int]:
    """Rows of each page written, and how many the first one holds already."""
    if n == 0 or rng.random() < 0.3:
        return [], 0
    held = rng.choice((0, 0, rng.randint(1, page_size - 1)))
    left, rows = n + held, []
    while left:
        rows.append(min(left, page_size))
        left -= rows[-1]
    for _ in range(rng.choice((0, 0, 1))):
        rows.insert(rng.randint(0, len(rows)), 0)
    return rows, held


def _rows(
    draw: Draw, q_shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v with strides as models have them, and as they do not."""
    (batch, n, heads, head_dim), kv_heads = q_shape, kv_shape[2]
    layout = draw.random.choice(("packed", "plain", "heads first", "batch inside", "unaligned", "expanded", "wide"))
    if layout == "packed":
        qkv = draw.normal(batch, n, heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        return q, k, v
    found = []
    for shape in (q_shape, kv_shape, kv_shape):
        x = draw.normal(*shape, dtype=dtype)
        if layout == "heads first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "batch inside":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        elif layout == "expanded":
            axis = draw.random.choice((0, 1, 2))
            x = x.narrow(axis, 0, min(1, x.shape[axis])).expand(shape)
        elif layout == "wide":
            x = torch.nn.functional.pad(x, (3, 5))[..., 3:-5]
        found.append(x)
    return found[0], found[1], found[2]


class _Pool:
    """Pages, arenas in no order, and tables, all of one seed; two pages of every arena are never named."""

    def __init__(
        self, draw: Draw, batch: int, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype,
        history: list[int], stored: list[int], held: int,
    ) -> None:  # fmt: skip
        rng = draw.random
        self.draw, self.page_size, self.shape = draw, page_size, (batch, kv_heads)
        per_batch, per_head = batch > 0 and draw.chance(0.3), draw.chance(0.3)
        lead = (batch if per_batch else 1, kv_heads if per_head else 1)
        self.span = span = len(history) + len(stored) + 4
        arenas = batch * kv_heads
        start = [i * span for i in rng.sample(range(arenas), arenas)]
        self.arena = torch.tensor(start, dtype=torch.int32).view(batch, kv_heads)
        self.pages = torch.full((max(arenas, 1) * span, 2, page_size, head_dim), torch.nan, dtype=dtype)
        self.offsets: list[list[list[int]]] = []  # that no table has named yet
        read: Tables = []
        write: Tables = []
        for _ in range(lead[0]):
            own = [self._table(history, stored, held, ragged=lead != (1, 1)) for _ in range(lead[1])]
            read.append([table[0] for table in own])
            write.append([table[1] for table in own])
            self.offsets.append([table[2] for table in own])
        self.lead = lead
        self.read, self.write = self._slots(read), self._slots(write)
        for b in range(batch):
            for h in range(kv_heads):
                for slot in read[b % lead[0]][h % lead[1]]:
                    page, rows = int(self.arena[b, h]) + (slot >> ROWS_BITS), slot & 0xFF
                    if rows:
                        self.pages[page, :, :rows] = draw.normal(2, rows, head_dim, dtype=dtype)

    def _table(
        self, history: list[int], stored: list[int], held: int, ragged: bool
    ) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
        rng = self.draw.random
        offsets = rng.sample(range(self.span), self.span)
        read = [offsets.pop() << ROWS_BITS | (0 if ragged and rng.random() < 0.2 else rows) for rows in history]
        write = [offsets.pop() << ROWS_BITS | rows for rows in stored]
        if held:
            first = next(slot for slot in write if slot & 0xFF)
            read.insert(rng.randint(0, len(read)), first >> ROWS_BITS << ROWS_BITS | held)
        return read, write, offsets

    def _slots(self, tables: Tables) -> Tensor:
        width = len(tables[0][0])
        return torch.tensor(tables, dtype=torch.int32).view(*self.lead, width)

    def choose(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys to keep of every sequence and head, as many for each, and slots of fresh pages for them."""
        rng, (batch, kv_heads) = self.draw.random, self.shape
        keys = [[self._keys(b, h, n) for h in range(kv_heads)] for b in range(batch)]
        most = min((len(own) for each in keys for own in each), default=0)
        count = rng.randint(0, min(most, 2 * self.page_size))
        keep = [[sorted(rng.sample(own, count)) for own in each] for each in keys]
        rows = [self.page_size] * (count // self.page_size) + (
            [count % self.page_size] if count % self.page_size else []
        )
        tables = [[[own[i] << ROWS_BITS | r for i, r in enumerate(rows)] for own in each] for each in self.offsets]
        dtype = rng.choice((torch.int32, torch.int64))
        return torch.tensor(keep, dtype=dtype).view(batch, kv_heads, count), self._slots(tables)

    def _keys(self, b: int, h: int, n: int) -> list[int]:
        slots = self.read[b % self.lead[0], h % self.lead[1]].tolist()
        named = [i * self.page_size + row for i, slot in enumerate(slots) for row in range(slot & 0xFF)]
        return [*named, *range(len(slots) * self.page_size, len(slots) * self.page_size + n)]


def judge(call: Call, run: Callable[[Call], Any]) -> str | None:
    """What is wrong with the result of a call that must work, None if nothing is."""
    truth, ours = call.copy(), call.copy()
    defaults = {"mode": "softmax"} if call.op == "window_scores" else {}
    expected = getattr(reference, call.op)(**(defaults | truth.args))
    found = run(ours)
    pages = ours.args.get("pages")
    if pages is not None and not torch.equal(pages.view(torch.uint8), truth.args["pages"].view(torch.uint8)):
        return "the pool is not the reference's"
    if call.op == "attn":
        dtype = call.args["q"].dtype
        size = float(call.args["v"].abs().max()) if call.args["v"].numel() else 1.0
        wrong = off("out", found[0], expected[0], OUT_LIMIT[dtype] * max(size, 4.0))
        return wrong or off("lse", found[1], expected[1], LSE_LIMIT[dtype])
    if call.op == "prepare_qk":
        for x, y in zip(found, expected, strict=True):
            limit = torch.finfo(x.dtype).eps * y.abs() + 4e-6
            if x.shape != y.shape or not ((x.double() - y).abs() <= limit).all():
                return "q or k is not the reference's"
    if call.op == "window_scores":
        return off("scores", found, expected, SCORE_LIMIT * call.args["q_window"].shape[1] * 4)
    return None


def off(name: str, found: Tensor, expected: Tensor, limit: float) -> str | None:
    """How a result differs from the truth, None where it does not."""
    if found.shape != expected.shape:
        return f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    same = torch.equal(found.isneginf(), expected.isneginf()) and torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite()
    error = float((found.double() - expected)[finite].abs().max()) if finite.any() else 0.0
    if same and error <= limit:
        return None
    return f"{name} is off by {error:.3g}, {limit:.3g} is the limit" + ("" if same else "; NaN or −inf elsewhere")
