"""`attn_ragged`: the slow truth, bit for bit N calls of `attn` on the CPU, and every wrong argument by its name."""

import pytest
import torch
from attn_cases import eight_bit
from ragged_cases import Ragged, apart, make_ragged

import amskv_kernels
from amskv_kernels import ops
from amskv_kernels.ops import reference

HALF, BF16 = torch.float16, torch.bfloat16
CASES = [
    Ragged((1,)),
    Ragged((1, 4, 9, 16, 25, 36)),
    Ragged((5, 0, 0, 17, 0), heads=6, kv_heads=3),
    Ragged((9, 9, 9, 4, 4), alike=True),
    Ragged((70, 1, 33), head_dim=96, page_size=32, entries=7, dtype=BF16),
    Ragged((3, 130, 3), heads=8, head_dim=128, page_size=64, per_head=True, dtype=HALF),
    Ragged((20, 20, 1), entries=0, heads=4, kv_heads=1),
]
CASE = pytest.mark.parametrize("case", CASES, ids=str)
BACKEND = pytest.mark.parametrize("backend", ["auto", "torch"])


def copied(args):
    return tuple(x.clone() if isinstance(x, torch.Tensor) and i == 3 else x for i, x in enumerate(args))


def same_bytes(own, other):
    return torch.equal(own.view(torch.uint8), other.view(torch.uint8))


@CASE
@BACKEND
def test_it_is_the_reference(case, backend):
    args = make_ragged(case, len(str(case)))
    expected = copied(args)
    truth, truth_lse = reference.attn_ragged(*expected)
    with amskv_kernels.backend(backend):
        out, lse = ops.attn_ragged(*args)
    limit = {torch.float32: 2e-6, HALF: 4e-3, BF16: 3e-2}[case.dtype]
    assert out.dtype == case.dtype and out.is_contiguous() and lse.shape == truth_lse.shape
    assert (out.double() - truth).abs().max() <= limit
    assert (lse.double() - truth_lse).abs().max() < (1e-5 if case.dtype == torch.float32 else 1e-4)
    assert same_bytes(args[3], expected[3]), "every byte of the pool, NaN included"


@CASE
@BACKEND
def test_it_is_bit_for_bit_a_call_for_each_sequence(case, backend):
    args = make_ragged(case, 7)
    alone = copied(args)
    with amskv_kernels.backend(backend):
        out, lse = ops.attn_ragged(*args)
        found = [ops.attn(*call) for call in apart(alone)]
    assert torch.equal(out, torch.cat([own for own, _ in found], 1)[0])
    assert torch.equal(lse, torch.cat([own for _, own in found], 2)[0])
    assert same_bytes(args[3], alone[3])


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed):
    rng = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(0, 40, (int(torch.randint(1, 7, (), generator=rng)),), generator=rng).tolist())
    case = Ragged(lengths, heads=4, kv_heads=2, entries=5, per_head=seed % 2 == 0)
    args = make_ragged(case, seed)
    expected = copied(args)
    truth, truth_lse = reference.attn_ragged(*expected)
    out, lse = ops.attn_ragged(*args)
    assert torch.allclose(out.double(), truth, atol=2e-6)
    assert torch.allclose(lse.double(), truth_lse, atol=1e-5)
    assert same_bytes(args[3], expected[3])


def test_pages_of_eight_bits():
    args = list(make_ragged(Ragged((5, 1, 30), dtype=BF16), 2))
    args[3], scales = eight_bit(args[3])
    alone, alone_scales = copied(args), scales.clone()
    out, _ = ops.attn_ragged(*args, scales)
    found = [ops.attn(*call, alone_scales)[0] for call in apart(alone)]
    assert torch.equal(out, torch.cat(found, 1)[0])
    assert torch.equal(args[3], alone[3]) and same_bytes(scales, alone_scales)


def test_nobody_hears_of_anothers_nan():
    args = list(make_ragged(Ragged((4, 6, 5)), 1))
    clean, _ = ops.attn_ragged(*copied(args))
    args[0], args[2] = args[0].clone(), args[2].clone()
    args[0][5] = args[2][5] = torch.nan
    out, _ = ops.attn_ragged(*args)
    assert torch.equal(out[:4], clean[:4]) and torch.equal(out[10:], clean[10:]) and out[5].isnan().all()


def test_no_sequences():
    q, k, v, pages, arena, read, write, starts, scale = make_ragged(Ragged((1,)))
    out, lse = ops.attn_ragged(q[:0], k[:0], v[:0], pages, arena[:0], read[:0], write[:0], starts[:1], scale)
    assert out.shape == (0, 2, 64) and lse.shape == (2, 0)


WRONG = {
    "row_starts of floats": (7, lambda x: x.float(), TypeError, "row_starts is torch.float32; it must be torch.int32"),
    "a matrix of row_starts": (7, lambda x: x[None], ValueError, r"has shape \(1, 4\); it must be \(N \+ 1,\)"),
    "row_starts that descend": (7, lambda x: x[[0, 2, 1, 3]].contiguous(), ValueError, "must ascend from 0 to the 9"),
    "row_starts that stop short": (7, lambda x: x.clamp(max=8), ValueError, "must ascend from 0 to the 9 rows of q"),
    "another number of sequences": (4, lambda x: x[:2].contiguous(), ValueError, r"it must be \(N, Hkv\) = \(3, 2\)"),
    "tables of another number": (5, lambda x: x[:2].contiguous(), ValueError, "with N = 3, Hkv = 2"),
    "four dimensions": (0, lambda x: x[None], ValueError, r"q has 4 dimensions; it must have 3, \(T, H, D\)"),
    "fewer keys": (1, lambda x: x[1:], ValueError, "v has shape"),
    "fewer queries": (0, lambda x: x[1:], ValueError, "its T and D must be those of k"),
    "too few rows stored": (6, lambda x: torch.where(x > 0, x - 1, x), ValueError, "write_slots name"),
    "a page read and written": (6, lambda x: x, ValueError, "is both read and written in one call"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named(what):
    index, change, error, message = WRONG[what]
    args = list(make_ragged(Ragged((4, 2, 3), entries=3, per_head=True), 5))
    args[index] = change(args[index])
    if what == "a page read and written":  # another sequence's, too
        arena, read, write = args[4:7]
        reader, *others = arena[:, 0].argsort().tolist()  # so that the page lies ahead in the pool
        writer = next(i for i in others if write[i, 0, 0])
        read[reader, 0, 0] = write[writer, 0, 0] + ((int(arena[writer, 0]) - int(arena[reader, 0])) << 8)
    before = args[3].clone()
    with pytest.raises(error, match=message):
        ops.attn_ragged(*args)
    assert same_bytes(args[3], before)
