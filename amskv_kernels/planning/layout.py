"""The paged layout's constants, shared by the planner, the caches, the ops and the kernels.

pages : (num_pages, 2, page_size, D)   one page = page_size tokens of one head: its K rows, then its V rows
arena : (B, Hkv) int32                 first page of this sequence-and-head's arena in the pool
slots : (B|1, Hkv|1, S) int32          page_offset << ROWS_BITS | rows, rows 1 … page_size, 0 = none

Rows of pages of int8 have an fp32 scale each, in page_scales (num_pages, 2, page_size).
"""

from amskv_kernels.arguments import whole_number

PAGE_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (64, 96, 128)
ROWS_BITS = 8
ROWS_MASK = (1 << ROWS_BITS) - 1
# Page offsets in an arena: what an int32 slot has left beside its sign.
MOST_PAGES = 1 << (31 - ROWS_BITS)
# Page numbers in a pool are int32 as well.
MOST_POOL_PAGES = 2**31 - 1
SCALE_BYTES = 4


def row_size(name: str, head_dim: object) -> int:
    """Elements of a page's row for heads of `head_dim`: that many, or the next size that has kernels.

    Raises:
        ValueError: no multiple of 8, or above 128; says `name`.
    """
    number = whole_number(name, head_dim, 8, HEAD_DIMS[-1])
    if number % 8:  # 16-bit rows of other sizes do not begin at a multiple of 16 bytes
        raise ValueError(f"{name} is {number}; it must be a multiple of 8")
    return next(size for size in HEAD_DIMS if size >= number)


def row_bytes(row: int, element_bytes: int) -> int:
    """Bytes of a page's row of K or of V with `row` elements; those of one byte have a scale."""
    return row * element_bytes + (SCALE_BYTES if element_bytes == 1 else 0)
