"""One command in several processes, as torchrun starts them: a model that is sharded over all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from amskv_kernels.cli.arguments import default_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = 300  # seconds that a process waits for the others in the middle of an image


@contextmanager
def processes(device: str | None) -> Iterator[DeviceMesh | None]:
    """All processes of the command, None where it runs in one.

    Args:
        device: "cpu", or "cuda" for a GPU of each process's own; None for GPUs where there are some.

    Raises:
        ValueError: a GPU by its number, or fewer GPUs than processes.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        yield None
        return
    kind = torch.device(device or default_device())
    if kind.index is not None:
        raise ValueError(
            f"--device is {device}; among several processes each takes a GPU of its own: give cuda, or cpu"
        )
    if kind.type == "cuda":
        number, there = dist.get_node_local_rank(), torch.cuda.device_count()
        if number >= there:
            raise ValueError(f"--device is cuda; torch sees {there} GPUs for process {number} of this machine, from 0")
        torch.cuda.set_device(number)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(timeout=timedelta(seconds=PATIENCE))
    yield dist.device_mesh.init_device_mesh(kind.type, (dist.get_world_size(),))
    if ours:  # and all went well: after a failure it would wait for processes that may be gone
        dist.destroy_process_group()


def check_alone(mesh: DeviceMesh | None) -> None:
    """Raise ValueError where a command that knows of no others was started in several processes."""
    import torch.distributed as dist

    if mesh is None and dist.is_available() and dist.is_torchelastic_launched():
        raise ValueError("this command runs in one process; start it without torchrun")


def each_of(mesh: DeviceMesh | None) -> str:
    """What a line about bytes says of several processes."""
    return "" if mesh is None else f" in each of {mesh.size()} processes"


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this is the process that speaks and writes."""
    return mesh is None or mesh.get_local_rank() == 0
