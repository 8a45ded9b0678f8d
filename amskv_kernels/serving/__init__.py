"""Serving: images at different steps in one batch over one pool, admitted by the exact plan."""

from amskv_kernels.serving.engine import ClosedError, Engine, Load, QueueFullError
from amskv_kernels.serving.requests import CancelledError, Drawn, Handle, Progress, Request
from amskv_kernels.serving.sharded import ShardedEngine

__all__ = [
    "CancelledError",
    "ClosedError",
    "Drawn",
    "Engine",
    "Handle",
    "Load",
    "Progress",
    "QueueFullError",
    "Request",
    "ShardedEngine",
]
