"""What a plan costs in bytes, beside what stock code takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.shapes import ModelShape

# Bytes of one K and one V element together.
PAIR_BYTES = {"fp16": 4, "bf16": 4, "fp32": 8}
STOCK_PAIR_BYTES = 6  # fp32 K, because F.normalize under autocast returns fp32, and 16-bit V
MIB = 2**20


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one batch, all layers and heads, in MiB; tokens are per layer, sequence and head.

    Attributes:
        stock_mib: every token of every scale in stock's 6 bytes per (K, V) element pair.
        retained_mib: what all layers hold between steps, at the widest step.
        retained_at_stock_dtype_mib: the same tokens in stock's 6 bytes per pair, as ScaleKV's tables count.
        peak_mib: the most held during any call, the current scale's own K, V in flight included.
        allocated_mib: the pool, pages rounded up.
        saved_of_all: share of all tokens not retained, AMS-KV's convention.
        saved_of_prefix: share of the tokens of all scales but the last, ScaleKV's and HeatKV's convention;
            below 0 never, 0 when nothing is dropped.
        saved_bytes: share of stock_mib not retained.
        lossless: whether every layer reads every earlier scale.
    """

    model: str
    schedule: str
    policy: str
    images: int
    sequences: int
    dtype: str
    page_size: int
    pages_per_sequence_and_head: int
    total_tokens: int
    prefix_tokens: int
    retained_tokens_per_layer: float
    stock_mib: float
    retained_mib: float
    retained_at_stock_dtype_mib: float
    peak_mib: float
    allocated_mib: float
    saved_of_all: float
    saved_of_prefix: float
    saved_bytes: float
    lossless: bool

    def as_dict(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)


def counted(number: int, noun: str) -> str:
    """The number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def token_mib(shape: ModelShape, sequences: int, pair_bytes: int) -> float:
    """MiB of one token in one layer over all sequences and KV heads."""
    return shape.kv_heads * shape.head_dim * pair_bytes * sequences / MIB


def report(
    plan: CachePlan, shape: ModelShape, policy: str, images: int, dtype: str = "bf16", cfg: bool = True
) -> MemoryReport:  # fmt: skip
    """The memory of generating `images` at once; with `cfg`, two sequences an image.

    Raises:
        ValueError: images below 1 or an unknown dtype.
    """
    if images < 1:
        raise ValueError(f"images is {images}; it must be at least 1")
    if dtype not in PAIR_BYTES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(PAIR_BYTES)}")
    schedule, sequences = shape.schedule, images * (2 if cfg else 1)
    ours, stock = (token_mib(shape, sequences, pair) for pair in (PAIR_BYTES[dtype], STOCK_PAIR_BYTES))
    # Where heads differ, a plan counts the tokens of all of them.
    retained, peak, allocated = (
        tokens / plan.heads for tokens in (plan.retained_tokens, plan.peak_tokens, plan.allocated_tokens)
    )
    stock_mib = schedule.total * shape.layers * stock
    return MemoryReport(
        model=shape.name,
        schedule=schedule.name,
        policy=policy,
        images=images,
        sequences=sequences,
        dtype=dtype,
        page_size=plan.page_size,
        pages_per_sequence_and_head=-(-plan.pages // plan.heads),
        total_tokens=schedule.total,
        prefix_tokens=schedule.prefix,
        retained_tokens_per_layer=retained / shape.layers,
        stock_mib=stock_mib,
        retained_mib=retained * ours,
        retained_at_stock_dtype_mib=retained * stock,
        peak_mib=peak * ours,
        allocated_mib=allocated * ours,
        saved_of_all=1 - retained / (schedule.total * shape.layers),
        saved_of_prefix=1 - retained / (schedule.prefix * shape.layers) if schedule.prefix else 0.0,
        saved_bytes=1 - retained * ours / stock_mib,
        lossless=plan.lossless,
    )
