"""The engine: images at different steps in one batch, admitted by what their plan will hold at every coming tick."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from amskv_kernels.arguments import instance_of, whole_number
from amskv_kernels.models import VAR, VQVAE, VARConfig
from amskv_kernels.models.tensor_parallel import ranks_of
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Policy, parse_policy
from amskv_kernels.serving.admission import PAIR, Admission
from amskv_kernels.serving.attention import PoolAttention
from amskv_kernels.serving.batch import Group, Mixtures, groups_of
from amskv_kernels.serving.forward import PackedVAR
from amskv_kernels.serving.pool import UnitPool
from amskv_kernels.serving.requests import CancelledError, Drawn, Handle, Listener, Request
from amskv_kernels.serving.units import PlanUnits

MOST_IMAGES = 1024  # places, unless told otherwise: their latents and modulations are made at the start
SMOOTHING = 0.1  # weight of the newest tick in the mean time of one
_log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many requests wait as may; `seconds` until one more is likely to find room."""

    def __init__(self, waiting: int, seconds: float) -> None:
        super().__init__(f"{waiting} images wait already, as many as may; try again in {seconds:.0f} s")
        self.waiting, self.seconds = waiting, seconds

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[int, float]]:
        """It may cross processes."""
        return QueueFullError, (self.waiting, self.seconds)


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


class Load(NamedTuple):
    """An engine as of its last tick."""

    waiting: int  # images, now
    active: int  # images inside
    used: int  # units that someone held
    planned: int  # units that were booked
    units: int  # of the pool
    ticks: int  # so far
    drawn: int  # images finished so far
    cancelled: int
    failed: int
    seconds: float  # a tick takes, on average
    busy: float  # seconds of all ticks
    coming: tuple[int, ...]  # units booked for this tick and those that follow


class Engine:
    """Draws images with one VAR; each as it would be drawn alone.

    Every `tick` runs one step of every image inside. A request enters in order of arrival, as soon as the pool holds
    all that it and those inside will need at any coming tick, at the `pace` the pool can go on with for ever. So
    nothing is ever taken back, moved or out of memory.

    Args:
        var: the transformer, in evaluation mode on the device that serves.
        vae: its VQ-VAE beside it.
        policy: what the cache keeps: a policy, as text for `parse_policy` or made; whole scales only.
        memory: bytes for pages.
        max_images: images inside at most; by default as many as the pool takes at its pace.
        max_waiting: requests that may wait; None for any number.
        dtype: of the pages: the model's, unless it is to be int8.
        page_size: 16, 32, 64 or 128; by default what suits the schedule.

    Raises:
        TypeError: an argument of another type.
        ValueError: a policy that cannot be planned for this model, or memory for less than one sequence.
    """

    sharded: ClassVar[bool] = False  # whether the model may be
    beat: ClassVar[float | None] = None  # seconds of idleness after which it ticks all the same

    def __init__(
        self, var: VAR, vae: VQVAE, policy: str | Policy, *, memory: int, max_images: int | None = None,
        max_waiting: int | None = None, dtype: torch.dtype | None = None, page_size: int | None = None,
    ) -> None:  # fmt: skip
        instance_of("var", var, VAR)
        instance_of("vae", vae, VQVAE)
        if ranks_of(var) > 1 and not self.sharded:
            raise ValueError(f"var is sharded over {ranks_of(var)} processes; a ShardedEngine draws with it")
        config = var.config
        chosen = parse_policy(policy, config.schedule, config.depth) if isinstance(policy, str) else policy
        self.plan = CachePlan.build(config.schedule, chosen, config.depth, page_size, var.kv_heads)
        units = PlanUnits(self.plan)
        self.max_waiting = None if max_waiting is None else whole_number("max_waiting", max_waiting, 0)
        most = MOST_IMAGES if max_images is None else whole_number("max_images", max_images, 1)
        weight = var.word_embed.weight
        self.pool = UnitPool(
            units, memory=memory, rows=PAIR * most, kv_heads=var.kv_heads, head_dim=config.head_dim,
            dtype=dtype or weight.dtype, device=weight.device,
        )  # fmt: skip
        self.admission = Admission(units.curve, self.pool.units)
        pace = self.admission.pace
        self.max_images = min(most, pace.sequences * -(-len(config.schedule) // pace.ticks))
        self._model = PackedVAR(var, vae, self.max_images)
        self._attention = PoolAttention(self.pool, weight.dtype)
        self._mixtures = Mixtures(self.pool, config.schedule.offsets)
        self._steps = np.full(self.max_images, -1)
        self._inside: list[Handle | None] = [None] * self.max_images
        self._generators: list[torch.Generator | None] = [None] * self.max_images
        self._waiting: dict[Handle, None] = {}  # in order of arrival
        self._changed = threading.Condition()
        self._ticking = threading.Lock()
        self._open = True
        self._thread: threading.Thread | None = None
        self._load = Load(0, 0, 0, 0, self.pool.units, 0, 0, 0, 0, 0.0, 0.0, ())

    def submit(
        self, label: int, *, seed: int = 0, guidance: float = 1.5, top_k: int = 900, top_p: float = 0.96,
        previews: Collection[int] = (), listener: Listener | None = None,
    ) -> Handle:  # fmt: skip
        """Ask for one image.

        Args:
            label: class, 0 … num_classes; the last means no class.
            seed: of the image's own generator; `VAR.generate` with one so seeded draws the same image.
            guidance: `cfg` of `VAR.generate`; 0 takes half the pages.
            top_k, top_p: sampling limits, 0 for none.
            previews: steps, 0-based, after which the listener gets the image so far.
            listener: called with a `Progress` after every step, in the engine's thread; it must not wait.

        Raises:
            TypeError: guidance or top_p is no number.
            ValueError: an argument out of range, or an image that the pool can never hold.
            QueueFullError: `max_waiting` requests wait.
            ClosedError: the engine drains or is closed.
        """
        request = Request.checked(self.config, label, seed, guidance, top_k, top_p, previews)
        refused = self.admission.never(request.sequences)
        if refused is not None:
            raise ValueError(refused)
        handle = Handle(self, request, listener)
        with self._changed:
            if not self._open:
                raise ClosedError("the engine takes no more requests")
            if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
                raise QueueFullError(len(self._waiting), self.wait_seconds())
            self._waiting[handle] = None
            self._changed.notify_all()
        return handle

    def cancel(self, handle: Handle) -> bool:
        """Give up an image; what it holds is free from the next tick on. False where it is done already."""
        cancelled = handle.finish(CancelledError("the image was cancelled"))
        with self._changed:
            self._waiting.pop(handle, None)
            self._add("cancelled", cancelled)
            self._changed.notify_all()
        return cancelled

    @property
    def config(self) -> VARConfig:
        """The model's."""
        return self._model.var.config

    @property
    def pixels(self) -> int:
        """Of an image per place of its last map, along each side."""
        return self._model.vae.config.patch

    @property
    def load(self) -> Load:
        """Where the engine stands."""
        with self._changed:
            coming = tuple(self.admission.coming.tolist())
            return self._load._replace(waiting=len(self._waiting), coming=coming)

    def wait_seconds(self) -> float:
        """About how long a request that came now would wait before it enters."""
        pace = self.admission.pace
        ticks = PAIR * (len(self._waiting) + 1) / pace.sequences * pace.ticks
        return ticks * self._load.seconds

    def tick(self) -> bool:
        """Admit, run one step of every image inside, and let those go that are done; False where there is none.

        Whatever fails here fails the images inside, whose handles say why; those that wait come next.
        """
        with self._ticking, torch.inference_mode():
            start = time.perf_counter()
            try:
                self._turn_over()
                groups = groups_of(self._steps, self._guided(), self.plan.schedule.tokens)
                if not groups:
                    self._note(active=0, used=0, planned=0)
                    return False
                self._run(groups)
            except Exception as error:
                _log.exception("a tick of %d images failed", sum(handle is not None for handle in self._inside))
                self._fail(error)
            self._count(time.perf_counter() - start)
            return True

    def _guided(self) -> npt.NDArray[np.bool_]:
        return np.array([handle is not None and handle.request.sequences == PAIR for handle in self._inside])

    def _turn_over(self) -> None:
        """Those leave and enter that may."""
        self._leave()
        self._enter(self._admit())

    def _leave(self) -> list[int]:
        """Those that were cancelled since the last tick; their places."""
        left = []
        for place, handle in enumerate(self._inside):
            if handle is not None and handle.done:
                sequences, step = handle.request.sequences, int(self._steps[place])
                self.pool.abandon(2 * place + np.arange(sequences), step)
                self.admission.leave(sequences, step)
                self._free(place)
                left.append(place)
        return left

    def _admit(self) -> dict[int, Handle]:
        """Those that may enter, in order of arrival, by their new places: none passes another."""
        free = np.flatnonzero(self._steps < 0).tolist()
        entered: dict[int, Handle] = {}
        while free:
            with self._changed:
                handle = next(iter(self._waiting), None)
                if handle is None or not self.admission.enter(handle.request.sequences):
                    break
                del self._waiting[handle]
                place = free.pop(0)
                self._inside[place], self._steps[place] = handle, 0
                entered[place] = handle
        return entered

    def _enter(self, entered: dict[int, Handle]) -> None:
        for place, handle in entered.items():
            self._generators[place] = torch.Generator(self._model.device).manual_seed(handle.request.seed)
            self._model.enter(place, handle.request.label)

    def _run(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.pool.begin(np.concatenate(group.members), group.step)
        active, planned = sum(len(group.places) for group in groups), int(self.admission.coming[0])
        self._note(active=active, used=self.pool.used, planned=planned)
        mixture = self._mixtures.of(groups)
        requests = [None if handle is None else handle.request for handle in self._inside]
        mixture.fill(groups, requests, self.config.vocab_size)
        self._model.step(groups, mixture, self._generators, self._attention)
        for group in groups:
            self.pool.end(np.concatenate(group.members), group.step)
            self._steps[group.places] += 1
        self.admission.advance()
        self._tell(groups)

    def _tell(self, groups: Sequence[Group]) -> None:
        """Progress to everyone, previews and images to those whose they are."""
        last = len(self.plan.schedule) - 1
        inside = {place: group.step for group in groups for place in group.places.tolist()}
        handles = {place: handle for place in inside if (handle := self._inside[place]) is not None}
        shown = [p for p, step in inside.items() if step == last or step in handles[p].request.previews]
        images = dict(zip(shown, self._model.decode(shown), strict=True)) if shown else {}
        for place, handle in handles.items():
            step = inside[place]
            handle.advance(images.get(place) if step in handle.request.previews else None)
            if step == last:
                self._add("drawn", handle.finish(Drawn(images[place], self._model.tokens[place].clone().cpu())))
                self._free(place)

    def _free(self, place: int) -> None:
        self._inside[place], self._generators[place], self._steps[place] = None, None, -1

    def _fail(self, error: Exception) -> None:
        """Everyone inside; the pool and its book begin anew."""
        for place, handle in enumerate(self._inside):
            if handle is not None:
                self._add("failed", handle.finish(error))
                self._free(place)
        self.pool.clear()
        self.admission.clear()

    def _count(self, seconds: float) -> None:
        mean = self._load.seconds
        self._note(seconds=seconds if not mean else mean + SMOOTHING * (seconds - mean))
        self._add("ticks", 1)
        self._add("busy", seconds)

    def _note(self, **values: float) -> None:
        with self._changed:
            self._load = self._load._replace(**values)  # type: ignore[arg-type]

    def _add(self, name: str, count: float) -> None:
        with self._changed:
            self._note(**{name: getattr(self._load, name) + count})

    def start(self) -> Engine:
        """Tick in a thread of the engine's own, whenever there is something to do."""
        with self._changed:
            if self._thread is None and self._open:
                self._thread = threading.Thread(target=self._work, name="amskv-engine", daemon=True)
                self._thread.start()
        return self

    def _work(self) -> None:
        while True:
            if self.tick():
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._open, self.beat)
                if not self._waiting and not self._open:
                    return

    def drain(self) -> None:
        """Take no more requests, finish all there are, and end the thread."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        while self.tick():
            pass

    def close(self) -> None:
        """Take no more requests, cancel all there are, and end the thread."""
        with self._changed:
            self._open = False
            handles = [*self._waiting, *(handle for handle in self._inside if handle is not None)]
        for handle in handles:
            handle.cancel()
        self.drain()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()
