"""One engine over the processes of a sharded model: the first takes requests and decides, the others do the same.

Between two ticks the first process tells who left and who entered. Everything else follows: all have the same plan, the
same pages to give, the same generators, and in the model's layers the same sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist

from amskv_kernels.arguments import instance_of
from amskv_kernels.models import VAR, VQVAE
from amskv_kernels.models.tensor_parallel import mesh_of
from amskv_kernels.policies import Policy, parse_policy
from amskv_kernels.policies.base import check_ranks
from amskv_kernels.serving.engine import Engine
from amskv_kernels.serving.requests import CancelledError, Handle, Listener, Request

BEAT = 30.0  # seconds of idleness after which the first process says that it is there
CPU = torch.device("cpu")  # a word between ticks waits for no GPU


class Orders(NamedTuple):
    """What the first process tells before a tick."""

    left: tuple[int, ...] = ()  # places whose images were given up
    entered: tuple[Request, ...] = ()  # in their order
    end: bool = False  # no tick follows


class ShardedEngine(Engine):
    """An `Engine` of a model that `shard` has dealt to several processes; each makes one, at once and alike.

        with ShardedEngine(var, vae, "ams-kv:75", memory=2**30) as engine:
            if engine.first:
                image, tokens = engine.submit(7).result()
            else:
                engine.follow()

    The first process ticks more often than the process group's timeout, as its thread does; else the others take it for
    dead. Where a process dies or a tick fails, they cannot go on together: all images fail, and so does `follow`.

    Attributes:
        first: whether this is the process that takes requests.
        lost: what failed; None while all is well.
        when_lost: called then, in the engine's thread.

    Args:
        memory: bytes for the pages of each process.
        Everything else as of `Engine`.

    Raises:
        TypeError: what `Engine` raises.
        ValueError: a model that is not sharded, a policy that tells heads apart, a process group without the CPU, what
            `Engine` raises.
    """

    sharded: ClassVar[bool] = True
    beat: ClassVar[float | None] = BEAT

    def __init__(
        self, var: VAR, vae: VQVAE, policy: str | Policy, *, memory: int, max_images: int | None = None,
        max_waiting: int | None = None, dtype: torch.dtype | None = None, page_size: int | None = None,
    ) -> None:  # fmt: skip
        instance_of("var", var, VAR)
        mesh = mesh_of(var)
        if mesh is None:
            raise ValueError("var is not sharded; an Engine draws with it, or shard it first")
        if isinstance(policy, str):
            policy = parse_policy(policy, var.config.schedule, var.config.depth)
        check_ranks(policy, mesh.size())
        backends = str(dist.get_backend_config(mesh.get_group()))
        if "cpu:" not in backends:
            raise ValueError(
                f"var's mesh speaks over {backends}; an engine's words go over the CPU: let it be made by "
                "torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
            )
        super().__init__(
            var, vae, policy, memory=memory, max_images=max_images, max_waiting=max_waiting, dtype=dtype,
            page_size=page_size,
        )  # fmt: skip
        self.first = mesh.get_local_rank() == 0
        self.lost: Exception | None = None
        self.when_lost: Callable[[], None] | None = None
        self._over = False
        self._words = mesh.get_group()

    def submit(
        self, label: int, *, seed: int = 0, guidance: float = 1.5, top_k: int = 900, top_p: float = 0.96,
        previews: Collection[int] = (), listener: Listener | None = None,
    ) -> Handle:  # fmt: skip
        """As `Engine.submit`, in the first process.

        Raises:
            RuntimeError: in another one.
        """
        if not self.first:
            raise RuntimeError("another process of this sharded model takes the requests, the first; follow() it")
        return super().submit(
            label, seed=seed, guidance=guidance, top_k=top_k, top_p=top_p, previews=previews, listener=listener
        )  # fmt: skip

    def tick(self) -> bool:
        """As `Engine.tick`; in a process that follows it begins when the first one's does.

        Raises:
            RuntimeError: in a process that follows: the first one has died.
        """
        return not self._over and super().tick()

    def follow(self) -> None:
        """Draw what the first process draws, until its engine has drained.

        Raises:
            RuntimeError: this is the first process, or another one has died.
        """
        if self.first:
            raise RuntimeError("this process is the first, which takes the requests; the others follow")
        while not self._over:
            self.tick()

    def start(self) -> ShardedEngine:
        """As `Engine.start`; a process that follows does so in its own time."""
        if self.first:
            super().start()
        return self

    def drain(self) -> None:
        """As `Engine.drain`; then the others' `follow` returns."""
        if not self.first:
            return
        super().drain()
        if not self._over:
            self._over = True
            self._say(Orders(end=True))

    def _turn_over(self) -> None:
        if not self.first:
            self._obey()
        left, entered = self._leave(), self._admit()
        if self.first:
            self._say(Orders(tuple(left), tuple(handle.request for handle in entered.values())))
        self._enter(entered)

    def _say(self, orders: Orders) -> None:
        dist.broadcast_object_list([orders], group=self._words, group_src=0, device=CPU)

    def _obey(self) -> None:
        """Those that left or entered in the first process shall do so here."""
        heard = [Orders()]
        dist.broadcast_object_list(heard, group=self._words, group_src=0, device=CPU)
        orders = heard[0]
        for place in orders.left:
            handle = self._inside[place]
            assert handle is not None, "the processes disagree on who is inside"
            handle.finish(CancelledError("the image was cancelled"))
        self._waiting = {Handle(self, request, None): None for request in orders.entered}
        self._over = orders.end

    def _fail(self, error: Exception) -> None:
        super()._fail(error)
        self.lost, self._over = error, True
        with self._changed:
            self._open, waiting = False, list(self._waiting)
            self._waiting.clear()
        for handle in waiting:
            self._add("failed", handle.finish(error))
        if self.when_lost is not None:
            self.when_lost()
        if not self.first:
            raise error
