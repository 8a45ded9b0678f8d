"""What a plan costs in bytes, beside what stock code takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from amskv_kernels.arguments import instance_of, shown, whole_number
from amskv_kernels.planning.layout import row_bytes, row_size
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.shapes import ModelShape

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "int8": 1}  # of the pages
CURRENT_BYTES = ELEMENT_BYTES | {"int8": 2}  # of K, V in flight, as the model computes them; with int8, in 16 bits
# Of one K and one V element together: fp32 K, because F.normalize under autocast returns fp32, and 16-bit V.
STOCK_PAIR_BYTES = 6
SCORE_BYTES = 4  # fp32
MIB = 2**20
MOST_IMAGES = 2**31 - 1  # beyond any pool, whose pages are numbered in 32 bits


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one batch, all layers and heads, in MiB; tokens are per layer, sequence and head.

    What papers count (retained, peak) is of tokens alone: pages not rounded up, rows not padded. Rows of int8 are
    counted with their scales everywhere; what is in flight beside them is of a model that computes in 16 bits.

    Attributes:
        row: elements of a page's row: D, or the next size that has kernels.
        needed_mib: what must be free for keys and values: the pool, the largest scale in flight, and summed scores.
        saved: the share of stock_mib that is not needed. Stock code needs more than stock_mib, a copy of each layer's
            cache while it concatenates, which is not counted for us.
        allocated_mib: the pool, pages rounded up; made before the first step.
        in_flight_mib: K, V of the largest scale, which a layer has beside the pages while it attends.
        padding_mib: what of the pool and of the scale in flight is rows' padding.
        scores_mib: the attention that a policy adds up for every key it holds (H2O), in fp32; 0 for others.
        stock_mib: every token of every scale in stock's 6 bytes per (K, V) element pair.
        retained_mib: what all layers hold between steps, at the widest step, as papers count.
        retained_at_stock_dtype_mib: the same tokens in stock's 6 bytes per pair, as ScaleKV's tables count.
        peak_mib: the most held during any call, the scale in flight included, pages not rounded up.
        kept_of_all: share of all tokens retained.
        saved_of_all: share of all tokens not retained, AMS-KV's convention.
        kept_of_prefix: share of the tokens of all scales but the last retained.
        saved_of_prefix: share of them not retained, ScaleKV's and HeatKV's convention; below 0 never, 0 when nothing
            is dropped.
        saved_bytes: share of stock_mib not retained.
        lossless: whether every layer reads every earlier scale, which int8 pages hold in eight bits.
    """

    model: str
    schedule: str
    policy: str
    images: int
    sequences: int
    dtype: str
    page_size: int
    row: int
    pages_per_sequence_and_head: int
    total_tokens: int
    prefix_tokens: int
    retained_tokens_per_layer: float
    needed_mib: float
    saved: float
    allocated_mib: float
    in_flight_mib: float
    padding_mib: float
    scores_mib: float
    stock_mib: float
    retained_mib: float
    retained_at_stock_dtype_mib: float
    peak_mib: float
    kept_of_all: float
    saved_of_all: float
    kept_of_prefix: float
    saved_of_prefix: float
    saved_bytes: float
    lossless: bool

    def as_dict(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)


def counted(number: int, noun: str) -> str:
    """The number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shares(kept: float) -> str:
    """Both shares of what is kept: "25.0% kept, 75.0% saved"."""
    return f"{kept:.1%} kept, {1 - kept:.1%} saved"


def stock_token_mib(shape: ModelShape, sequences: int) -> float:
    """MiB that stock code keeps of one token in one layer, over all sequences and KV heads."""
    return shape.kv_heads * shape.head_dim * STOCK_PAIR_BYTES * sequences / MIB


def token_mib(shape: ModelShape, sequences: int, element_bytes: int, row: int | None = None) -> float:
    """MiB of one token in one layer over all sequences and KV heads, in rows of D elements unless told."""
    return shape.kv_heads * 2 * row_bytes(row or shape.head_dim, element_bytes) * sequences / MIB


def _checked(plan: CachePlan, shape: ModelShape, images: int, dtype: str, cfg: bool) -> int:
    """The number of images, or an error as of `report`."""
    instance_of("plan", plan, CachePlan)
    instance_of("shape", shape, ModelShape)
    if (plan.schedule, plan.num_layers) != (shape.schedule, shape.layers) or plan.heads not in (1, shape.kv_heads):
        raise ValueError(f"plan is {plan!r}; it must be one of {shape.name}: {shape.layers} layers, its schedule")
    instance_of("cfg", cfg, bool)
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype is {shown(dtype)}; it must be one of {', '.join(ELEMENT_BYTES)}")
    return whole_number("images", images, 1, MOST_IMAGES)


def report(
    plan: CachePlan, shape: ModelShape, policy: str, images: int, dtype: str = "bf16", cfg: bool = True
) -> MemoryReport:  # fmt: skip
    """The memory of generating `images` at once; with `cfg`, two sequences an image.

    Raises:
        TypeError: a plan, shape or cfg of another type.
        ValueError: a plan of another model than the shape's, images below 1 or beyond 32 bits, an unknown dtype, or a
            head size that pages cannot have.
    """
    images = _checked(plan, shape, images, dtype, cfg)
    row = row_size("head_dim", shape.head_dim)
    schedule, sequences = shape.schedule, images * (2 if cfg else 1)
    stock, element, moving = stock_token_mib(shape, sequences), ELEMENT_BYTES[dtype], CURRENT_BYTES[dtype]
    ours, stored = (token_mib(shape, sequences, element, each) for each in (None, row))
    current, padded = (token_mib(shape, sequences, moving, each) for each in (None, row))
    # Where heads differ, a plan counts the tokens of all of them.
    retained, allocated, in_flight = (
        tokens / plan.heads for tokens in (plan.retained_tokens, plan.allocated_tokens, plan.in_flight_tokens)
    )
    peak_mib = float((plan.live * (ours / plan.heads) + np.asarray(schedule.tokens)[:, None] * current).max())
    scores_mib = plan.summed_scores * SCORE_BYTES * shape.kv_heads * sequences / MIB
    needed_mib = allocated * stored + in_flight * padded + scores_mib
    stock_mib = schedule.total * shape.layers * stock
    kept_of_all = retained / (schedule.total * shape.layers)
    kept_of_prefix = retained / (schedule.prefix * shape.layers) if schedule.prefix else 1.0
    return MemoryReport(
        model=shape.name,
        schedule=schedule.name,
        policy=policy,
        images=images,
        sequences=sequences,
        dtype=dtype,
        page_size=plan.page_size,
        row=row,
        pages_per_sequence_and_head=-(-plan.pages // plan.heads),
        total_tokens=schedule.total,
        prefix_tokens=schedule.prefix,
        retained_tokens_per_layer=retained / shape.layers,
        needed_mib=needed_mib,
        saved=1 - needed_mib / stock_mib,
        allocated_mib=allocated * stored,
        in_flight_mib=in_flight * padded,
        padding_mib=allocated * (stored - ours) + in_flight * (padded - current),
        scores_mib=scores_mib,
        stock_mib=stock_mib,
        retained_mib=retained * ours,
        retained_at_stock_dtype_mib=retained * stock,
        peak_mib=peak_mib,
        kept_of_all=kept_of_all,
        saved_of_all=1 - kept_of_all,
        kept_of_prefix=kept_of_prefix,
        saved_of_prefix=1 - kept_of_prefix,
        saved_bytes=1 - retained * ours / stock_mib,
        lossless=plan.lossless,
    )
