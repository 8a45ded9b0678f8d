"""The KV cache of a generation: one that runs a plan, and one that decides as it goes."""

from amskv_kernels.cache.online import OnlineKVCache
from amskv_kernels.cache.paged import PagedKVCache

__all__ = ["OnlineKVCache", "PagedKVCache"]
