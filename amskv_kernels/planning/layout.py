"""The paged layout's constants, shared by the planner, the ops and the kernels.

pages : (num_pages, 2, page_size, D)   one page = page_size tokens of one head: its K rows, then its V rows
arena : (B, Hkv) int32                 first page of this sequence-and-head's arena in the pool
slots : (B|1, Hkv|1, S) int32          page_offset << ROWS_BITS | rows, rows 1 … page_size, 0 = none
"""

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 96, 128)
ROWS_BITS = 8
ROWS_MASK = (1 << ROWS_BITS) - 1
# Page offsets in an arena: what an int32 slot has left beside its sign.
MOST_PAGES = 1 << (31 - ROWS_BITS)
# Page numbers in a pool are int32 as well.
MOST_POOL_PAGES = 2**31 - 1
