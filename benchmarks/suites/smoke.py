"""A small regression set under pytest-benchmark, on any machine: `python -m pytest benchmarks/smoke.py`.

It shows that the calls run and roughly what they take; figures for publication come from `python -m benchmarks`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amskv_kernels import CachePlan, parse_policy
from amskv_kernels.shapes import ModelShape
from benchmarks.harness import peers
from benchmarks.harness.cases import Case, groups
from benchmarks.harness.gate import Gate
from benchmarks.harness.inputs import CallInputs, Pool
from benchmarks.suites.module import Layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case("var-d16", "ams-kv:75", 1, "bf16" if DEVICE == "cuda" else "fp32")


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(CASE, DEVICE)


def _run(benchmark: Any, call: Any) -> None:
    def synchronised() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("step", [3, 6, 9])
@pytest.mark.parametrize("contestant", ["ours", "stock"])
def test_attention(benchmark: Any, pool: Pool, step: int, contestant: str) -> None:
    group = next(group for group in groups((CASE.model, CASE.policy)) if group.step == step)
    inputs = CallInputs(pool, group)
    made = peers.ours(inputs) if contestant == "ours" else peers.concatenation(inputs)
    with torch.no_grad():
        Gate(inputs).check(contestant, made.output(made.calls[0]()))
    _run(benchmark, made.calls[0])


@pytest.mark.parametrize("contestant", ["ours", "stock"])
def test_module(benchmark: Any, pool: Pool, contestant: str) -> None:
    layer = Layer(pool, 0)
    _run(benchmark, layer.ours if contestant == "ours" else layer.stock)


@pytest.mark.parametrize("model", ["var-d36", "infinity-8b"])
def test_planner(benchmark: Any, model: str) -> None:
    shape = ModelShape.named(model)

    def build() -> None:
        CachePlan.build(shape.schedule, parse_policy("ams-kv:75", shape.schedule, shape.layers), shape.layers)

    benchmark.pedantic(build, rounds=5, warmup_rounds=1)
