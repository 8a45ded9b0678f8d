"""The library's CPU kernels in every instruction set of this machine, against fp64."""

import re
from dataclasses import replace
from zlib import crc32

import large_logits
import pytest
import torch
from attn_cases import SPOILT, Case, eight_bit, exact, make, make_eight_bit, most_error, same_kinds, spoilt
from extra_cases import COMPACT_CASES, LARGE, QK_PARTS, QK_SHAPES, SMALL, make_compact, make_qk
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import BAD_TABLES, NAMES

from amskv_kernels.ops import reference
from amskv_kernels.ops.backends import library

pytestmark = pytest.mark.skipif(library.why_not_loaded() is not None, reason=str(library.why_not_loaded()))
SETS = [] if library.why_not_loaded() else library.instruction_sets()
IN_EVERY_SET = pytest.mark.parametrize("instruction_set", SETS)
IN_PAGES = pytest.mark.parametrize("make", [make, make_eight_bit], ids=["in pages as they are", "in eight bits"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.amskv
# Around every boundary: 8 rows that are taken one by one, a vector of 4, 8 or 16 rows, a tile of 64 rows, a block of 96
# keys, and several of each.
BOUNDARIES = [
    Case(n=8, history=(16,) * 6 + (3,), stored=(8,)),
    Case(n=9, history=(16,) * 6 + (3,), stored=(9,)),
    Case(n=2, heads=8, kv_heads=2, history=(128, 64, 1), page_size=128, head_dim=128, per_head=True),
    Case(n=1, heads=6, kv_heads=1, history=(), stored=(1,), head_dim=96),
    Case(n=64, history=(16,) * 6, stored=(64,), page_size=64),
    Case(n=63, history=(32, 1), page_size=32, head_dim=96),
    Case(n=65, history=(16,) * 6 + (15,), stored=(16,) * 4 + (1,), head_dim=128),
    Case(n=96, batch=1, heads=6, kv_heads=2, history=(64, 5, 0, 64), page_size=64, per_head=True),
    Case(n=97, batch=1, history=(128, 127, 1), stored=(97,), page_size=128),
    Case(n=193, batch=1, heads=9, kv_heads=1, history=(128,) * 3, page_size=128, head_dim=128),
    Case(n=1, heads=64, kv_heads=1, history=(16,) * 11),
    Case(n=1100, batch=1, heads=1, kv_heads=1, history=(64,) * 9, page_size=64),
]


def check(args: tuple, instruction_set: str) -> None:
    """One call against the reference: out, lse, and every byte of the pool and of its scales."""
    expected = copied(args)
    truth, truth_lse = reference.attn(*expected)
    limit = most_error(exact(args) if len(args) > 8 else args, truth)
    out, lse = ops.attn_cpu(*args, instruction_set=instruction_set)
    assert out.dtype == args[0].dtype
    assert out.is_contiguous()
    assert (out.double() - truth).abs().max() <= limit
    assert (lse.double() - truth_lse).abs().max() < 1e-5
    for found, truth in zip(args[3::5], expected[3::5], strict=True):
        assert torch.equal(found.view(torch.uint8), truth.view(torch.uint8)), "every byte, NaN included"


def copied(args: tuple) -> tuple:
    """The same call on a pool of its own."""
    return (*args[:3], args[3].clone(), *args[4:8], *(scales.clone() for scales in args[8:]))


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@IN_PAGES
@pytest.mark.parametrize("case", SMALL + LARGE + BOUNDARIES, ids=str)
def test_attn_is_the_reference(case, make, dtype, instruction_set):
    check(make(replace(case, dtype=dtype), seed=crc32(f"{case}{dtype}".encode())), instruction_set)


@st.composite
def cases(draw) -> Case:
    page_size = draw(st.sampled_from([16, 32, 64, 128]))
    rows = st.integers(0, page_size)
    n, held = draw(st.integers(1, 200)), 0
    stored: list[int] = []
    if draw(st.booleans()):
        held = draw(st.integers(0, page_size - 1))
        while (left := n + held - sum(stored)) > 0:
            least = held + 1 if not stored else 1
            stored.append(draw(st.integers(min(least, left), min(left, page_size))))
    return Case(
        batch=draw(st.integers(1, 3)),
        n=n,
        heads=(kv_heads := draw(st.integers(1, 3))) * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128])),
        page_size=page_size,
        history=tuple(draw(st.lists(rows, max_size=6))),
        stored=tuple(stored),
        held=held,
        per_batch=draw(st.booleans()),
        per_head=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@IN_EVERY_SET
@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), make=st.sampled_from([make, make_eight_bit]))
def test_attn_on_random_calls(instruction_set, case, seed, make):
    check(make(case, seed), instruction_set)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", SPOILT)
def test_what_is_no_number_spoils_its_own_rows(what, dtype, instruction_set):
    for case in (Case(n=3, history=(5,)), Case(n=40, history=(16,) * 9), Case(n=70, heads=4, kv_heads=2)):
        args = spoilt(make(replace(case, dtype=dtype), seed=2), what)
        truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:])
        out, lse = ops.attn_cpu(*args, instruction_set=instruction_set)
        assert same_kinds(out, truth)
        assert same_kinds(lse, truth_lse)
        torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2, equal_nan=True)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_every_size(dtype, instruction_set):
    for seed, n in enumerate((70, 5, 70, 2)):
        args = make(Case(n=n, history=(16, 16, 7), dtype=dtype), seed)
        large_logits.enlarge(args[0], args[1], args[3], seed)
        truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:])
        out, lse = ops.attn_cpu(*args, instruction_set=instruction_set)
        large_logits.check(out.to(torch.bfloat16), lse, truth, truth_lse, float(truth.abs().max()))


def test_logits_beyond_32_bits():
    """Each product of 133120² is above 2³¹, and equal scores weigh the same."""
    args = make(Case(n=5, history=(16,)), seed=1)
    args[0].fill_(133120.0), args[1].fill_(133120.0)
    args[3][:, 0] = torch.where(args[3][:, 0].isnan(), torch.nan, 133120.0)
    for name in SETS:
        out, _ = ops.attn_cpu(*args, instruction_set=name)
        truth, _ = reference.attn(*args[:3], args[3].clone(), *args[4:])
        assert (out.double() - truth).abs().max() < 1e-5


@IN_PAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_sets_change_no_bit_or_few(dtype, make):
    """Any number of threads: the same bits. Another instruction set: another order of nothing but fused products."""
    args = make(Case(n=300, heads=4, kv_heads=2, history=(64,) * 5, page_size=64, dtype=dtype), seed=8)
    threads = torch.get_num_threads()
    try:
        for name in SETS:
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(ops.attn_cpu(*args, instruction_set=name))
            assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@IN_EVERY_SET
@IN_PAGES
def test_rows_of_a_call_do_not_depend_on_each_other(make, instruction_set):
    """A query row alone, or among any others, has the same bits: whatever tile and strip it falls into."""
    args = list(make(Case(n=75, history=(64, 40), page_size=64), seed=4))
    out, lse = ops.attn_cpu(*args, instruction_set=instruction_set)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    mixed, mixed_lse = ops.attn_cpu(args[0][:, order], *args[1:], instruction_set=instruction_set)
    assert torch.equal(mixed, out[:, order])
    assert torch.equal(mixed_lse, lse[..., order])


@IN_EVERY_SET
@IN_PAGES
@pytest.mark.parametrize("n", [1, 4, 40])
def test_the_rest_of_a_page_may_be_left(n, make, instruction_set):
    """Rows that no slot names, here NaN, stay as they are where that is asked for, and no other byte differs."""
    args = make(Case(n=n, history=(5,), stored=(16,) * (n // 16) + (n % 16,)), seed=n)
    ours, theirs = copied(args), copied(args)
    found = ops.attn_cpu(*ours, *[None] * (9 - len(ours)), True, instruction_set)
    expected = ops.attn_cpu(*theirs, instruction_set=instruction_set)
    assert all(map(torch.equal, found, expected))
    rest = torch.zeros(args[3].shape[:3], dtype=torch.bool)
    for first in args[4].flatten().tolist():
        for slot in args[6].flatten().tolist():
            rest[first + (slot >> 8), :, slot & 255 :] = slot > 0
    for before, left, zeroed in zip(args[3::5], ours[3::5], theirs[3::5], strict=True):
        rest_of = rest.view(*rest.shape, *[1] * (before.dim() - 3)).expand(before.shape)
        assert torch.equal(left[~rest_of].view(torch.uint8), zeroed[~rest_of].view(torch.uint8))
        assert torch.equal(left[rest_of].view(torch.uint8), before[rest_of].view(torch.uint8))
        assert not zeroed[rest_of].any()


@IN_EVERY_SET
@IN_PAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, make, instruction_set):
    args = make(Case(n=80, history=(16, 4), stored=(16,) * 5, head_dim=96, dtype=dtype), seed=3)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        own = copied((q, k, v, *args[3:]))
        return [*ops.attn_cpu(*own, instruction_set=instruction_set), *(x.nan_to_num(7) for x in own[3::5])]

    odd = [torch.empty(2, 2, 80, 101, dtype=dtype).transpose(1, 2)[..., 3:99].copy_(x) for x in args[:3]]
    assert all(map(torch.equal, run(*args[:3]), run(*odd)))
    first = [x[:, :, :1].expand(x.shape) for x in args[:3]]  # heads of stride 0
    assert all(map(torch.equal, run(*first), run(*(x.contiguous() for x in first))))


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", QK_SHAPES, ids=str)
@pytest.mark.parametrize("parts", QK_PARTS.values(), ids=QK_PARTS)
def test_prepare_qk_is_the_reference(parts, shape, dtype, instruction_set):
    rounding = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    arguments = make_qk(shape, parts, dtype)
    found = ops.prepare_qk_cpu(**arguments, instruction_set=instruction_set)
    for x, truth in zip(found, reference.prepare_qk(**arguments), strict=True):
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert ((x.double() - truth).abs() <= rounding * truth.abs() + 2e-6).all()


@IN_EVERY_SET
def test_prepare_qk_of_zeros_and_of_no_numbers(instruction_set):
    qkv = torch.randn(1, 3, 3, 64)
    qkv[0, 0, 0], qkv[0, 1, 0, 5], qkv[0, 2, 1, 7] = 0, torch.nan, torch.inf
    expected = torch.nn.functional.normalize(qkv, dim=-1)
    for x, head in zip(ops.prepare_qk_cpu(qkv, 1, l2norm=True, instruction_set=instruction_set), (0, 1), strict=True):
        torch.testing.assert_close(x[:, :, 0], expected[:, :, head], equal_nan=True)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["in pages as they are", "in eight bits"])
@pytest.mark.parametrize(("case", "kept"), [*COMPACT_CASES, (Case(n=1, history=(9,)), (1,)), (Case(n=4), ())], ids=str)
def test_compact_is_the_reference(case, kept, int8, dtype, instruction_set):
    """Every byte, NaN included; k and v at odd strides, on one thread and on several."""
    pages, arena, src, k, v, keep, dst = make_compact(replace(case, dtype=dtype), kept)
    pools = eight_bit(pages) if int8 else (pages,)
    expected = [pool.clone() for pool in pools]
    reference.compact(expected[0], arena, src, k, v, keep, dst, *expected[1:])
    odd = [torch.empty(*x.shape[:3], x.shape[3] + 5, dtype=dtype)[..., 3:-2].copy_(x) for x in (k, v)]
    threads = torch.get_num_threads()
    try:
        for count, indices in ((1, keep), (3, keep.int())):
            torch.set_num_threads(count)
            found = [pool.clone() for pool in pools]
            scales = found[1] if int8 else None
            ops.compact_cpu(found[0], arena, src, *odd, indices, dst, scales, instruction_set)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    finally:
        torch.set_num_threads(threads)


def test_compact_names_bad_keys_and_writes_nothing():
    pages, arena, src, k, v, keep, dst = make_compact(Case(n=5, history=(16, 3)), (9,))
    before = pages.clone()
    for message, changed in {
        "keep is Float": {"keep": keep.float()},
        "keep has shape": {"keep": keep[:1]},
        "name 9 rows; they must name the 8 of keep": {"keep": keep[..., :8].contiguous()},
        "keep holds -1; the keys have indices 0 … 36": {"keep": keep - keep - 1},
        "keep holds 37; the keys": {"keep": keep - keep + 37},
        "keep holds 19, a row that src_slots do not name": {"keep": keep - keep + 19},
        "keep does not ascend": {"keep": keep.flip(-1)},
        "both read and written": {"dst_slots": src[..., :1] - 16 + 9},
        "k shares memory": {"k": pages.view(-1, 64)[:20].view(2, 5, 2, 64)},
    }.items():
        args = {"keep": keep, "dst_slots": dst, "k": k} | changed
        with pytest.raises(ValueError, match=message):
            ops.compact_cpu(pages, arena, src, args["k"], v, args["keep"], args["dst_slots"])
    assert torch.equal(before.view(torch.uint8), pages.view(torch.uint8))


def every_half() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@IN_EVERY_SET
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype, instruction_set):
    """Through prepare_qk, which scales q by 1 or by 1.37 and rounds once."""
    x = every_half().view(dtype).view(1, 512, 1, 128)
    qkv = x.expand(1, 512, 3, 128)
    for scale in (1.0, 1.37, 2.0**-9):
        q, k = ops.prepare_qk_cpu(qkv, 1, torch.tensor([scale]), instruction_set=instruction_set)
        for found, expected in ((q, (x.float() * scale).to(dtype)), (k, x)):
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(
                found.nan_to_num(nan=0.5).view(torch.int16), expected.nan_to_num(nan=0.5).view(torch.int16)
            )


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_named_as_python_names_them(name):
    changes, message = BAD_TABLES[name]
    args = dict(zip(NAMES, make(Case(n=6, history=(16, 2), stored=(6,))), strict=True))
    before = args["pages"].clone()
    for key, table in changes.items():
        table = torch.tensor(table, dtype=torch.int32)
        args[key] = table if key == "arena" else table[None].contiguous()
    for _ in range(2):  # what one call found, the next one does not remember
        with pytest.raises(ValueError, match=message):
            ops.attn_cpu(*args.values())
    if "write_slots" in changes and "read" not in name:
        with pytest.raises(ValueError, match=message):
            ops.append_cpu(*(args[key] for key in NAMES[1:5]), args["write_slots"])
    assert torch.equal(before.view(torch.uint8), args["pages"].view(torch.uint8))


REFUSED = {
    "device": ({"k": lambda a: a["k"].to("meta")}, "k is not on the CPU"),
    "dtype": ({n: lambda a, n=n: a[n].double() for n in ("q", "k", "v", "pages")}, "q is Double; the CPU kernels take"),
    "head size": ({"q": lambda a: a["q"][..., :48].contiguous()}, "q has head_dim 48; it must be one of (64, 96, 128)"),
    "shared memory": (
        {"q": lambda a: a["pages"].view(-1, 64)[:12].view(1, 6, 2, 64).expand(2, 6, 2, 64)},
        "q shares memory",
    ),
    "scale": ({"softmax_scale": lambda a: 0.0}, "softmax_scale is 0; it must be finite and above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name):
    changes, message = REFUSED[name]
    args = dict(zip(NAMES, make(Case(n=6, history=(16, 2), stored=(6,))), strict=True))
    args.update({key: change(args) for key, change in changes.items()})
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attn_cpu(*args.values())


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="instruction_set is avx9; this machine does not have it"):
        ops.attn_cpu(*make(Case(n=6)), instruction_set="avx9")


def test_prepare_qk_names_bad_arguments():
    qkv, table = torch.randn(1, 4, 6, 64), torch.zeros(4, 32)
    for arguments, message in (
        ({"kv_heads": 3}, "kv_heads is 3; the 6 heads of qkv must be"),
        ({"cos": table}, "cos and sin must be given together"),
        ({"cos": table, "sin": table[:3]}, "sin has shape (3, 32)"),
        ({"q_scale": torch.ones(4, dtype=torch.float64), "kv_heads": 1}, "q_scale is Double; it must be Float"),
        ({"eps": -1.0}, "eps is -1; it must be finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.prepare_qk_cpu(qkv, **{"kv_heads": 2, **arguments})
