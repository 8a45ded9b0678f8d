"""Cache policies: which earlier scales, or tokens, a layer or a head keeps."""

from amskv_kernels.policies.base import HeadPolicy, Policy, Selection, TokenPolicy
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.heads import HeadOrders, HeatKV
from amskv_kernels.policies.parse import PUBLISHED_SAVINGS, parse_policy
from amskv_kernels.policies.tokens import H2O, Drafters, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.whole_scale import AMSKV, AMSKVCapacity, Full, Sink, SlidingWindow

__all__ = [
    "AMSKV",
    "H2O",
    "PUBLISHED_SAVINGS",
    "AMSKVCapacity",
    "Calibration",
    "Drafters",
    "Full",
    "HeadOrders",
    "HeadPolicy",
    "HeatKV",
    "Policy",
    "PyramidKV",
    "Recent",
    "ScaleKV",
    "Selection",
    "Sink",
    "SlidingWindow",
    "SnapKV",
    "TokenPolicy",
    "parse_policy",
]
