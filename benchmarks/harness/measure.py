"""Timing: contestants take turns, caches are cold, order reverses, short calls go through CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, Protocol

import torch

Call = Callable[[], object]
NONE: frozenset[str] = frozenset()
Times = dict[str, list[float]]  # contestant: microseconds of one call, round by round

COLD_CPU_BYTES = 40 << 20  # overwritten before every timing: more than a processor's share of the last-level cache


class Timer(Protocol):
    """Times contestants on one device."""

    def run(
        self, contestants: dict[str, Sequence[Call]], seconds: float, least: int, most: int, eager: Set[str] = NONE
    ) -> Times:  # fmt: skip
        """Rounds in which each contestant makes all its calls once, from cold caches.

        Args:
            contestants: each one's calls, on different data.
            seconds: of measuring for each contestant, roughly.
            least: rounds at least.
            most: rounds at most.
            eager: contestants that wait for the device, so that no graph can hold them.
        """
        ...

    def how(self, name: str) -> str:
        """How the contestant was timed in the last run: "wall", "graph" or "events"."""
        ...


def timer_for(device: str) -> Timer:
    """The timer of a device type."""
    return CudaTimer() if device == "cuda" else CpuTimer()


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and repetitions."""
    first, middle, third = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return {"median_us": middle, "q1_us": first, "q3_us": third, "reps": len(times)}


def ratio(other: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long the other took: the median over the rounds both took part in."""
    return statistics.median(theirs / own for theirs, own in zip(other, ours, strict=True))


def rounds(slowest_us: float, seconds: float, least: int, most: int) -> int:
    """Rounds that fit the time."""
    return max(least, min(most, int(seconds * 1e6 / max(slowest_us, 1e-3))))


class CpuTimer:
    """Wall time; a buffer larger than the caches is overwritten before each timing."""

    def __init__(self, cold_bytes: int = COLD_CPU_BYTES) -> None:
        self._buffer = torch.zeros(max(1, cold_bytes // 4))

    def how(self, name: str) -> str:
        """Always "wall"."""
        return "wall"

    def run(
        self, contestants: dict[str, Sequence[Call]], seconds: float, least: int, most: int, eager: Set[str] = NONE
    ) -> Times:  # fmt: skip
        """See `Timer.run`."""
        first = {name: self._once(calls) for name, calls in contestants.items()}
        count = rounds(max(len(contestants[name]) * us for name, us in first.items()), seconds, least, most)
        times: Times = {name: [] for name in contestants}
        for i in range(count):
            for name in list(contestants)[:: -1 if i % 2 else 1]:
                times[name].append(self._once(contestants[name]))
        return times

    def _once(self, calls: Sequence[Call]) -> float:
        self._buffer.add_(1)
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)


class CudaTimer:
    """Events around the replay of a CUDA graph of all calls; events around the calls where capture fails.

    The overwriting of a buffer twice the L2 cache's size, queued before each timing, also hides the host's work.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.empty(2 * max(size, 32 << 20), dtype=torch.uint8, device="cuda")
        self._how: dict[str, str] = {}

    def how(self, name: str) -> str:
        """ "graph", or "events" where capture failed."""
        return self._how[name]

    def run(
        self, contestants: dict[str, Sequence[Call]], seconds: float, least: int, most: int, eager: Set[str] = NONE
    ) -> Times:  # fmt: skip
        """See `Timer.run`."""
        runs = {name: self._prepare(name, calls, name not in eager) for name, calls in contestants.items()}
        first = {name: self._collect(self._queue(run)) for name, run in runs.items()}
        count = rounds(max(first.values()), seconds, least, most)
        queued: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for i in range(count):
            for name in list(runs)[:: -1 if i % 2 else 1]:
                queued[name].append(self._queue(runs[name]))
        return {
            name: [self._collect(pair) / len(contestants[name]) for pair in pairs] for name, pairs in queued.items()
        }

    def _prepare(self, name: str, calls: Sequence[Call], capture: bool) -> Call:
        """A graph's replay, or the calls themselves."""

        def all_calls() -> None:
            for call in calls:
                call()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            all_calls()
            all_calls()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._how[name] = "events"
        if not capture:
            return all_calls
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                all_calls()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return all_calls
        self._how[name] = "graph"
        return graph.replay

    def _queue(self, run: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.zero_()
        start.record()
        run()
        end.record()
        return start, end

    @staticmethod
    def _collect(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        pair[1].synchronize()
        return 1e3 * pair[0].elapsed_time(pair[1])
