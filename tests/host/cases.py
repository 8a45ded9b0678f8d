"""Random calls of attn with everything odd about them, and the check of a result against fp64."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from amskv_kernels.ops import reference
from amskv_kernels.ops.backends import torch as torch_backend
from amskv_kernels.ops.quantise import quantise
from amskv_kernels.planning.layout import ROWS_BITS

SHARED_BYTES = 163 * 1024  # of an sm_80 block


@dataclass
class Case:
    """Shapes of a call. `history` has the rows of each page read, `grow` the rows the first written page holds."""

    n: int = 9
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    history: tuple[int, ...] = (16, 5)
    grow: int = 0
    stores: bool = True
    gap: bool = True  # an empty entry among those written
    per_head: bool = False
    packed: bool = True
    dtype: torch.dtype = torch.bfloat16
    int8: bool = False  # pages of int8, with scales
    seed: int = 0
    multiprocessors: int = 4
    plan: tuple[int, int, int, int] | None = None  # rows per warp, warps, teams, splits
    hopper: tuple[int, int] | None = None  # rows of a tile, blocks: the Hopper kernel

    def __str__(self) -> str:
        default = Case()
        changed = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "default"


@dataclass
class Inputs:
    """The tensors of a call; every row that nothing names is NaN, in int8 pages its scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    pages: Tensor
    arena: Tensor
    read: Tensor
    write: Tensor
    scale: float
    page_scales: Tensor | None = None
    out: Tensor = field(init=False)
    lse: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, n, heads, _ = self.q.shape
        self.out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype)
        self.lse = torch.full((batch, heads, n), torch.nan)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.pages, self.arena, self.read, self.write

    @property
    def call(self) -> tuple[Tensor | float | None, ...]:
        """The arguments of an `attn`."""
        return *self.tables, self.scale, self.page_scales


def on(inputs: Inputs, device: torch.device) -> Inputs:
    """The same tensors elsewhere."""
    return Inputs(*(x.to(device) if isinstance(x, Tensor) else x for x in inputs.call))


def make(case: Case) -> Inputs:
    """Random tensors and tables: pages in no order, empty entries in between, arenas shuffled."""
    rng = np.random.default_rng(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.batch * case.kv_heads
    written = -(-(case.n + case.grow) // case.page_size) if case.stores else 0
    own = len(case.history) + written + 1  # pages of one arena; one is never named
    shape = (case.batch, case.n, case.heads + 2 * case.kv_heads, case.head_dim)
    qkv = torch.randn(shape, generator=generator).to(case.dtype)
    parts = qkv.split([case.heads, case.kv_heads, case.kv_heads], 2)
    q, k, v = parts if case.packed else (part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts)
    pages, page_scales = _pool(case, heads * own, generator)
    arena = torch.from_numpy(rng.permutation(heads).astype(np.int32) * own).view(case.batch, case.kv_heads)
    tables = [_tables(case, own, written, rng) for _ in range(heads if case.per_head else 1)]
    for index in range(heads):
        read, _ = tables[index % len(tables)]
        for slot in read:
            page, rows = int(arena.flatten()[index]) + (slot >> ROWS_BITS), slot & 255
            if rows == 0:
                continue
            if case.hopper:  # it fetches whole pages, whose rest every store fills with zeros
                pages[page] = 0
            filled = torch.randn(2, rows, case.head_dim, generator=generator).to(case.dtype)
            if page_scales is None:
                pages[page, :, :rows] = filled
            else:  # rows of every size, so that another row's scale is seen
                filled *= 2 ** torch.randint(-3, 4, (2, rows, 1), generator=generator)
                pages[page, :, :rows], page_scales[page, :, :rows] = quantise(filled)
    lead = (case.batch, case.kv_heads) if case.per_head else (1, 1)
    read, write = (
        torch.tensor([t[i] for t in tables], dtype=torch.int32).view(*lead, len(tables[0][i])) for i in range(2)
    )
    return Inputs(q, k, v, pages, arena, read, write, 1 / np.sqrt(case.head_dim), page_scales)


def _pool(case: Case, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Pages, and their scales where they are int8, as nothing may read them."""
    shape = (count, 2, case.page_size, case.head_dim)
    if not case.int8:
        return torch.full(shape, torch.nan, dtype=case.dtype), None
    pages = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return pages, torch.full(shape[:3], torch.nan)


def _tables(case: Case, own: int, written: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """One head's read and write entries; with `grow`, the last page read is the first one written."""
    order = rng.permutation(own).tolist()
    history = [int(r) for r in rng.permutation(case.history)] if case.per_head else list(case.history)
    read = [order[i] << ROWS_BITS | rows for i, rows in enumerate(history)]
    write, left = [], case.n + case.grow
    fresh = order[len(history) :]
    for i in range(written):
        rows = min(left, case.page_size)
        write.append(fresh[i] << ROWS_BITS | rows)
        left -= rows
    if case.grow:
        read.append(fresh[0] << ROWS_BITS | case.grow)
    empty = own << ROWS_BITS  # no rows, and a page that is not ours: must be skipped
    if write and case.gap:
        write.insert(1, empty)
    return [empty, *read, empty], write


def random_case(seed: int, tokens: list[int], head_dims: list[int], pages: int = 6, **changes: object) -> Case:
    """A case with everything drawn; `pages` is the most pages of history, `changes` stand for what is not drawn."""
    rng = random.Random(seed)
    page_size, kv_heads = rng.choice([16, 32, 64, 128]), rng.choice([1, 2, 3])
    stores = rng.random() < 0.8
    case = Case(
        n=rng.choice(tokens),
        batch=rng.choice([1, 2]),
        kv_heads=kv_heads,
        heads=kv_heads * rng.choice([1, 1, 2, 3]),
        head_dim=rng.choice(head_dims),
        page_size=page_size,
        history=tuple(rng.choice([page_size, rng.randint(0, page_size)]) for _ in range(rng.randint(0, pages))),
        grow=rng.choice([0, 0, rng.randint(1, page_size - 1)]) if stores else 0,
        stores=stores,
        gap=rng.random() < 0.4,
        per_head=rng.random() < 0.5,
        packed=rng.random() < 0.5,
        dtype=rng.choice([torch.float16, torch.bfloat16]),
        seed=seed,
        multiprocessors=rng.choice([1, 8, 132]),
    )
    return replace(case, **changes)


def rows_to_round(dtype: torch.dtype, count: int) -> tuple[Case, Inputs]:
    """Rows for int8 pages: a row's bytes depend on its largest element's mantissa and on the others over it alone.

    `count` mantissas of the largest, drawn at random, each beside all elements that may stand with it.
    """
    bits = 11 if dtype is torch.float16 else 8
    mantissas = torch.arange(2 ** (bits - 1), 2**bits).float()
    largest = mantissas[torch.randperm(len(mantissas), generator=torch.Generator().manual_seed(0))[:count]]
    others = torch.cat([mantissas * 2.0**-e for e in range(9)])  # below that, all round to 0
    others = torch.nn.functional.pad(others, (0, -len(others) % 127)).view(-1, 127)
    rows = torch.zeros(len(largest), len(others), 128)
    rows[..., 0] = largest[:, None]
    rows[..., 1:] = others.where(others <= largest[:, None, None], 0)
    rows[..., 1::2] *= -1
    k = (rows.flatten(0, 1) / 2 ** (bits - 1))[None, :, None].to(dtype)
    assert torch.equal(k[0, :, 0].float() * 2 ** (bits - 1), rows.flatten(0, 1)), "exact in this dtype"
    case = Case(n=k.shape[1], batch=1, heads=1, kv_heads=1, head_dim=128, page_size=128, int8=True, dtype=dtype)
    inputs = make(case)
    inputs.k, inputs.v = k, -k
    return case, inputs


def run(module: ModuleType, case: Case, inputs: Inputs, schedule: str) -> dict[str, int]:
    """Execute attn in place of `inputs.out`, `inputs.lse` and `inputs.pages`; the executor's counters."""
    call, dtype = call_of(module, inputs), str(case.dtype).removeprefix("torch.")
    plan = module.plan(call, dtype, case.multiprocessors, SHARED_BYTES, False)
    if case.plan is not None:
        plan = module.Plan(*case.plan)
    if case.hopper is not None:
        plan = module.Plan.hopper(*case.hopper)
    return module.attn(call, inputs.scale, dtype, plan, schedule)


def call_of(module: ModuleType, inputs: Inputs) -> object:
    """The arrays that the executor works on: those of `inputs`."""
    arrays = [array(x) for x in (inputs.q, inputs.k, inputs.v, inputs.pages, inputs.out)]
    tables = [x.numpy() for x in (inputs.arena, inputs.read, inputs.write, inputs.lse)]
    return module.Call(*arrays, *tables, scales_of(inputs))


def append(module: ModuleType, case: Case, inputs: Inputs, schedule: str) -> dict[str, int]:
    """Execute append in place of `inputs.pages`; the executor's counters."""
    arrays = [array(x) for x in (inputs.k, inputs.v, inputs.pages)]
    tables = (inputs.arena.numpy(), inputs.write.numpy(), scales_of(inputs))
    return module.append(*arrays, *tables, str(case.dtype).removeprefix("torch."), schedule)


def check(module: ModuleType, case: Case) -> dict[str, int]:
    """Eager equals lazy bit for bit, and both equal the fp64 reference as far as the dtype allows."""
    eager = make(case)
    lazy = copy.deepcopy(eager)
    counters = run(module, case, eager, "eager")
    assert run(module, case, lazy, "lazy") == counters
    for name in ("out", "lse", "pages", "page_scales"):
        assert same(getattr(eager, name), getattr(lazy, name)), f"{name}: eager is not lazy"
    judge(case, eager)
    assert counters["bank_conflicts"] == 0, f"{counters['bank_conflicts']} bank conflicts"
    return counters


def judge(case: Case, done: Inputs) -> None:
    """`done` holds what attn made of `make(case)`: within twice the error of torch's own attention, stored exactly.

    Judged on the device of `done.out`: fp64 on a CPU would take a large case minutes.
    """
    truth, plain = (on(make(case), done.out.device) for _ in range(2))
    out, lse = reference.attn(*truth.call)
    torch_out, _ = torch_backend.attn(*plain.call)
    rounding = torch.finfo(case.dtype).eps / 2
    allowed = 2 * (torch_out.double() - out).norm() + rounding * out.norm()
    assert (done.out.double() - out).norm() <= allowed, "out: more than twice the error of torch's attention"
    assert torch.allclose(done.lse.double(), lse, rtol=0, atol=2e-5), "lse is not that of the reference"
    assert same(done.pages, truth.pages), "pages differ from the reference's"
    assert same(done.page_scales, truth.page_scales), "page_scales differ from the reference's"


def both_dtypes(case: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)]


def array(x: Tensor) -> np.ndarray:
    """The bits of 16-bit elements, or int8."""
    return x.numpy() if x.dtype is torch.int8 else x.view(torch.int16).numpy().view(np.uint16)


def scales_of(inputs: Inputs) -> np.ndarray:
    return np.empty(0, np.float32) if inputs.page_scales is None else inputs.page_scales.numpy()


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit."""
    if a is None or b is None:
        return a is b
    return torch.equal(*(x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()]) for x in (a, b)))
