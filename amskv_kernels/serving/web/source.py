"""Where an endpoint's images come from: an engine of this process, or whatever else keeps the same few promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from amskv_kernels.arguments import shown
from amskv_kernels.serving.engine import Engine, Load
from amskv_kernels.serving.requests import Drawn, Handle, Progress, Request

Event = Progress | Drawn  # of an image on its way: its steps, then itself


class Drawing(Protocol):
    """An image on its way. It ends with its `Drawn`, or raises why there is none."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def cancel(self) -> None:
        """Nobody waits for it; nothing where it is done."""


class Source(Protocol):
    """Draws images for an endpoint."""

    async def begin(self, request: Request) -> Drawing:
        """Ask for an image.

        Raises:
            ValueError: one that can never be drawn.
            QueueFullError: as many wait as may.
            ClosedError: it takes no more.
        """
        ...

    async def loads(self) -> Mapping[str, Load]:
        """Every engine's, by a name that it keeps."""
        ...

    async def start(self) -> None:
        """The endpoint is about to ask."""

    async def stop(self) -> None:
        """The endpoint will ask no more: finish what there is."""


class EngineDrawing:
    """What an engine's thread says of an image, for a coroutine."""

    def __init__(self, engine: Engine, request: Request) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Progress | Handle]()

        def put(event: Progress | Handle) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._handle = engine.submit(
            request.label, seed=request.seed, guidance=request.guidance, top_k=request.top_k, top_p=request.top_p,
            previews=request.previews, listener=put,
        )  # fmt: skip
        self._handle.when_done(put)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while isinstance(event := await self._events.get(), Progress):
            yield event
        yield event.result()

    def cancel(self) -> None:
        """Its pages are free from the next tick on."""
        self._handle.cancel()


class EngineSource:
    """An engine of this process, in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def begin(self, request: Request) -> Drawing:
        """As `Engine.submit`."""
        return EngineDrawing(self.engine, request)

    async def loads(self) -> Mapping[str, Load]:
        """The engine's, as "0"."""
        return {"0": self.engine.load}

    async def start(self) -> None:
        """Start the engine's thread."""
        self.engine.start()

    async def stop(self) -> None:
        """Drain the engine."""
        await asyncio.to_thread(self.engine.drain)


@dataclass(frozen=True)
class Served:
    """What an endpoint tells of its model, and what it takes where a request says nothing.

    Attributes:
        name: the model's, as requests may give it.
        width, height: of its images, in pixels.
        tokens: of every scale.
        classes: number of them; a prompt is one's number or name.
        names: class by lower-case name; several may mean one.
        vocab_size: the most that top_k may be.
        guidance, top_k, top_p: where a request has none.
    """

    name: str
    width: int
    height: int
    tokens: tuple[int, ...]
    classes: int
    names: Mapping[str, int]
    vocab_size: int
    guidance: float = 1.5
    top_k: int = 0
    top_p: float = 0.0

    @classmethod
    def of(
        cls, engine: Engine, name: str, names: Sequence[str] = (), *, guidance: float, top_k: int, top_p: float
    ) -> Served:
        """An engine's model. `names` has a line per class, several names of one parted by commas.

        Raises:
            ValueError: more or fewer names than classes, or a guidance, top_k or top_p that no request could have.
        """
        config = engine.config
        Request.checked(config, 0, 0, guidance, top_k, top_p, ())
        if names and len(names) != config.num_classes:
            raise ValueError(f"names are of {len(names)} classes; the model has {config.num_classes}")
        known: dict[str, int] = {}
        for label, line in enumerate(names):
            for part in (line, *line.split(",")):
                if part.strip():  # a class may have no name
                    known.setdefault(part.strip().lower(), label)
        height, width = (side * engine.pixels for side in config.schedule.sizes[-1])
        return cls(
            name, width, height, config.schedule.tokens, config.num_classes, known, config.vocab_size, guidance,
            top_k, top_p,
        )  # fmt: skip

    @property
    def size(self) -> str:
        """As the images API writes it."""
        return f"{self.width}x{self.height}"

    def label(self, prompt: str) -> int:
        """The class that a prompt names.

        Raises:
            ValueError: it names none.
        """
        text = prompt.strip().lower()
        if text in self.names:
            return self.names[text]
        if text.isascii() and text.isdigit() and len(text) <= len(str(self.classes)) and int(text) < self.classes:
            return int(text)
        named = ", or one's name" if self.names else ""
        raise ValueError(f"prompt is {shown(prompt)}; it must be a class, 0 … {self.classes - 1}{named}")

    def previews(self, count: int) -> tuple[int, ...]:
        """The steps, 0-based, after which so many previews are made: evenly spread over all but the last."""
        return tuple(-(-i * len(self.tokens) // (count + 1)) - 1 for i in range(1, count + 1))
