"""The ops as Triton kernels, one file per op; `backend` is the door, `tiles` the table of sizes.

A kernel is compiled by the first call that needs it and cached on disk. Lengths (n, entries of a table) are never
compiled in, only sizes that belong to a model and a plan are, so one generation compiles everything the next will
use: run one before capturing a CUDA graph or serving.
"""
