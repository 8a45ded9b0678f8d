"""The endpoint: OpenAI's images API over a source of images, on FastAPI."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from importlib import resources
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from PIL import Image as Pictures
from starlette.types import Receive, Scope, Send
from torch import Tensor

from amskv_kernels.arguments import shown
from amskv_kernels.serving import requests
from amskv_kernels.serving.engine import ClosedError, QueueFullError
from amskv_kernels.serving.requests import MOST_SEED, Drawn
from amskv_kernels.serving.web.guards import BodyLimit, RefusedError, bearer, handle_errors
from amskv_kernels.serving.web.metrics import Metrics
from amskv_kernels.serving.web.schema import (
    CompletedImage,
    ErrorBody,
    Health,
    Image,
    ImageRequest,
    Images,
    Model,
    Models,
    PartialImage,
    Usage,
)
from amskv_kernels.serving.web.source import Drawing, Event, Served, Source
from amskv_kernels.version import __version__

SIGN_OF_LIFE = 15.0  # seconds after which a silent stream says so: proxies drop what is silent for a minute
CLIENT_GONE = 499  # what nobody reads
RANDOM_SEED_BITS = 32  # of a request without one: a seed that any JSON reader keeps
PAGE_MAY = (  # load nothing from anywhere else
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)
T = TypeVar("T")
_log = logging.getLogger(__name__)


def create_app(served: Served, source: Source, *, key: str | None = None) -> FastAPI:
    """The application.

    Args:
        served: what it says of the model.
        source: draws the images; started and stopped with the application.
        key: what requests to /v1 must bear, None for nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await source.start()
        yield
        await source.stop()

    app = FastAPI(title="amskv_kernels", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    endpoint = Endpoint(served, source)
    guarded: dict[str, Any] = {
        "dependencies": [] if key is None else [Depends(bearer(key))],
        "responses": {"4XX": {"model": ErrorBody}},
    }
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
    app.add_api_route(
        "/v1/images/generations", endpoint.generate, methods=["POST"], response_model=Images,
        **(guarded | {"responses": guarded["responses"] | streamed}),
    )  # fmt: skip
    app.add_api_route("/v1/models", endpoint.models, response_model=Models, **guarded)
    app.add_api_route("/v1/models/{name}", endpoint.model, response_model=Model, **guarded)
    app.add_api_route("/health", endpoint.health, response_model=Health)
    app.add_api_route("/metrics", endpoint.scrape, response_class=Response)
    app.add_api_route("/", endpoint.page, response_class=HTMLResponse, include_in_schema=False)
    handle_errors(app, endpoint.metrics.refuse)
    app.add_middleware(BodyLimit)
    return app


class DrawingResponse(StreamingResponse):
    """Server-sent events of drawings, which are given up however it ends: a client may go away before the first event
    is asked for, and then nothing of what makes the events ever runs."""

    def __init__(self, events: AsyncIterator[str], drawings: Sequence[Drawing]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._drawings = drawings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for drawing in self._drawings:
                drawing.cancel()


class Endpoint:
    """The routes."""

    def __init__(self, served: Served, source: Source) -> None:
        self.served, self.source = served, source
        self.metrics = Metrics()
        self._created = int(time.time())

    async def models(self) -> Models:
        """The model served."""
        return Models(data=[await self.model(self.served.name)])

    async def model(self, name: str) -> Model:
        """The model served, where it is meant."""
        self._check_model(name, 404)
        return Model(id=self.served.name, created=self._created)

    async def health(self) -> Health:
        """That requests are taken: a server that stops hears no more of them."""
        return Health()

    async def scrape(self) -> Response:
        """Prometheus metrics."""
        return Response(self.metrics.text(await self.source.loads()), media_type="text/plain; version=0.0.4")

    async def page(self) -> HTMLResponse:
        """Draws images scale by scale, and shows the pool."""
        text = (resources.files("amskv_kernels.serving.web") / "page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_MAY})

    async def generate(self, body: ImageRequest, request: Request) -> Any:
        """Draw images; with `stream`, as server-sent events while they grow."""
        start, asked = time.perf_counter(), self._asked(body)
        drawings = await self._begin(asked)
        if body.stream:
            events = self._events(drawings, asked, start)
            return DrawingResponse(events, drawings)
        try:
            drawn = await _unless_gone(request, self._all(drawings, start))
        finally:
            for one in drawings:
                one.cancel()
        if drawn is None:
            return Response(status_code=CLIENT_GONE)
        data = [Image(b64_json=await _png(own.image), seed=one.seed) for own, one in zip(drawn, asked, strict=True)]
        usage = Usage.of(len(data), sum(self.served.tokens))
        return Images(created=int(time.time()), data=data, size=self.served.size, usage=usage)

    def _asked(self, body: ImageRequest) -> list[requests.Request]:
        """The images that a request means."""
        served, count, previews = self.served, body.n or 1, body.partial_images or 0
        self._check_model(body.model or served.name, 400)
        if body.size not in (None, "auto", served.size):
            raise RefusedError(400, f"size is {shown(body.size)}; it must be {served.size} or auto", "size")
        if previews and not body.stream:
            raise RefusedError(400, f"partial_images is {previews}; it needs stream", "partial_images")
        for name, value, most in (
            ("partial_images", previews, len(served.tokens) - 1), ("top_k", body.top_k or 0, served.vocab_size)
        ):  # fmt: skip
            if value > most:
                raise RefusedError(400, f"{name} is {value}; it must be at most {most}", name)
        try:
            label = served.label(body.prompt)
        except ValueError as error:
            raise RefusedError(400, str(error), "prompt") from error
        seed = secrets.randbits(RANDOM_SEED_BITS) if body.seed is None else body.seed
        guidance = served.guidance if body.guidance is None else body.guidance
        top_k = served.top_k if body.top_k is None else body.top_k
        top_p = served.top_p if body.top_p is None else body.top_p
        shown_after = frozenset(served.previews(previews))
        return [
            requests.Request(label, (seed + i) % (MOST_SEED + 1), guidance, top_k, top_p, shown_after)
            for i in range(count)
        ]

    def _check_model(self, name: str, status: int) -> None:
        if name != self.served.name:
            message = f"model is {shown(name)}; it must be {shown(self.served.name)}"
            raise RefusedError(status, message, "model", "model_not_found")

    async def _begin(self, asked: Sequence[requests.Request]) -> list[Drawing]:
        """All of them, or none."""
        begun: list[Drawing] = []
        try:
            for one in asked:
                begun.append(await self.source.begin(one))
        except BaseException as error:  # a client that goes away meanwhile, too
            for drawing in begun:
                drawing.cancel()
            if isinstance(error, ValueError):  # the image can never enter; without guidance it would take half as much
                raise RefusedError(400, str(error), "guidance") from error
            if isinstance(error, Exception):
                raise _refusal(error) from error
            raise
        return begun

    async def _all(self, drawings: Sequence[Drawing], start: float) -> list[Drawn]:
        return await asyncio.gather(*(self._last(one, start) for one in drawings))

    async def _last(self, drawing: Drawing, start: float) -> Drawn:
        async for event in drawing:
            if isinstance(event, Drawn):
                self.metrics.image_seconds.observe(time.perf_counter() - start)
                return event
        raise RuntimeError("a drawing ended without its image")

    async def _events(
        self, drawings: Sequence[Drawing], asked: Sequence[requests.Request], start: float
    ) -> AsyncIterator[str]:  # fmt: skip
        """Server-sent events."""
        shown_of = [0] * len(drawings)
        try:
            async for found in _merged(drawings, SIGN_OF_LIFE):
                if found is None:
                    yield ": waiting\n\n"
                    continue
                index, event = found
                image = event.image if isinstance(event, Drawn) else event.preview
                if image is None:
                    continue
                about: dict[str, Any] = {
                    "b64_json": await _png(image), "created_at": int(time.time()), "size": self.served.size,
                    "seed": asked[index].seed, "index": index,
                }  # fmt: skip
                if isinstance(event, Drawn):
                    self.metrics.image_seconds.observe(time.perf_counter() - start)
                    yield _sent(CompletedImage(**about, usage=Usage.of(1, sum(self.served.tokens))))
                else:
                    yield _sent(PartialImage(**about, partial_image_index=shown_of[index], step=event.steps))
                    shown_of[index] += 1
        except Exception as error:
            _log.exception("a stream broke off")
            yield f"event: error\ndata: {_refusal(error).body.model_dump_json()}\n\n"


async def _merged(drawings: Sequence[Drawing], silence: float) -> AsyncIterator[tuple[int, Event] | None]:
    """Everyone's events with their numbers, as they come, and None whenever there was none for so many seconds."""
    queue = asyncio.Queue[tuple[int, Event] | Exception]()

    async def pump(index: int, drawing: Drawing) -> None:
        try:
            async for event in drawing:
                queue.put_nowait((index, event))
                if isinstance(event, Drawn):
                    return
            raise RuntimeError("a drawing ended without its image")
        except Exception as error:
            queue.put_nowait(error)

    pumps, left = [asyncio.ensure_future(pump(*one)) for one in enumerate(drawings)], len(drawings)
    try:
        while left:
            try:
                found = await asyncio.wait_for(queue.get(), silence)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(found, Exception):
                raise found
            left -= isinstance(found[1], Drawn)
            yield found
    finally:
        for one in pumps:
            one.cancel()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` comes to; None, and `work` cancelled, once the client has gone away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    both = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return await both[0] if both[0].done() else None
    finally:
        for one in both:
            one.cancel()


def _refusal(error: Exception) -> RefusedError:
    """What the endpoint says of an error of its source."""
    if isinstance(error, QueueFullError):
        return RefusedError(429, str(error), code="queue_full", retry_after=error.seconds)
    if isinstance(error, ClosedError):
        return RefusedError(503, str(error), code="draining")
    return RefusedError(500, "the image could not be drawn", code="failed")


async def _png(image: Tensor) -> str:
    """(3, H, W) in [0, 1] as a PNG in base64, made beside the event loop."""
    return await asyncio.to_thread(_encoded, image)


def _encoded(image: Tensor) -> str:
    pixels, file = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy(), io.BytesIO()
    Pictures.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _sent(event: PartialImage | CompletedImage) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
