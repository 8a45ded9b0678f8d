"""The endpoint: OpenAI's images API, metrics and a page over an engine; needs the extra `serve`."""

from amskv_kernels.serving.web.app import create_app
from amskv_kernels.serving.web.source import Drawing, EngineSource, Served, Source

__all__ = ["Drawing", "EngineSource", "Served", "Source", "create_app"]
