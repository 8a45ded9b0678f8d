"""A pool of one generation, and the context of a run."""

import pytest

from benchmarks.harness import measure
from benchmarks.harness.cases import Case
from benchmarks.harness.inputs import Pool
from benchmarks.harness.tasks import Context


@pytest.fixture(scope="module")
def pool():
    return Pool(Case("var-d16", "ams-kv:75", 1, "fp32"), "cpu")


@pytest.fixture
def context():
    measured = {"tb_s": 0.02, "tflop_s": {"fp32": 0.2, "bf16": 0.4}}
    return Context("cpu", True, measured, measure.CpuTimer(1 << 16))
