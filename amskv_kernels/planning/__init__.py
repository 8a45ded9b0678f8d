"""The plan of a generation's cache: lifetimes → pages → slot tables → exact bytes. NumPy only."""

from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.planning.tables import Compaction, Extent

__all__ = ["CachePlan", "Compaction", "Extent"]
