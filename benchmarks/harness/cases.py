"""What is measured: models, policies, batches, and the calls that a generation consists of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from amskv_kernels import CachePlan, parse_policy
from amskv_kernels.planning.layout import ROWS_MASK
from amskv_kernels.shapes import ModelShape

# "model" or "model@schedule", those that targets speak of first.
MODELS = (
    "var-d30", "var-d36", "infinity-2b", "var-d16", "infinity-8b", "var-d36@var-1024",
    "infinity-2b@infinity-0.25m-1.000", "infinity-8b@infinity-0.25m-1.000", "var-d20", "var-d24",
)  # fmt: skip
QUICK_MODELS = MODELS[:3]
POLICIES = ("full", "ams-kv:75", "ams-kv:84.83", "scalekv:10", "heatkv:10")
QUICK_POLICIES = ("full", "ams-kv:75")
IMAGES = (64, 8, 1)
# The CPU's share of it: (model, policies, images, dtype). What fits two cores and a few minutes.
CPU_CASES = (
    ("var-d16", POLICIES, 1, "fp32"),
    ("var-d16", ("full", "ams-kv:75"), 1, "bf16"),
    ("var-d16", ("full", "ams-kv:75"), 4, "fp32"),
    ("var-d30", ("full", "ams-kv:75", "ams-kv:84.83"), 1, "fp32"),
    ("var-d30", ("full", "ams-kv:75"), 1, "bf16"),
    ("var-d36", ("full", "ams-kv:75"), 1, "fp32"),
    ("var-d36", ("full",), 1, "bf16"),
    ("infinity-2b@infinity-0.25m-1.000", ("full", "ams-kv:75"), 1, "fp32"),
    ("infinity-2b@infinity-0.25m-1.000", ("full",), 1, "bf16"),
)
QUICK_CPU_CASES = (("var-d16", QUICK_POLICIES, 1, "fp32"),)


@dataclass(frozen=True)
class Group:
    """The layers whose call at one step is the same: n queries, `history` and n keys a head, `stored` rows kept."""

    step: int
    n: int
    history: float
    stored: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One generation: a model under a policy, so many images at once, two sequences each.

    Raises:
        ValueError: no model, schedule or policy of that name, from whatever first asks for `shape` or `plan`.
    """

    model: str
    policy: str
    images: int
    dtype: str = "bf16"

    @property
    def sequences(self) -> int:
        """Sequences in lockstep; guidance doubles them."""
        return 2 * self.images

    @property
    def shape(self) -> ModelShape:
        """Layers, heads, head size and schedule."""
        return model_shape(self.model)

    @property
    def plan(self) -> CachePlan:
        """The plan of its cache."""
        return build_plan(self.model, self.policy)

    @property
    def name(self) -> str:
        """What keys of rows begin with."""
        return f"{self.model}/{self.policy}/{self.images}/{self.dtype}"

    def describe(self) -> dict[str, object]:
        """What every row of this case says about it."""
        shape = self.shape
        return {
            "model": self.model,
            "policy": self.policy,
            "images": self.images,
            "sequences": self.sequences,
            "dtype": self.dtype,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "page_size": self.plan.page_size,
        }


@lru_cache(maxsize=64)
def model_shape(model: str) -> ModelShape:
    """The shape of "model" or "model@schedule"."""
    name, _, schedule = model.partition("@")
    return ModelShape.named(name, schedule or None)


@lru_cache(maxsize=64)
def build_plan(model: str, policy: str) -> CachePlan:
    """The plan of a model under a policy."""
    shape = model_shape(model)
    chosen = parse_policy(policy, shape.schedule, shape.layers)
    return CachePlan.build(shape.schedule, chosen, shape.layers, kv_heads=shape.kv_heads)


def history_rows(plan: CachePlan, step: int, layer: int) -> float:
    """Tokens that a head of a layer reads at a step besides the current ones; the mean where heads differ."""
    rows = int((plan.read_slots(step, layer) & ROWS_MASK).sum())
    return rows if plan.heads == 1 else rows / plan.heads


def stored_rows(plan: CachePlan, step: int, layer: int) -> float:
    """Tokens that a head of a layer stores at a step; the mean where heads differ."""
    slots = plan.write_slots(step, layer)
    storing = ((slots & ROWS_MASK).sum(axis=-1) > 0).mean() if slots.size else 0
    return plan.schedule.tokens[step] * (int(storing) if storing in (0, 1) else float(storing))


@lru_cache(maxsize=64)
def groups(plan_of: tuple[str, str]) -> tuple[Group, ...]:
    """The distinct calls of a generation of (model, policy), step by step, the most layers first."""
    plan = build_plan(*plan_of)
    found: list[Group] = []
    for step, n in enumerate(plan.schedule.tokens):
        alike: dict[tuple[float, float], list[int]] = {}
        for layer in range(plan.num_layers):
            rows = (history_rows(plan, step, layer), stored_rows(plan, step, layer))
            alike.setdefault(rows, []).append(layer)
        by_layers = sorted(alike.items(), key=lambda item: -len(item[1]))
        found += [Group(step, n, history, stored, tuple(layers)) for (history, stored), layers in by_layers]
    return tuple(found)


def layer_kinds(case: Case) -> list[tuple[int, ...]]:
    """Layers that read the same number of tokens at every step, the most layers first."""
    plan = case.plan
    alike: dict[tuple[float, ...], list[int]] = {}
    for layer in range(plan.num_layers):
        reads = tuple(history_rows(plan, step, layer) for step in range(len(plan.schedule)))
        alike.setdefault(reads, []).append(layer)
    return sorted((tuple(layers) for layers in alike.values()), key=lambda layers: -len(layers))


def bytes_per_image(case: Case, itemsize: int = 2) -> int:
    """Memory that measuring one image of `case` takes: the pool, again in int8 pages for each of two contestants, and
    the widest call's tensors for every contestant.

    A call's qkv, its output under eight contestants, and contiguous K, V in the four layouts that contestants want.
    """
    shape, plan = case.shape, case.plan
    row = 2 * itemsize * shape.head_dim  # of one head in an image's two sequences
    pool = 2 * plan.allocated_tokens * shape.kv_heads // plan.heads * row
    widest = max(
        (8 * shape.heads + 3 * shape.heads) * g.n + 4 * 2 * shape.kv_heads * (g.n + g.history)
        for g in groups((case.model, case.policy))
    )
    return int(pool + 2 * pool / itemsize * (1 + 4 / shape.head_dim) + widest * row)


def largest_batch(case: Case, free: int, itemsize: int = 2) -> int:
    """Images of `case` whose measurement fits `free` bytes, a tenth left over."""
    return int(0.9 * free) // bytes_per_image(case, itemsize)


def kernel_cases(
    models: tuple[str, ...], policies: tuple[str, ...], images: tuple[int, ...], free: int
) -> Iterator[Case | tuple[str, str]]:  # fmt: skip
    """Every case, and instead of one that cannot be (its name, why)."""
    for model in models:
        for policy in policies:
            try:
                most = largest_batch(Case(model, policy, 1), free)
            except ValueError as error:
                yield f"{model}/{policy}", str(error)
                continue
            for count in (*(i for i in images if i <= most), *([most] if most not in images and most > 0 else [])):
                yield Case(model, policy, count)
            for count in (i for i in images if i > most):
                yield f"{model}/{policy}/{count}", f"does not fit: {most} images are the largest batch to measure here"
