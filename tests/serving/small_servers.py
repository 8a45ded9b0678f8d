"""An endpoint of the small random model: its application, and a server of it."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from small_engines import SAMPLING, engine

from amskv_kernels.serving import Engine
from amskv_kernels.serving.web import EngineSource, Served, create_app

__all__ = [  # of libraries that a test file cannot import: it is skipped where they are not
    "EngineSource", "Served", "TestClient", "create_app", "text_string_to_metric_families",
]  # fmt: skip

GENERATE = "/v1/images/generations"


def served(drawer: Engine) -> Served:
    """The small model, its classes named."""
    return Served.of(drawer, "small", ("goldfish, Carassius auratus", "hen", "dog", "cat", "owl"), **SAMPLING)


def app(drawer: Engine | None = None, **settings: object) -> FastAPI:
    """Its application."""
    drawer = drawer or engine()
    return create_app(served(drawer), EngineSource(drawer), **settings)  # type: ignore[arg-type]


@contextlib.contextmanager
def server(application: FastAPI) -> Iterator[str]:
    """A server in a thread of its own; its address."""
    runner = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        until(lambda: runner.started)
        yield f"127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join()


def until(found: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def pixels(b64_json: str) -> torch.Tensor:
    """(3, H, W) of 0 … 255 in a PNG."""
    with Image.open(io.BytesIO(base64.b64decode(b64_json))) as image:
        assert image.format == "PNG"
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
