"""Cache policies: which earlier scales a layer keeps."""

from amskv_kernels.policies.base import Policy
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.parse import PUBLISHED_SAVINGS, parse_policy
from amskv_kernels.policies.whole_scale import AMSKV, AMSKVCapacity, Full, Sink, SlidingWindow

__all__ = [
    "AMSKV",
    "PUBLISHED_SAVINGS",
    "AMSKVCapacity",
    "Calibration",
    "Full",
    "Policy",
    "Sink",
    "SlidingWindow",
    "parse_policy",
]
