"""The memory that a plan announces is what a generation takes, to the byte."""

from dataclasses import replace

import pytest
import torch

from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule, Share
from amskv_kernels.planning.memory import MIB, report, shares
from amskv_kernels.policies import H2O, HeadOrders, HeatKV, Recent, ScaleKV, SnapKV
from amskv_kernels.shapes import ModelShape

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (5, 5), (8, 8), (7, 9)], "odd")
SHAPE = ModelShape("small", 3, 4, 2, 64, SCHEDULE)  # 4 query heads on 2 KV heads
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
ORDERS = HeadOrders.from_scores(torch.rand(3, 2, 6).tolist(), SCHEDULE, 2)

POLICIES = {
    "full": Full(),
    "ams-kv": AMSKV.for_budget(SCHEDULE, 3, Share(0.25)),
    "heatkv": HeatKV(0.4, ORDERS),
    "scalekv": ScaleKV(30, "paper"),
    "snapkv": SnapKV(40),
    "recent": Recent(30, 3),
    "h2o": H2O(33),
    "h2o, everything": H2O(1.0),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("images", "cfg", "dtype", "head_dim"),
    [
        (1, True, "bf16", 64),
        (3, False, "fp32", 64),
        (2, True, "fp16", 64),
        (1, True, "bf16", 104),
        (1, True, "int8", 64),
        (2, False, "int8", 104),
    ],
)
def test_what_is_needed_is_what_a_generation_takes(name, images, cfg, dtype, head_dim):
    plan = CachePlan.build(SCHEDULE, POLICIES[name], SHAPE.layers, kv_heads=SHAPE.kv_heads)
    memory = report(plan, replace(SHAPE, head_dim=head_dim), name, images, dtype, cfg)
    batch = images * (2 if cfg else 1)
    cache = PagedKVCache(plan, batch=batch, kv_heads=2, head_dim=head_dim, dtype=DTYPES[dtype])
    model = torch.bfloat16 if dtype == "int8" else DTYPES[dtype]
    in_flight = scores = 0
    for n in SCHEDULE.tokens:
        for layer in range(SHAPE.layers):
            q, k, v = torch.randn(batch, n, 8, head_dim).to(model).split([4, 2, 2], dim=2)
            cache.attend(layer, q, k, v)
            in_flight = max(in_flight, 2 * batch * n * 2 * cache.pages.shape[3] * k.element_size())
            sums = {} if cache._selector is None else cache._selector._sums
            scores = max(scores, sum(each.numel() * each.element_size() for each in sums.values()))
    scales = 0 if cache.page_scales is None else cache.page_scales.untyped_storage().nbytes()
    assert memory.allocated_mib * MIB == cache.nbytes == cache.pages.untyped_storage().nbytes() + scales
    assert memory.in_flight_mib * MIB == in_flight
    assert memory.scores_mib * MIB == scores
    assert memory.needed_mib * MIB == cache.nbytes + in_flight + scores
    assert memory.row == cache.pages.shape[3]
    padding = (cache.nbytes - scales + in_flight) * (memory.row - head_dim) / memory.row
    assert memory.padding_mib * MIB == padding
    assert memory.saved == 1 - memory.needed_mib / memory.stock_mib
    assert (scores > 0) == (name == "h2o")


def test_needed_is_never_below_any_other_figure():
    """What misled: the peak left out the rounding to pages, and fell below what was allocated."""
    shape = ModelShape.named("var-d30")
    memory = report(CachePlan.build(shape.schedule, ScaleKV(0.1), 30), shape, "scalekv:10", images=8)
    assert memory.needed_mib == memory.allocated_mib + memory.in_flight_mib == 262.5
    assert memory.peak_mib == pytest.approx(209.8, abs=0.05)
    assert memory.needed_mib > max(memory.peak_mib, memory.allocated_mib, memory.retained_mib)
    assert memory.saved < memory.saved_bytes
    assert shares(memory.kept_of_all) == "6.2% kept, 93.8% saved"
    assert memory.kept_of_all + memory.saved_of_all == memory.kept_of_prefix + memory.saved_of_prefix == 1


def test_eight_bits_are_counted_with_their_scales():
    shape = ModelShape.named("var-d30")
    plan = CachePlan.build(shape.schedule, Full(), 30)
    half, eight = (report(plan, shape, "full", 1, dtype) for dtype in ("bf16", "int8"))
    for figure in ("retained_mib", "allocated_mib"):
        assert getattr(eight, figure) == getattr(half, figure) * (64 + 4) / 128
    assert eight.in_flight_mib == half.in_flight_mib
    last = 256 * 2 * shape.kv_heads * 2 * 64 * 2 / MIB  # the largest map, in 16 bits
    assert eight.peak_mib == pytest.approx((half.peak_mib - last) * 68 / 128 + last)


def test_a_schedule_of_one_scale_keeps_nothing():
    shape = ModelShape("one", 2, 1, 1, 64, ScaleSchedule([(4, 4)]))
    memory = report(CachePlan.build(shape.schedule, Full(), 2), shape, "full", images=1)
    assert (memory.allocated_mib, memory.saved_of_prefix, memory.lossless) == (0, 0, True)
    assert memory.needed_mib == memory.in_flight_mib > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": 0}, ValueError, "images is 0; it must be a whole number ≥ 1"),
        ({"images": 1.5}, ValueError, "images is 1.5; it must be a whole number ≥ 1"),
        ({"images": 10**400}, ValueError, "images is 1000.*; it must be at most 2147483647"),
        ({"dtype": "int4"}, ValueError, "dtype is 'int4'; it must be one of fp16, bf16, fp32, int8"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype is torch.bfloat16; it must be one of"),
        ({"plan": Full()}, TypeError, r"plan is Full\(\); it must be a CachePlan"),
        ({"shape": "var-d30"}, TypeError, "shape is 'var-d30'; it must be a ModelShape"),
        ({"shape": ModelShape.named("var-d30")}, ValueError, "it must be one of var-d30: 30 layers, its schedule"),
    ],
)
def test_a_report_of_something_else_is_refused(arguments, error, message):
    plan = CachePlan.build(SCHEDULE, Full(), SHAPE.layers)
    with pytest.raises(error, match=message):
        report(**{"plan": plan, "shape": SHAPE, "policy": "full", "images": 1} | arguments)
