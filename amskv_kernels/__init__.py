"""Attention over a planned, paged KV cache for next-scale (VAR) image models: `torch.ops.amskv.attn`."""

from amskv_kernels.cache.paged import PagedKVCache
from amskv_kernels.integrations import patch, unpatch
from amskv_kernels.ops import backend, debug
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import (
    AMSKV,
    H2O,
    Calibration,
    Full,
    HeatKV,
    LeastLoss,
    Policy,
    PyramidKV,
    Recent,
    ScaleKV,
    Share,
    Sink,
    SlidingWindow,
    SnapKV,
    Tokens,
    parse_policy,
)
from amskv_kernels.schedule import ScaleSchedule
from amskv_kernels.version import __version__

__all__ = [
    "AMSKV",
    "H2O",
    "CachePlan",
    "Calibration",
    "Full",
    "HeatKV",
    "LeastLoss",
    "PagedKVCache",
    "Policy",
    "PyramidKV",
    "Recent",
    "ScaleKV",
    "ScaleSchedule",
    "Share",
    "Sink",
    "SlidingWindow",
    "SnapKV",
    "Tokens",
    "__version__",
    "backend",
    "debug",
    "parse_policy",
    "patch",
    "unpatch",
]
