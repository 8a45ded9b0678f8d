"""The endpoint over replicas of an engine, as a Ray Serve application; needs the extras `serve` and `ray`.

    serve.run(application(make, replicas=2))

An image is determined by its request, seed included. So where a replica dies, the endpoint asks another for the image
anew, and leaves out what it has told already: nobody notices but by the time it takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from amskv_kernels.serving.engine import Engine, Load
from amskv_kernels.serving.requests import Drawn, Progress, Request
from amskv_kernels.serving.web.app import create_app
from amskv_kernels.serving.web.source import Drawing, EngineSource, Event, Served

LOST = (RayActorError, ReplicaUnavailableError)  # the replica, and what it drew
MOST_TRIES = 5  # of one image: a request that kills whoever draws it must not kill all
ONGOING = 10_000  # images that Ray lets wait at a replica: its engine knows better how many may
TARGET = 32  # images at a replica, drawn or waiting, that autoscaling aims at

Make = Callable[[], tuple[Engine, Served]]


class Drawer:
    """A replica: one engine.

    Args:
        make: builds it, in the replica's process, and says what the endpoint tells of its model.
    """

    def __init__(self, make: Make) -> None:
        engine, self._served = make()
        self._source = EngineSource(engine)
        engine.start()

    async def served(self) -> Served:
        """What the endpoint tells of the model."""
        return self._served

    async def load(self) -> tuple[str, Load]:
        """The replica's name, and its engine's load."""
        return serve.get_replica_context().replica_id.unique_id, self._source.engine.load

    async def draw(self, request: Request) -> AsyncIterator[Event | None]:
        """None once the image is taken, then all that happens to it."""
        drawing = await self._source.begin(request)
        try:
            yield None
            async for event in drawing:
                yield event
        finally:
            drawing.cancel()


class RayDrawing:
    """An image on its way at some replica, and at another where that one dies."""

    def __init__(self, drawers: DeploymentHandle, request: Request) -> None:
        self._drawers, self._request, self._tries = drawers, request, 0
        self._events: Any = None

    async def begin(self) -> None:
        """Ask a replica; errors are those of its engine."""
        while True:
            self._tries += 1
            self._events = self._drawers.options(stream=True).draw.remote(self._request)
            try:
                await anext(self._events)
            except RayTaskError as error:
                raise error.cause from None
            except LOST:
                if self._tries >= MOST_TRIES:
                    raise
            else:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        told = 0
        while True:
            try:
                async for event in self._events:
                    if isinstance(event, Drawn):
                        yield event
                        return
                    if isinstance(event, Progress) and event.steps > told:
                        told = event.steps
                        yield event
            except RayTaskError as error:
                raise error.cause from None
            except LOST:
                if self._tries >= MOST_TRIES:
                    raise
            else:
                raise RuntimeError("a replica's drawing ended without its image")
            await self.begin()

    def cancel(self) -> None:
        """Its pages are free from the replica's next tick on."""
        self._events.cancel()


class RaySource:
    """All replicas, as a source of images."""

    def __init__(self, drawers: DeploymentHandle) -> None:
        self._drawers = drawers

    async def begin(self, request: Request) -> Drawing:
        """As `Engine.submit`, by the replica that Ray chooses."""
        drawing = RayDrawing(self._drawers, request)
        await drawing.begin()
        return drawing

    async def loads(self) -> Mapping[str, Load]:
        """Every replica's."""
        found = await self._drawers.broadcast("load").results_async(return_exceptions=True)
        return dict(load for load in found if not isinstance(load, BaseException))  # of one that dies, nothing

    async def start(self) -> None:
        """Replicas have started before."""

    async def stop(self) -> None:
        """Ray stops them."""


class Front:
    """What answers HTTP."""

    async def __init__(self, drawers: DeploymentHandle, key: str | None) -> None:  # type: ignore[misc]
        self._drawers, self._key = drawers, key
        self._served = await drawers.served.remote()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._served, RaySource(self._drawers), key=self._key)


def application(
    make: Make, *, replicas: int = 1, most_replicas: int | None = None, key: str | None = None,
    actor_options: Mapping[str, Any] | None = None,
) -> serve.Application:  # fmt: skip
    """The endpoint and its replicas, for `serve.run`.

    Args:
        make: builds an engine, in each replica's process.
        replicas: how many there are; at least, where there may be more.
        most_replicas: where given, their number follows the images that wait and are drawn.
        key: what requests to /v1 must bear, None for nothing.
        actor_options: of each replica, as Ray takes them: {"num_gpus": 1}.
    """
    count: dict[str, Any] = {"num_replicas": replicas}
    if most_replicas is not None:
        scaling = {"min_replicas": replicas, "max_replicas": most_replicas, "target_ongoing_requests": TARGET}
        count = {"autoscaling_config": scaling}
    options = dict(actor_options or {})
    drawers = serve.deployment(Drawer, name="drawers", max_ongoing_requests=ONGOING, ray_actor_options=options, **count)
    front = serve.deployment(serve.ingress()(Front), name="endpoint", max_ongoing_requests=ONGOING)
    return front.bind(drawers.bind(make), key)
