"""Processes of one gloo group that run functions of the tests, as torchrun's would."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT = 120  # seconds that a collective waits for the other processes: a loaded machine starts them slowly


class Ranks:
    """`count` processes; `run` calls a function in all of them at once.

    Args:
        count: processes.
    """

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor.parallel", "amskv_kernels.serving"])
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name) / "meeting"
        self.processes, self._ends = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, str(meeting)), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._ends.append(ours)

    def begin(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function(mesh, *arguments)` of an importable module in every process."""
        for end in self._ends:
            end.send((function, arguments))

    def results(self) -> list[Any]:
        """What each process gave, its exception where it raised, None where it died."""
        found: list[Any] = [None] * len(self._ends)
        open_ends = dict(zip(self._ends, range(len(found)), strict=True))
        while open_ends:
            for end in wait(list(open_ends)):
                assert isinstance(end, Connection)
                rank = open_ends.pop(end)
                try:
                    found[rank] = end.recv()
                except EOFError:
                    found[rank] = None
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`begin`, and what each process gave; raises what the first of them raised."""
        self.begin(function, *arguments)
        found = self.results()
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found

    def close(self) -> None:
        """End them all."""
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(end: Connection, rank: int, count: int, meeting: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timeout)
    mesh: DeviceMesh = init_device_mesh("cpu", (count,))
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send(function(mesh, *arguments))
        except BaseException as error:
            traceback.print_exc()
            end.send(error)
