"""Ticks of one mixture as a CUDA graph: captured the second time the mixture comes, replayed from then on."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import torch

from amskv_kernels.serving.batch import Mixture


class Graphs:
    """The graphs of the mixtures that have come more than once; on a CPU a tick is just run.

    A graph reads and writes the addresses that its capture saw: a mixture's tables, the pool, the images' state. So
    whoever moves one of them calls `clear`. Graphs share their working memory, since only one runs at a time.

    Args:
        device: that runs the ticks.
        alone: whether no other process takes part in them; what passes between processes is not captured.
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        self._captures = alone and device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        """Forget all graphs."""
        self._seen: WeakSet[Mixture] = WeakSet()
        self._graphs: WeakKeyDictionary[Mixture, torch.cuda.CUDAGraph] = WeakKeyDictionary()

    def run(self, mixture: Mixture, tick: Callable[[], None]) -> None:
        """Run a tick, whose calls must depend on nothing but the mixture."""
        if not self._captures:
            return tick()
        if mixture not in self._seen:  # compiles what there is to compile
            self._seen.add(mixture)
            return tick()
        if mixture not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            with torch.cuda.graph(graph, pool=pool):
                tick()
            self._graphs[mixture] = graph
        self._graphs[mixture].replay()
