"""What a call must move and compute, and ceilings: this machine's, measured, and published ones to predict with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """Bytes and floating-point operations of one call, true lengths, no padding counted."""

    bytes: int
    flops: int


def attention_work(
    sequences: int, heads: int, kv_heads: int, head_dim: int, n: int, history: float, stored: float, itemsize: int
) -> Work:  # fmt: skip
    """q, out, current k and v once, live history once, rows stored; 4·B·H·n·(n + history)·D operations."""
    rows = 2 * heads * n + 2 * kv_heads * (n + history + stored)
    keys = n + history
    return Work(round(sequences * rows * head_dim * itemsize), round(4 * sequences * heads * n * keys * head_dim))


@dataclass(frozen=True)
class Ceilings:
    """Rates of a machine for one element type; `launch_us` is what a call takes that does nothing, 0 if unknown."""

    tb_s: float
    tflop_s: float
    launch_us: float = 0.0

    def roof_us(self, work: Work) -> float:
        """The least time `work` takes."""
        return max(self.memory_us(work), self.compute_us(work), self.launch_us)

    def memory_us(self, work: Work) -> float:
        """Time to move the bytes."""
        return work.bytes / self.tb_s * 1e-6

    def compute_us(self, work: Work) -> float:
        """Time to do the operations."""
        return work.flops / self.tflop_s * 1e-6

    def bound(self, work: Work) -> str:
        """What the least time is spent on: "memory", "compute" or "launch"."""
        times = {"memory": self.memory_us(work), "compute": self.compute_us(work), "launch": self.launch_us}
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Gpu:
    """A GPU's dense 16-bit rate and bandwidth, as its datasheet gives them."""

    name: str
    ceilings: Ceilings

    @property
    def source(self) -> str:
        """Where the figures are from."""
        return f"{self.ceilings.tflop_s:g} TFLOP/s and {self.ceilings.tb_s:g} TB/s (datasheet)"


GPUS = {
    "a100": Gpu("A100 SXM", Ceilings(2.04, 312)),
    "h100": Gpu("H100 SXM", Ceilings(3.35, 989)),
    "h200": Gpu("H200 SXM", Ceilings(4.8, 989)),
}


def measure_ceilings(device: str, quick: bool = False) -> dict[str, object]:
    """Copy bandwidth and matrix product rates of this machine, now; on a GPU the time of an empty kernel too."""
    return _gpu_ceilings() if device == "cuda" else _cpu_ceilings(quick)


def ceilings_of(measured: dict, dtype: str, launch_us: float = 0.0) -> Ceilings:
    """The ceilings for one element type out of what `measure_ceilings` found."""
    return Ceilings(measured["tb_s"], measured["tflop_s"][dtype], launch_us)


def _best(run: Call, repetitions: int) -> float:
    """Seconds of the fastest of `repetitions` runs, after two that do not count."""
    times = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _cpu_ceilings(quick: bool) -> dict[str, object]:
    elements, side = (1 << 24, 512) if quick else (1 << 26, 2048)
    source = torch.randn(elements)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), 5)
    rates = {}
    for name in ("fp32", "bf16"):
        a, b = (torch.randn(side, side).to(DTYPES[name]) for _ in range(2))
        rates[name] = 2 * side**3 / _best(partial(torch.matmul, a, b), 3) * 1e-12
    return {"tb_s": 2 * source.nbytes / copy * 1e-12, "tflop_s": rates}


def _gpu_ceilings() -> dict[str, object]:
    from benchmarks.harness.measure import CudaTimer

    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    timer = CudaTimer()

    def microseconds(call: Call, count: int = 1) -> float:
        return min(timer.run({"it": [call] * count}, 0.02, 5, 9)["it"])

    rates = {}
    copy = microseconds(lambda: target.copy_(source))
    for name, side in (("bf16", 8192), ("fp16", 8192), ("fp32", 4096)):
        a, b = (torch.randn(side, side, device="cuda", dtype=DTYPES[name]) for _ in range(2))
        rates[name] = 2 * side**3 / microseconds(partial(torch.matmul, a, b)) * 1e-6
    # By calls per graph: what a graph's own start costs is shared among them.
    launch = {str(count): microseconds(empty_kernel(), count) for count in (1, 2, 4, 8, 16)}
    return {"tb_s": 2 * source.nbytes / copy * 1e-6, "tflop_s": rates, "launch_us": launch}


def empty_kernel() -> Call:
    """A call that launches one kernel which does nothing, or next to nothing where Triton is missing."""
    word = torch.zeros(1, device="cuda")
    try:
        from benchmarks.harness.empty import nothing
    except ImportError:
        return lambda: word.fill_(0)
    return lambda: nothing[(1,)](word)
