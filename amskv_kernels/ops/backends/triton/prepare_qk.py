"""`prepare_qk`: L2 norm, per-head scale and rotation of q and k, one pass, bound by bandwidth.

The heads of q and k of a token lie side by side in the packed projection, so a program takes the next BR of these
rows, whatever token and head they belong to: loads are contiguous and no lane idles. Square root and division are
the correctly rounded ones: the models' own fp32 arithmetic, and free beside the memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from amskv_kernels.ops.backends.triton.common import on_device, padded

# Elements of a program: 16 … 32 per thread of 4 warps, two to four 16-byte vectors in flight. Not yet measured.
ELEMENTS = 4096


@triton.jit(do_not_specialize=["n", "rows", "heads", "kv_heads"])
def prepare_qk_kernel(
    qkv, q_scale, cos, sin, out_q, out_k, stride_b, stride_n, stride_h, n, rows, heads, kv_heads, eps,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Grid (rows / BR,); rows = B · n · (H + Hkv)."""
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_h, o_t = o_row % (heads + kv_heads), o_row // (heads + kv_heads)
    o_n, o_b = o_t % n, o_t // n
    o_d = tl.arange(0, BD)
    b_there = o_row < rows
    b_in = b_there[:, None] & (o_d < D)[None, :]
    p_in = qkv + (o_b * stride_b + o_n * stride_n + o_h * stride_h)[:, None] + o_d[None, :]
    b_x = tl.load(p_in, mask=b_in, other=0.0).to(tl.float32)  # [BR, BD]
    if NORM:
        b_norm = tl.sqrt_rn(tl.sum(b_x * b_x, 1))
        b_x = tl.div_rn(b_x, tl.maximum(b_norm, eps)[:, None].broadcast_to(BR, BD))
    if SCALE:
        b_x = b_x * tl.load(q_scale + o_h, mask=b_there & (o_h < heads), other=1.0)[:, None]
    if ROPE:
        o_pair = tl.arange(0, BD // 2)
        o_turn = o_n[:, None] * (D // 2) + o_pair[None, :]
        b_mask = b_there[:, None] & (o_pair < D // 2)[None, :]
        b_cos = tl.load(cos + o_turn, mask=b_mask, other=0.0)  # [BR, BD / 2]
        b_sin = tl.load(sin + o_turn, mask=b_mask, other=0.0)
        b_even, b_odd = tl.split(tl.reshape(b_x, (BR, BD // 2, 2)))
        b_x = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
        b_x = tl.reshape(b_x, (BR, BD))
    b_x = b_x.to(out_q.dtype.element_ty)
    p_q = out_q + ((o_t * heads + o_h) * D)[:, None] + o_d[None, :]
    p_k = out_k + ((o_t * kv_heads + o_h - heads) * D)[:, None] + o_d[None, :]
    tl.store(p_q, b_x, mask=b_in & (o_h < heads)[:, None])
    tl.store(p_k, b_x, mask=b_in & (o_h >= heads)[:, None])


def prepare_qk(
    qkv: Tensor, kv_heads: int, q_scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, l2norm: bool, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `amskv_kernels.ops.prepare_qk`."""
    batch, n, all_heads, head_dim = qkv.shape
    heads = all_heads - 2 * kv_heads
    q, k = qkv.new_empty(batch, n, heads, head_dim), qkv.new_empty(batch, n, kv_heads, head_dim)
    rows = batch * n * (heads + kv_heads)
    if rows == 0:
        return q, k
    block = ELEMENTS // padded(head_dim)
    with on_device(qkv):
        prepare_qk_kernel[triton.cdiv(rows, block),](
            qkv, q_scale, cos, sin, q, k, *qkv.stride()[:3], n, rows, heads, kv_heads, eps,
            D=head_dim, BD=padded(head_dim), BR=block, NORM=l2norm, SCALE=q_scale is not None, ROPE=cos is not None,
            enable_fp_fusion=False,  # each product rounded, as the models' own code does
        )  # fmt: skip
    return q, k
