"""What stands before a kernel: microseconds from `attend` to the launch, and dispatcher calls per attention module.

Triton is measured without a GPU: its kernels are compiled for one, and the launch itself is stubbed out. That needs a
process of its own (`python -m benchmarks.suites.host`), whose driver is a stub. The library's CPU kernels are left out
of its calls. Plain PyTorch is measured whole, on the smallest call there is: one token, one head, no history.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amskv_kernels import CachePlan, Full, PagedKVCache, ScaleSchedule, ops
from amskv_kernels.cli import console
from amskv_kernels.ops.backends.library import cpu, planned
from amskv_kernels.ops.checks import PlannedAttn
from benchmarks.harness import peers
from benchmarks.harness.cases import Case, layer_kinds
from benchmarks.harness.inputs import Pool, UnavailableError
from benchmarks.harness.results import Row
from benchmarks.harness.tasks import Context, Task
from benchmarks.suites.module import Layer

LAYERS, HEADS = 4, 4
REPETITIONS = 60
MODELS = ("var-d16", "infinity-2b@infinity-0.25m-1.000")
HOPPER = (90, 132)  # compute capability and multiprocessors that the stub has


def tasks(context: Context) -> Iterator[Task]:
    """One row per backend that serves a CPU, Triton up to its launch, and the modules' dispatcher calls."""
    for name in ("triton", *(each for each in peers.backends("cpu")[1] if each != "triton")):
        yield Task(f"host/attend/{name}", 10.0 if name == "triton" else 1.0, lambda name=name: attend_row(name))
    for model in MODELS:
        case = Case(model, "full", 1, "fp32")
        yield Task(f"host/dispatches/{model}", 5.0, lambda case=case: dispatch_row(case, context.device))


def attend_row(name: str) -> Row:
    """Microseconds of one `attend`.

    Raises:
        UnavailableError: Triton does not compile here.
    """
    if name == "triton":
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.suites.host"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"Triton does not compile here: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)
    if name == "cpu":

        def without_kernel(call: PlannedAttn) -> Callable[..., Tensor]:
            return planned(torch.ops.amskv.attn_cpu.default, call, cpu.LEAVE_REST, "none")

        with ops.backend(name), mock.patch.object(cpu, "prepared_attn", without_kernel):
            us = measured(ScaleSchedule.named("var-256"), HEADS)
        return {"suite": "host", "kind": "attend", "backend": name, "up_to": "the kernel", "us": us}
    with ops.backend(name):
        us = measured(ScaleSchedule([(1, 1)]), 1)
    return {"suite": "host", "kind": "attend", "backend": name, "up_to": "the end of a call of one token", "us": us}


def measured(schedule: ScaleSchedule, heads: int) -> float:
    """Median microseconds of an `attend` over the generations of a small model, after the first."""
    plan = CachePlan.build(schedule, Full(), LAYERS)
    cache = PagedKVCache(plan, batch=2, kv_heads=heads, head_dim=64, dtype=torch.bfloat16, device="cpu")
    shape = {"dtype": torch.bfloat16, "device": "cpu"}
    steps = [torch.randn(2, n, 3 * heads, 64, **shape).split(heads, dim=2) for n in schedule.tokens]
    seconds = []
    with torch.inference_mode():
        for _ in range(REPETITIONS):
            cache.reset()
            began = time.perf_counter()
            for q, k, v in steps:
                for layer in range(LAYERS):
                    cache.attend(layer, q, k, v)
            seconds.append((time.perf_counter() - began) / (len(steps) * LAYERS))
    return round(1e6 * statistics.median(seconds[1:]), 2)


class _Dispatches(TorchDispatchMode):
    """Counts what reaches a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **kwargs or {})


def dispatch_row(case: Case, device: str) -> Row:
    """Dispatcher calls of one layer's norm, rotation, cache and attention per step, stock's and ours."""
    layer = Layer(Pool(case, device), layer_kinds(case)[0][0])
    steps = len(case.shape.schedule)
    counts = {"ours": round(_count(layer.ours) / steps, 1), "stock": round(_count(layer.stock) / steps, 1)}
    backend = ops.choose("attn", device).backend
    return {"suite": "host", "kind": "dispatches", "model": case.model, "backend": backend, **counts}


def _count(call: Callable[[], Any]) -> int:
    with _Dispatches() as mode:
        call()
    return mode.count


class _Driver:
    """A Triton driver whose kernels are compiled and loaded, but never run."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", HOPPER[0], 32)


def main() -> int:
    """Print Triton's row."""
    from triton.runtime import driver

    driver.set_active(_Driver())
    from amskv_kernels.ops.backends.triton import attn, backend
    from amskv_kernels.ops.backends.triton.common import Device

    with (
        mock.patch.object(backend, "unavailable", lambda *_: None),
        mock.patch.object(attn, "describe", lambda _: Device(*HOPPER)),
        ops.backend("triton"),
    ):
        us = measured(ScaleSchedule.named("var-256"), HEADS)
    print(json.dumps({"suite": "host", "kind": "attend", "backend": "triton", "up_to": "the launch", "us": us}))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
