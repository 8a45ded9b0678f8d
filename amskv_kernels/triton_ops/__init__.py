"""The ops as Triton kernels, one file per op; `backend` is the door."""
