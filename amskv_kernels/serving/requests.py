"""What is asked of an engine, and the handle that whoever asks holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from amskv_kernels.arguments import real_number, whole_number
from amskv_kernels.models.var import VARConfig

if TYPE_CHECKING:
    from amskv_kernels.serving.engine import Engine

MOST_SEED = 2**64 - 1  # what torch.Generator takes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One image, as `VAR.generate` would draw it alone.

    Attributes:
        label: class, 0 … num_classes; the last means no class.
        seed: of the image's own generator.
        guidance: strength of classifier-free guidance; 0 runs one sequence instead of two.
        top_k: sampling limit, 0 for none.
        top_p: sampling limit, 0 for none.
        previews: steps, 0-based, after which the image so far is decoded.
    """

    label: int
    seed: int = 0
    guidance: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    previews: frozenset[int] = frozenset()

    @classmethod
    def checked(
        cls, config: VARConfig, label: object, seed: object, guidance: object, top_k: object, top_p: object,
        previews: Collection[object],
    ) -> Request:  # fmt: skip
        """A request that a model of this configuration can draw.

        Raises:
            TypeError: guidance or top_p is no number.
            ValueError: one of them is out of range; the message names it.
        """
        strength, nucleus = real_number("guidance", guidance), real_number("top_p", top_p)
        if not math.isfinite(strength):
            raise ValueError(f"guidance is {strength}; it must be finite")
        if not 0.0 <= nucleus <= 1.0:
            raise ValueError(f"top_p is {nucleus}; it must be within [0, 1], 0 for no limit")
        last = len(config.schedule) - 1
        return cls(
            label=whole_number("label", label, 0, config.num_classes),
            seed=whole_number("seed", seed, 0, MOST_SEED),
            guidance=strength,
            top_k=whole_number("top_k", top_k, 0, config.vocab_size),
            top_p=nucleus,
            previews=frozenset(whole_number("previews", step, 0, last) for step in previews),
        )

    @property
    def sequences(self) -> int:
        """2 with guidance, else 1."""
        return 2 if self.guidance else 1


class Drawn(NamedTuple):
    """A finished image."""

    image: Tensor  # (3, H, W) fp32 in [0, 1], on the CPU
    tokens: Tensor  # (schedule.total,) int64, coarsest scale first, on the CPU


class Progress(NamedTuple):
    """How far an image is."""

    steps: int  # scales done
    of: int  # scales in all
    preview: Tensor | None = None  # (3, H, W) fp32 in [0, 1] on the CPU, where the request asked for one


Listener = Callable[[Progress], None]


class CancelledError(RuntimeError):
    """The image was cancelled before it was done."""


class Handle:
    """A request on its way; made by `Engine.submit`, safe to use from any thread."""

    def __init__(self, engine: Engine, request: Request, listener: Listener | None) -> None:
        self.request = request
        self.progress = Progress(0, len(engine.plan.schedule))
        self._engine, self._listener = engine, listener
        self._future: Future[Drawn] = Future()

    @property
    def done(self) -> bool:
        """Drawn, cancelled or failed."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Drawn:
        """Wait for the image.

        Raises:
            CancelledError: it was cancelled.
            TimeoutError: it was not done within `timeout` seconds.
            Exception: what went wrong while it was drawn.
        """
        return self._future.result(timeout)

    def cancel(self) -> bool:
        """Give up the image; its pages are free from the next tick on. False where it is done already."""
        return self._engine.cancel(self)

    def when_done(self, call: Callable[[Handle], None]) -> None:
        """Call with this handle once it is done, in the engine's thread, or at once if it is."""
        self._future.add_done_callback(lambda _: call(self))

    def advance(self, preview: Tensor | None) -> None:
        """One more step is done; the engine's to call. A listener that raises hears no more."""
        self.progress = Progress(self.progress.steps + 1, self.progress.of, preview)
        if self._listener is None:
            return
        try:
            self._listener(self.progress)
        except Exception:
            _log.exception("the listener of %s failed", self)
            self._listener = None

    def finish(self, outcome: Drawn | Exception) -> bool:
        """Settle the result, the engine's to call; False where it is settled already."""
        try:
            if isinstance(outcome, Exception):
                self._future.set_exception(outcome)
            else:
                self._future.set_result(outcome)
        except InvalidStateError:
            return False
        return True

    def __repr__(self) -> str:
        steps, of, _ = self.progress
        return f"Handle(label {self.request.label}, seed {self.request.seed}, {steps} of {of})"
