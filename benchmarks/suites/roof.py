"""Predictions: the roof of every step on a GPU that is not here, from bytes and operations alone."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.cases import MODELS, POLICIES, QUICK_MODELS, QUICK_POLICIES, Case, groups
from benchmarks.harness.inputs import group_work
from benchmarks.harness.results import Row
from benchmarks.harness.roofs import GPUS
from benchmarks.harness.tasks import Context, Task

IMAGES = (64, 1)


def tasks(gpu: str, context: Context) -> Iterator[Task]:
    """One row per model, policy and batch; its steps inside."""
    for model in QUICK_MODELS if context.quick else MODELS:
        for policy in QUICK_POLICIES if context.quick else POLICIES:
            try:
                groups((model, policy))
            except ValueError as error:
                context.absent[policy] = str(error)
                continue
            for images in IMAGES[:1] if context.quick else IMAGES:
                case = Case(model, policy, images)

                def make(case: Case = case) -> Row:
                    return roof_row(case, gpu)

                yield Task(f"roof/{gpu}/{case.name}", 0.01, make)


def roof_row(case: Case, gpu: str) -> Row:
    """The least time of every step of one generation's attention, all layers."""
    ceilings, steps, total = GPUS[gpu].ceilings, [], 0.0
    for group in groups((case.model, case.policy)):
        work = group_work(case, group)
        total += len(group.layers) * ceilings.roof_us(work)
        steps.append(
            {
                "step": group.step,
                "n": group.n,
                "history": group.history,
                "stored": group.stored,
                "layers": len(group.layers),
                "bytes": work.bytes,
                "flops": work.flops,
                "roof_us": ceilings.roof_us(work),
                "bound": ceilings.bound(work),
            }
        )
    return {
        "suite": "roof", "prediction": True, "gpu": gpu, "ceilings": GPUS[gpu].source,
        **case.describe(), "steps": steps, "image_roof_us": total,
    }  # fmt: skip
