"""What planned caches take, and how long planning does: exact arithmetic but for the planner's own time, one core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache

import numpy as np

from amskv_kernels import CachePlan, parse_policy
from amskv_kernels.planning.memory import ELEMENT_BYTES, report, stock_token_mib, token_mib
from amskv_kernels.policies import PUBLISHED_SAVINGS
from amskv_kernels.shapes import ModelShape
from benchmarks.harness.cases import POLICIES
from benchmarks.harness.results import Row
from benchmarks.harness.tasks import Context, Task

REPETITIONS = 15


def tasks(context: Context) -> Iterator[Task]:
    """Every known model under `full`, AMS-KV at each published saving, and whatever else can be planned."""
    for model in ModelShape.names():
        savings = [f"ams-kv:{percent:g}" for percent in PUBLISHED_SAVINGS.get(model, (75.0, 84.83))]
        others = [policy for policy in POLICIES if policy != "full" and not policy.startswith("ams-kv")]
        shape = ModelShape.named(model)
        for policy in ("full", *savings, *others):
            try:
                parse_policy(policy, shape.schedule, shape.layers)
            except ValueError as error:
                context.absent[policy] = str(error)
                continue
            repetitions = 5 if context.quick else REPETITIONS

            def make(model: str = model, policy: str = policy, repetitions: int = repetitions) -> Row:
                return plan_row(model, policy, repetitions)

            yield Task(f"plan/{model}/{policy}", 0.2, make)


@cache
def memory_of(model: str, policy: str, dtype: str = "bf16") -> dict[str, object]:
    """What one image with guidance takes: exact arithmetic, so it is worked out wherever it is shown."""
    shape = ModelShape.named(model)
    plan = CachePlan.build(
        shape.schedule, parse_policy(policy, shape.schedule, shape.layers), shape.layers, kv_heads=shape.kv_heads
    )
    return report(plan, shape, policy, 1, dtype).as_dict()


def plan_row(model: str, policy: str, repetitions: int) -> Row:
    """Memory of one image with guidance in bf16 pages, step by step as well, and the planner's time."""
    shape = ModelShape.named(model)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        chosen = parse_policy(policy, shape.schedule, shape.layers)
        plan = CachePlan.build(shape.schedule, chosen, shape.layers, kv_heads=shape.kv_heads)
        seconds.append(time.perf_counter() - start)
    ours, stock = token_mib(shape, 2, ELEMENT_BYTES["bf16"]), stock_token_mib(shape, 2)
    return {
        "suite": "plan",
        **report(plan, shape, policy, images=1).as_dict(),
        "settings": repr(chosen),
        "plan_ms": round(1e3 * statistics.median(seconds), 2),
        "sizes": [list(size) for size in shape.schedule.sizes],
        "live_mib": [round(float(tokens) / plan.heads * ours, 3) for tokens in plan.live.max(axis=1)],
        "stock_live_mib": [
            round(float(tokens) * shape.layers * stock, 3) for tokens in np.cumsum(shape.schedule.tokens)
        ],
    }
