"""`attn_ragged_cpu`: the calls apart, in every instruction set and on any threads; tables of any numbers do no harm."""

import re

import pytest
import torch
from attn_cases import eight_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged_cases import Ragged, apart, make_ragged

from amskv_kernels.ops import reference
from amskv_kernels.ops.backends import library

SETS = [] if library.why_not_loaded() else library.instruction_sets()
IN_EVERY_SET = pytest.mark.parametrize("instruction_set", SETS)
pytestmark = pytest.mark.skipif(not SETS, reason="the library was not built")
ops = torch.ops.amskv
NAMES = ("q", "k", "v", "pages", "arena", "read_slots", "write_slots", "row_starts", "softmax_scale")


def packed(args):
    """As the library takes them: q, k, v (1, T, H, D)."""
    return (*(x[None] for x in args[:3]), args[3].clone(), *args[4:])


def same_bytes(own, other):
    return torch.equal(own.view(torch.uint8), other.view(torch.uint8))


@st.composite
def cases(draw):
    return Ragged(
        tuple(draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 50]), min_size=1, max_size=5))),
        heads=(kv_heads := draw(st.integers(1, 3))) * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 96, 128])),
        page_size=draw(st.sampled_from([16, 32, 64, 128])),
        entries=draw(st.integers(0, 6)),
        per_head=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


@IN_EVERY_SET
@settings(max_examples=12, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**31), threads=st.integers(1, 3), int8=st.booleans())
def test_it_is_the_calls_apart(instruction_set, case, seed, threads, int8):
    args = make_ragged(case, seed)
    scales = alone_scales = None
    if int8:
        pages, scales = eight_bit(args[3])
        args, alone_scales = (*args[:3], pages, *args[4:]), scales.clone()
    before, own, alone = torch.get_num_threads(), packed(args), (*args[:3], args[3].clone(), *args[4:])
    torch.set_num_threads(threads)
    try:
        out, lse = ops.attn_ragged_cpu(*own, scales, instruction_set=instruction_set)
    finally:
        torch.set_num_threads(before)
    found = [ops.attn_cpu(*call, alone_scales, instruction_set=instruction_set) for call in apart(alone)]
    total = sum(case.lengths)
    assert out.shape == (1, total, case.heads, case.head_dim) and lse.shape == (1, case.heads, total)
    if found:
        assert torch.equal(out, torch.cat([x for x, _ in found], 1))
        assert torch.equal(lse, torch.cat([x for _, x in found], 2))
    assert same_bytes(own[3], alone[3])
    assert scales is None or same_bytes(scales, alone_scales)


@IN_EVERY_SET
def test_any_strides(instruction_set):
    case = Ragged((5, 0, 40, 3), heads=4, kv_heads=2, head_dim=64)
    own = packed(make_ragged(case, 3))
    wide = torch.full((1, 2 * 48, 16, 72), torch.nan)
    views = (wide[:, ::2, 0:8:2, :64], wide[:, 1::2, 9:11, 4:68], wide[:, ::2, 11:15:2, 8:72])
    for view, x in zip(views, own[:3], strict=True):
        view.copy_(x)
    found = ops.attn_ragged_cpu(*views, own[3].clone(), *own[4:], instruction_set=instruction_set)
    expected = ops.attn_ragged_cpu(*own, instruction_set=instruction_set)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_tables_of_any_numbers_are_refused_or_served(data, seed):
    """What is served is the reference, what is refused is refused before a byte of the pool changes."""
    args = make_ragged(Ragged((4, 0, 9), entries=2, per_head=True), seed)
    args = (*args[:3], args[3].nan_to_num(0.5), *args[4:])
    index = data.draw(st.sampled_from([4, 5, 6, 7]))
    table = args[index].flatten().clone()
    entry = st.one_of(st.integers(-3, 40), st.integers(-(2**31), 2**31 - 1), st.sampled_from(table.tolist()))
    for at in data.draw(st.lists(st.integers(0, len(table) - 1), max_size=3)):
        table[at] = data.draw(entry)
    args = (*args[:index], table.view_as(args[index]), *args[index + 1 :])
    own, truth = packed(args), (*args[:3], args[3].clone(), *args[4:])
    try:
        out, _ = ops.attn_ragged_cpu(*own)
    except ValueError:
        assert same_bytes(own[3], args[3])
        return
    expected, _ = reference.attn_ragged(*truth)
    assert torch.allclose(out[0].double(), expected, atol=5e-6)
    assert same_bytes(own[3], truth[3])


def change(name, how):
    """The argument of that name, made wrong."""
    return {name: lambda args: how(args[name])}


REFUSED = {
    "device": (change("k", lambda x: x.to("meta")), "k is not on the CPU"),
    "several batches": (
        {name: lambda args, name=name: args[name].expand(2, -1, -1, -1) for name in "qkv"},
        "q has shape (2, 9, 2, 64); packed rows must be (1, T, H, D)",
    ),
    "starts of longs": (change("row_starts", lambda x: x.long()), "row_starts is Long; it must be Int"),
    "a matrix of starts": (change("row_starts", lambda x: x[None]), "row_starts has shape (1, 4); it must be (N + 1,)"),
    "no starts": (change("row_starts", lambda x: x[:0]), "row_starts has shape (0); it must be (N + 1,)"),
    "starts that descend": (change("row_starts", lambda x: x[[0, 2, 1, 3]]), "row_starts must ascend from 0 to the 9"),
    "starts past the end": (change("row_starts", lambda x: x + 1), "row_starts must ascend from 0 to the 9 rows of q"),
    "fewer arenas": (change("arena", lambda x: x[:2]), "arena has shape (2, 2); it must be (B, Hkv) = (3, 2)"),
    "fewer tables": (change("read_slots", lambda x: x[:2]), "read_slots has shape (2, 1, "),
    "too few rows stored": (change("write_slots", lambda x: x.clamp(max=0) + 1), "write_slots name"),
    "shared memory": (
        {"q": lambda args: args["pages"].view(-1, 64)[:18].view(1, 9, 2, 64)},
        "q shares memory with pages, which this call writes",
    ),
    "scale": (change("softmax_scale", lambda x: x * torch.nan), "softmax_scale is nan; it must be finite and above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name):
    changes, message = REFUSED[name]
    args = dict(zip(NAMES, packed(make_ragged(Ragged((4, 2, 3), entries=3), 5)), strict=True))
    args.update({key: wrong(args) for key, wrong in changes.items()})
    before = args["pages"].clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.attn_ragged_cpu(*args.values())
    assert same_bytes(args["pages"], before)
