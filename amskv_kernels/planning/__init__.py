"""The plan of a generation's cache: lifetimes → pages → slot tables → exact bytes. NumPy only."""

from amskv_kernels.planning.pages import Extent
from amskv_kernels.planning.plan import CachePlan, Compaction

__all__ = ["CachePlan", "Compaction", "Extent"]
