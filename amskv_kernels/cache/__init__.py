"""The KV cache of a generation: one that runs a plan, and two that decide as they go."""

from amskv_kernels.cache.online import OnlineKVCache
from amskv_kernels.cache.paged import PagedKVCache
from amskv_kernels.cache.unplanned import UnplannedKVCache

__all__ = ["OnlineKVCache", "PagedKVCache", "UnplannedKVCache"]
