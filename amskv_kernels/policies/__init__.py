"""Cache policies: which earlier scales, or tokens, a layer or a head keeps."""

from amskv_kernels.policies.base import HeadPolicy, Policy, Selection, TokenPolicy
from amskv_kernels.policies.budgets import Share, Tokens
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.drafters import Drafters
from amskv_kernels.policies.fitted import LeastLoss, Lifetimes
from amskv_kernels.policies.heads import HeadOrders, HeatKV
from amskv_kernels.policies.losses import Losses
from amskv_kernels.policies.parse import PUBLISHED_SAVINGS, parse_policy, read_policy
from amskv_kernels.policies.tokens import H2O, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.whole_scale import AMSKV, AMSKVCapacity, Full, Sink, SlidingWindow, Visible

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
    "LeastLoss",
    "Lifetimes",
    "Losses",
    "Policy",
    "PyramidKV",
    "Recent",
    "ScaleKV",
    "Selection",
    "Share",
    "Sink",
    "SlidingWindow",
    "SnapKV",
    "TokenPolicy",
    "Tokens",
    "Visible",
    "parse_policy",
    "read_policy",
]
