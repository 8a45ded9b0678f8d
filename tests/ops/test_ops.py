"""attn and append on the CPU against the fp64 reference."""

from zlib import crc32

import pytest
import torch
from attn_cases import SPOILT, Case, make, most_error, same_kinds, spoilt

import amskv_kernels
from amskv_kernels.ops import reference
from amskv_kernels.ops.backends import library

attn, append = torch.ops.amskv.attn, torch.ops.amskv.append

CASES = [
    Case(n=1),
    Case(n=3, history=(1,), stored=(3,)),
    Case(n=17, history=(16, 16, 5), stored=(16, 1)),
    Case(n=16, history=(4, 9), stored=(16,), page_size=16, head_dim=96),
    Case(n=33, heads=8, kv_heads=2, head_dim=128, page_size=32, history=(32, 7), stored=(32, 1)),
    Case(n=40, history=(128, 128, 3), stored=(40,), page_size=128),
    Case(n=20, history=(64, 0, 13), stored=(0, 20), page_size=64),
    Case(n=9, history=(16, 16, 2), stored=(9,), per_head=True, heads=4),
    Case(n=9, batch=3, history=(16, 3, 2), stored=(9,), per_batch=True),
    Case(n=30, batch=3, heads=6, kv_heads=3, history=(16, 3, 16, 8), stored=(16, 14), per_batch=True, per_head=True),
    Case(n=4, stored=(5,), held=1),
    Case(n=25, history=(16,), stored=(16, 16), held=7),
    Case(n=6, stored=(16,), held=10, per_head=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attn_is_the_reference(case, dtype):
    args = make(Case(**{**case.__dict__, "dtype": dtype}), seed=crc32(f"{case}{dtype}".encode()))
    expected_pages = args[3].clone()
    truth, truth_lse = reference.attn(*args[:3], expected_pages, *args[4:])
    limit = most_error(args, truth)
    out, lse = attn(*args)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert (out.double() - truth).abs().max() <= limit
    assert lse.dtype == torch.float32
    assert (lse.double() - truth_lse).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(args[3].view(torch.uint8), expected_pages.view(torch.uint8)), "every byte, NaN included"


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(n=1), Case(n=3, history=(5,)), Case(n=40, history=(16,) * 9), CASES[7]], ids=str)
def test_what_is_no_number_spoils_its_own_rows(case, dtype, what):
    """Also where the attention that PyTorch brings along gives zeros for rows without a finite score."""
    args = spoilt(make(Case(**{**case.__dict__, "dtype": dtype}), seed=2), what)
    truth, truth_lse = reference.attn(*args[:3], args[3].clone(), *args[4:])
    out, lse = attn(*args)
    assert same_kinds(out, truth)
    assert same_kinds(lse, truth_lse)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.stored], ids=str)
def test_append_is_the_store_of_attn(case):
    args = make(case, seed=11)
    stored = args[3].clone()
    append(args[1], args[2], stored, args[4], args[6])
    attn(*args)
    assert torch.equal(stored.view(torch.uint8), args[3].view(torch.uint8))


def test_a_written_page_ends_in_zeros():
    args = make(Case(n=5, stored=(5,)))
    attn(*args)
    page = int(args[4][0, 0]) + (int(args[6][0, 0, 0]) >> 8)
    assert (args[3][page, :, 5:] == 0).all()
    assert torch.equal(args[3][page, 0, :5], args[1][0, :, 0])


def test_any_strides_with_a_contiguous_last_dimension():
    args = make(Case(n=12, history=(16, 4), stored=(12,)), seed=3)
    q, k, v = (x.contiguous() for x in args[:3])
    out, lse = attn(q, k, v, args[3].clone(), *args[4:])
    views = [torch.empty(2, 2, 12, 70).transpose(1, 2)[..., 3:67].copy_(x) for x in (q, k, v)]
    again, lse_again = attn(*views, args[3].clone(), *args[4:])
    assert not views[0].is_contiguous()
    torch.testing.assert_close(again, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse_again, lse, rtol=0, atol=1e-6)


def test_the_order_of_pages_does_not_matter():
    args = list(make(Case(n=7, history=(16, 3, 8)), seed=5))
    out, _ = attn(*args)
    args[5] = args[5].flip(-1).contiguous()
    torch.testing.assert_close(attn(*args)[0], out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES[:3] + CASES[7:9] + CASES[10:11], ids=str)
def test_opcheck(case):
    args = make(case)
    torch.library.opcheck(attn.default, args)
    torch.library.opcheck(append.default, (args[1], args[2], args[3], args[4], args[6]))


def test_compiles_into_one_graph_with_dynamic_batch():
    def block(q, k, v, pages, arena, read_slots, write_slots, scale):
        out, lse = attn(q * 2, k, v, pages, arena, read_slots, write_slots, scale)
        append(k, v, pages, arena, write_slots)
        return out + 1, lse, pages.nan_to_num()

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        args = make(Case(batch=batch, n=6, history=(16, 2), stored=(6,)), seed=batch)
        expected = block(*args[:3], args[3].clone(), *args[4:])
        for got, want in zip(compiled(*args[:3], args[3].clone(), *args[4:]), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


GOOD = Case(n=6, heads=4, history=(16, 2), stored=(6,))
NAMES = ("q", "k", "v", "pages", "arena", "read_slots", "write_slots", "softmax_scale")
BAD_ARGUMENTS = {
    "q rank": ({"q": lambda a: a["q"][0]}, ValueError, r"q has 3 dimensions; it must have 4, \(B, n, H, D\)"),
    "k rank": ({"k": lambda a: a["k"][0]}, ValueError, "k has 3 dimensions"),
    "v rank": ({"v": lambda a: a["v"][0]}, ValueError, "v has 3 dimensions"),
    "q dtype": ({"q": lambda a: a["q"].double()}, TypeError, "q is torch.float64; it must be one of torch.float16"),
    "q unlike k": ({"q": lambda a: a["q"].half()}, TypeError, "q is torch.float16; it must be torch.float32, as k"),
    "v unlike k": ({"v": lambda a: a["v"].half()}, TypeError, "v is torch.float16; it must be torch.float32, as k"),
    "pages dtype": ({"pages": lambda a: a["pages"].half()}, TypeError, "pages is torch.float16; it must be"),
    "arena dtype": ({"arena": lambda a: a["arena"].long()}, TypeError, "arena is torch.int64; it must be torch.int32"),
    "slots dtype": ({"read_slots": lambda a: a["read_slots"].long()}, TypeError, "read_slots is torch.int64"),
    "q device": ({"q": lambda a: a["q"].to("meta")}, ValueError, "q is on meta; it must be on cpu, as k"),
    "v device": ({"v": lambda a: a["v"].to("meta")}, ValueError, "v is on meta; it must be on cpu, as k"),
    "pages device": ({"pages": lambda a: a["pages"].to("meta")}, ValueError, "pages is on meta; it must be on cpu"),
    "arena device": ({"arena": lambda a: a["arena"].to("meta")}, ValueError, "arena is on meta; it must be on cpu"),
    "head size": (
        {n: lambda a, n=n: a[n][..., :48].contiguous() for n in ("q", "k", "v")},
        ValueError,
        r"has head_dim 48; it must be one of \(64, 96, 128\)",
    ),
    "q stride": (
        {"q": lambda a: a["q"].transpose(2, 3).contiguous().transpose(2, 3)},
        ValueError,
        "q has stride 4 in its last dimension; it must be 1",
    ),
    "q tokens": ({"q": lambda a: a["q"][:, :5]}, ValueError, r"q has shape \(2, 5, 4, 64\); its B, n and D must be"),
    "v shape": ({"v": lambda a: a["v"][:, :5]}, ValueError, r"v has shape \(2, 5, 2, 64\); it must have that of k"),
    "head count": ({"q": lambda a: a["q"][:, :, :3]}, ValueError, "q has 3 heads; they must be a multiple of the 2 KV"),
    "no heads": ({"k": lambda a: a["k"][:, :, :0]}, ValueError, "k has no heads"),
    "pages rank": ({"pages": lambda a: a["pages"][0]}, ValueError, r"it must be \(num_pages, 2, page_size, D = 64\)"),
    "page size": (
        {"pages": lambda a: a["pages"][:, :, :12].contiguous()},
        ValueError,
        "pages has a page_size of 12; it must be one of",
    ),
    "pages strides": ({"pages": lambda a: a["pages"][::2]}, ValueError, "pages has strides .*; it must be contiguous"),
    "arena shape": (
        {"arena": lambda a: a["arena"][:1]},
        ValueError,
        r"arena has shape \(1, 2\); it must be \(B, Hkv\)",
    ),
    "slots rank": ({"read_slots": lambda a: a["read_slots"][0]}, ValueError, r"it must be \(B\|1, Hkv\|1, S\)"),
    "slots batch": (
        {"write_slots": lambda a: a["write_slots"].repeat(3, 1, 1)},
        ValueError,
        r"write_slots has shape \(3, 1, 1\); it must be",
    ),
    "slots strides": (
        {"read_slots": lambda a: a["read_slots"].repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "read_slots has strides",
    ),
    "scale": ({"softmax_scale": lambda a: float("nan")}, ValueError, "softmax_scale is nan; it must be finite"),
    "scale sign": ({"softmax_scale": lambda a: -1.0}, ValueError, "softmax_scale is -1.0"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named_before_anything_is_written(name):
    changes, kind, message = BAD_ARGUMENTS[name]
    good = dict(zip(NAMES, make(GOOD), strict=True))
    bad = {key: changes[key](good) if key in changes else value for key, value in good.items()}
    before = good["pages"].clone()
    with pytest.raises(kind, match=message):
        attn(*bad.values())
    assert torch.equal(before.view(torch.uint8), good["pages"].view(torch.uint8))


BAD_TABLES = {
    "outside": ({"read_slots": [[9999 << 8 | 3]]}, "read_slots point to page [0-9]+; the pool has pages 0 … 19"),
    "write outside": ({"write_slots": [[9999 << 8 | 6]]}, "write_slots point to page"),
    "before the pool": ({"arena": [[-50, 0], [4, 8]], "read_slots": [[1 << 8 | 3]]}, "read_slots point to page -49"),
    "too many rows": ({"read_slots": [[0 << 8 | 17]]}, r"hold 17 \(page_offset 0, 17 rows\).*at most page_size = 16"),
    "negative": ({"write_slots": [[-1]]}, "write_slots hold -1"),
    "too few rows": ({"write_slots": [[0 << 8 | 5]]}, "write_slots name 5 rows for the 6 rows of k"),
    "a page too many": ({"write_slots": [[0 << 8 | 4, 1 << 8 | 8]]}, "write_slots name 12 rows for the 6 rows of k"),
    "overlap in one head": ({"write_slots": [[0 << 8 | 3, 0 << 8 | 3]]}, "write_slots name one page twice"),
    "overlap of two heads": ({"arena": [[0, 0], [5, 10]], "write_slots": [[0 << 8 | 6]]}, "name one page twice"),
    "read and written": (
        {"read_slots": [[1 << 8 | 2]], "write_slots": [[1 << 8 | 6]]},
        "page [0-9]+ is both read and written in one call",
    ),
    "grown over what is read": (
        {"read_slots": [[1 << 8 | 5]], "write_slots": [[1 << 8 | 10]]},
        "page [0-9]+ is both read and written in one call",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_named_before_anything_is_written(name):
    changes, message = BAD_TABLES[name]
    args = dict(zip(NAMES, make(Case(n=6, history=(16, 2), stored=(6,))), strict=True))
    before = args["pages"].clone()
    for key, table in changes.items():
        table = torch.tensor(table, dtype=torch.int32)
        args[key] = table if key == "arena" else table[None].contiguous()
    with pytest.raises(ValueError, match=message):
        attn(*args.values())
    assert torch.equal(before.view(torch.uint8), args["pages"].view(torch.uint8))


def test_append_names_bad_arguments():
    _, k, v, pages, arena, _, write_slots, _ = make(GOOD)
    with pytest.raises(TypeError, match=r"v is torch.float16; it must be torch.float32"):
        append(k, v.half(), pages, arena, write_slots)
    with pytest.raises(ValueError, match="write_slots name 5 rows for the 6 rows of k"):
        append(k, v, pages, arena, write_slots - 1)
    assert pages.isnan().any()


def test_backend_is_forced_and_restored():
    from amskv_kernels import ops

    assert ops.choose("attn", "cpu").backend == ("torch" if library.why_not_loaded() else "cpu")
    with pytest.raises(ValueError, match=r"backend \[\] is not known"):
        amskv_kernels.backend([])
    with pytest.raises(ValueError, match="backend 'cudnn' is not known; known: auto, "):
        amskv_kernels.backend("cudnn")
    with amskv_kernels.backend("torch"):
        assert ops.choose("attn", "cpu") == ("torch", "forced")
    assert ops.choose("attn", "cpu").reason != "forced"


def test_debug_is_restored():
    from amskv_kernels import ops

    with amskv_kernels.debug():
        assert ops.dispatch.settings().debug
        attn(*make(GOOD))
    assert not ops.dispatch.settings().debug


def test_gradients_are_refused():
    args = make(GOOD)
    with pytest.raises(RuntimeError, match=r"no backward; call the model under torch.no_grad\(\)"):
        attn(args[0].clone().requires_grad_(), *args[1:])
    with pytest.raises(RuntimeError, match="no backward"):
        append(args[1], args[2].clone().requires_grad_(), args[3], args[4], args[6])
    with torch.no_grad():
        assert not attn(args[0].clone().requires_grad_(), *args[1:])[0].requires_grad


@pytest.mark.parametrize("shape", [{"n": 0}, {"batch": 0}])
def test_no_tokens_and_no_sequences_give_nothing(shape):
    args = make(Case(**{"history": (16, 2), **shape}))
    out, lse = attn(*args)
    assert out.shape == args[0].shape
    assert lse.shape == (out.shape[0], out.shape[2], out.shape[1])
