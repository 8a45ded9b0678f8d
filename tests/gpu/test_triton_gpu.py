"""The Triton kernels on the device: everything the interpreter checks, and what only a device can show."""

from __future__ import annotations

import random
from dataclasses import replace

import large_logits
import pytest
import torch
from attn_cases import Case, make
from extra_cases import (
    BF16,
    COMPACT_CASES,
    HALF,
    LARGE,
    QK_PARTS,
    QK_SHAPES,
    SCORE_CASES,
    SMALL,
    make_compact,
    make_qk,
    make_scores,
)

import amskv_kernels
from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.ops import reference
from amskv_kernels.planning.layout import ROWS_BITS, ROWS_MASK

ops = torch.ops.amskv
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def forced():
    torch.backends.cuda.matmul.allow_tf32 = False
    with amskv_kernels.backend("triton"):
        yield


def on(device, *args):
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in args)


def same_bytes(x, y):
    return torch.equal(x.cpu().contiguous().view(torch.uint8), y.cpu().contiguous().view(torch.uint8))


def gathered(args):
    """Per sequence and query head: the keys and values a call attends to, in the pages' own dtype."""
    q, k, v, pages, arena, read_slots, _, _ = args
    group = q.shape[2] // k.shape[2]
    arenas, tables = arena.tolist(), read_slots.tolist()
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            own = tables[b % len(tables)][(h // group) % len(tables[0])]
            named = [(arenas[b][h // group] + (s >> ROWS_BITS), s & ROWS_MASK) for s in own if s & ROWS_MASK]
            yield (
                b,
                h,
                *(
                    torch.cat([*(pages[page, i, :rows] for page, rows in named), x[b, :, h // group]])
                    for i, x in enumerate((k, v))
                ),
            )


def errors(args, out, lse):
    """Largest error of the output, of PyTorch's own attention in this dtype, and of the log-sum-exp; all to fp64."""
    q, scale = args[0], args[-1]
    ours = theirs = lse_error = 0.0
    for b, h, keys, values in gathered(args):
        scores = scale * q[b, :, h].double() @ keys.double().T
        truth = scores.softmax(-1) @ values.double()
        own = torch.nn.functional.scaled_dot_product_attention(
            q[b, :, h][None, None], keys[None, None], values[None, None], scale=scale
        )[0, 0]
        ours = max(ours, float((out[b, :, h] - truth).abs().max()))
        theirs = max(theirs, float((own - truth).abs().max()))
        lse_error = max(lse_error, float((lse[b, h] - scores.logsumexp(-1)).abs().max()))
    return ours, theirs, lse_error


def check_attn(args, device="cuda"):
    """One call on the device: output, log-sum-exp and every byte of the pool. Returns our error over PyTorch's."""
    pages = args[3].clone()
    reference.append(args[1], args[2], pages, args[4], args[6])
    args = on(device, *args)
    before = on(device, *args[:3], args[3].clone(), *args[4:])
    out, lse = ops.attn(*args)
    ours, theirs, lse_error = errors(before, out, lse)
    assert ours <= 2 * theirs + 2e-6
    assert lse_error < 1e-4
    assert same_bytes(args[3], pages), "every byte, NaN included"
    return ours / max(theirs, 1e-12)


@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[2]], ids=str)
def test_first_triton(case):
    """What a GPU session looks at first: packed heads, a whole tile with a store, keys split among programs."""
    check_attn(make(case))


# Every case in its own element type and in one more: all three would be half as many compilations again.
@pytest.mark.parametrize(
    "case",
    [
        replace(case, dtype=dtype)
        for i, case in enumerate(SMALL + LARGE)
        for dtype in sorted({case.dtype, DTYPES[i % 3]}, key=str)
    ],
    ids=str,
)
def test_attn(case):
    check_attn(make(case))


# Head size, page size, query heads per KV head and element type are compiled into a kernel, with the tile on top: calls
# drawn from a few of their combinations share most kernels.
LAYOUTS = [
    (64, 16, 1, BF16), (64, 64, 1, HALF), (64, 128, 4, BF16), (96, 32, 1, HALF),
    (96, 64, 4, BF16), (128, 16, 4, HALF), (128, 32, 1, BF16), (128, 128, 1, HALF),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[4], LARGE[5], LARGE[6]], ids=str)
def test_attn_with_logits_of_every_size(case, dtype):
    args = make(replace(case, dtype=dtype))
    large_logits.enlarge(args[0], args[1], args[3], seed=1)
    truth = reference.attn(*args[:3], args[3].clone(), *args[4:])
    out, lse = ops.attn(*on("cuda", *args))
    large_logits.check(out.cpu(), lse.cpu(), *truth, float(args[2].abs().max()))


def test_attn_on_500_random_calls(measured):
    rng, ratios = random.Random(0), []
    for i in range(500):
        (head_dim, page_size, group, dtype), kv_heads = rng.choice(LAYOUTS), rng.choice([1, 2, 4])
        history = tuple(rng.choice([page_size] * 3 + [rng.randint(0, page_size)]) for _ in range(rng.randint(0, 12)))
        n = rng.choice([1, 2, 4, 9, 16, 17, 25, 36, 64, 100, 169, 256, 300])
        stored = (page_size,) * (n // page_size) + ((n % page_size,) if n % page_size else ())
        case = Case(
            batch=rng.choice([1, 2]), n=n, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim,
            page_size=page_size, history=history, stored=rng.choice([(), stored]), per_head=rng.random() < 0.2,
            per_batch=rng.random() < 0.2, dtype=dtype,
        )  # fmt: skip
        ratios.append(check_attn(make(case, seed=i)))
    measured["attn error over PyTorch's, 500 random calls: worst, mean"] = [max(ratios), sum(ratios) / len(ratios)]


@pytest.mark.parametrize(("n", "history", "head_dim"), [(4096, 6425, 128), (1024, 1216, 64), (1, 10240, 64)])
def test_attn_at_full_size(n, history, head_dim):
    page_size = 64
    pages = -(-history // page_size)
    rows = (page_size,) * (pages - 1) + (history - page_size * (pages - 1),)
    stored = (page_size,) * (n // page_size) if n >= page_size else (n,)
    case = Case(batch=1, n=n, heads=2, kv_heads=2, head_dim=head_dim, page_size=page_size, history=rows, stored=stored,
                dtype=torch.bfloat16)  # fmt: skip
    check_attn(make(case))


@pytest.mark.parametrize("case", [c for c in SMALL + LARGE if c.stored], ids=str)
def test_append(case):
    args = make(case)
    expected = args[3].clone()
    reference.append(args[1], args[2], expected, args[4], args[6])
    k, v, pages, arena, slots = on("cuda", *args[1:5], args[6])
    ops.append(k, v, pages, arena, slots)
    assert same_bytes(pages, expected)


QK_WIDE = [*QK_SHAPES, (4, 256, 30, 30, 64)]


@pytest.mark.parametrize(
    ("parts", "shape", "dtype"),  # every part in every element type, over the shapes
    [
        pytest.param(parts, shape, DTYPES[(i + j) % 3], id=f"{name}-{shape}-{DTYPES[(i + j) % 3]}")
        for i, (name, parts) in enumerate(QK_PARTS.items())
        for j, shape in enumerate(QK_WIDE)
    ],
)
def test_prepare_qk(parts, shape, dtype):
    rounding = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    arguments = make_qk(shape, parts, dtype)
    truths = reference.prepare_qk(**arguments)
    arguments = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    for x, truth in zip(ops.prepare_qk(**arguments), truths, strict=True):
        assert x.dtype == dtype
        assert ((x.double().cpu() - truth).abs() <= rounding * truth.abs() + 2e-6).all()


@pytest.mark.parametrize("mode", ["softmax", "sum_logits"])
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_window_scores(case, mode):
    arguments = make_scores(case, window=16)
    truth = reference.window_scores(*arguments, mode)
    scores = ops.window_scores(*on("cuda", *arguments), mode).cpu()
    assert torch.equal(scores.isneginf(), truth.isneginf())
    torch.testing.assert_close(scores.double(), truth, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(("case", "kept"), COMPACT_CASES, ids=str)
def test_compact(case, kept):
    pages, arena, src_slots, k, v, keep, dst_slots = make_compact(case, kept)
    expected = pages.clone()
    reference.compact(expected, arena, src_slots, k, v, keep, dst_slots)
    device = on("cuda", pages, arena, src_slots, k, v, keep, dst_slots)
    ops.compact(*device)
    assert same_bytes(device[0], expected)


@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[2]], ids=str)
def test_another_stream(case):
    """Inputs that are ready late on a side stream: a launch on any other stream would read what was there before."""
    args = on("cuda", *make(case))
    expected, _ = ops.attn(*args[:3], args[3].clone(), *args[4:])
    late = [torch.full_like(x, torch.nan) for x in args[:3]]
    pages = args[3].clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for x, y in zip(late, args[:3], strict=True):
            x.copy_(y)
        out, _ = ops.attn(*late, pages, *args[4:])
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs a second GPU")
@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[2]], ids=str)
def test_a_second_device_that_is_not_the_current_one(case):
    assert torch.cuda.current_device() == 0
    check_attn(make(case), device="cuda:1")


@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[3]], ids=str)
def test_a_pool_beyond_32_bit_addresses(case):
    args = list(make(case))
    pages, arena = args[3], args[4]
    far = 2**31 // pages[0].numel() + 5  # pages before those of the case
    if torch.cuda.mem_get_info()[0] < 3 * far * pages[0].numel() * pages.element_size():
        pytest.skip("needs three such pools of memory")
    expected = pages.clone()
    reference.append(args[1], args[2], expected, arena, args[6])
    near = on("cuda", *args)
    truth, _ = ops.attn(*near)
    pool = torch.full((far + len(pages), *pages.shape[1:]), torch.nan, dtype=pages.dtype, device="cuda")
    pool[far:] = pages.cuda()
    out, _ = ops.attn(*near[:3], pool, (arena + far).cuda(), *near[5:])
    assert torch.equal(out, truth)
    assert same_bytes(pool[far:], expected)
    assert pool[:far].isnan().all()


@pytest.mark.parametrize("case", [SMALL[2], LARGE[1], LARGE[2], LARGE[6]], ids=str)
def test_fifty_runs_are_one(case):
    args = on("cuda", *make(case))
    first = ops.attn(*args[:3], args[3].clone(), *args[4:])
    for _ in range(50):
        again = ops.attn(*args[:3], args[3].clone(), *args[4:])
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_every_op_replays_in_a_graph():
    """Outputs and pages are poisoned between replays; the inputs change in place."""
    args = on("cuda", *make(Case(n=25, history=(16, 14), stored=(16, 9), dtype=torch.float16)))
    window, keep = args[0][:, :16], torch.arange(25, device="cuda").expand(2, 2, 25).contiguous()
    qkv = torch.randn(2, 25, 6, 64, device="cuda").half()

    def calls():
        q, k = ops.prepare_qk(qkv, 2, None, None, None, True)
        out, lse = ops.attn(q, k, *args[2:])
        scores = ops.window_scores(window, k, args[3], args[4], args[5], 0.125)
        ops.compact(args[3], args[4], args[5], k, args[2], keep, args[6])
        return q, k, out, lse, scores

    for _ in range(2):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls()
    for _ in range(3):
        qkv.copy_(torch.randn_like(qkv))
        expected = [x.clone() for x in calls()]
        stored = args[3].clone()
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
        assert same_bytes(args[3], stored)


def test_no_call_waits_for_the_device():
    args = on("cuda", *make(LARGE[1]))
    ops.attn(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.attn(*args)
        ops.append(args[1], args[2], args[3], args[4], args[6])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_opcheck():
    args = make(Case(n=25, history=(16, 14), stored=(16, 9), dtype=torch.float16))
    args = on("cuda", *args[:3], args[3].nan_to_num(0), *args[4:])
    torch.library.opcheck(ops.attn.default, args)
    torch.library.opcheck(ops.append.default, (args[1], args[2], args[3], args[4], args[6]))


def test_compiled_in_one_graph_with_a_dynamic_batch():
    def block(qkv, pages, arena, read_slots, write_slots):
        q, k = ops.prepare_qk(qkv, 2, None, None, None, True)
        out, _ = ops.attn(q, k, qkv[:, :, 4:], pages, arena, read_slots, write_slots, 1.0)
        return out.flatten(2) * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        case = Case(batch=batch, n=25, history=(16, 14), stored=(16, 9), dtype=torch.float16)
        _, _, _, pages, arena, read_slots, write_slots, _ = on("cuda", *make(case))
        qkv = torch.randn(batch, 25, 6, 64, device="cuda").half()
        other = pages.clone()
        torch.testing.assert_close(
            compiled(qkv, pages, arena, read_slots, write_slots), block(qkv, other, arena, read_slots, write_slots)
        )
        assert same_bytes(pages, other)


@pytest.mark.parametrize("policy", [Full(), AMSKV(2, 1)], ids=lambda p: type(p).__name__)
def test_a_whole_generation_is_one_graph(policy, monkeypatch):
    """All steps, sampling included, with the seed set before each run; every output poisoned between replays."""
    from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig

    schedule = ScaleSchedule.named("var-256")
    torch.manual_seed(0)
    vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, schedule=schedule)).cuda().eval()
    config = VARConfig(schedule, depth=3, embed_dim=256, num_heads=4, num_classes=10)
    var = VAR(config).cuda().eval()
    plan = CachePlan.build(schedule, policy, 3)
    cache = PagedKVCache(plan, batch=4, kv_heads=4, head_dim=64, dtype=torch.float16, device="cuda")
    labels = torch.tensor([1, 2], device="cuda")
    monkeypatch.setattr(VAR, "_check_sampling", lambda *_, **__: None)  # looks at the labels on the host

    @torch.no_grad()
    def generate():
        cache.reset()
        with torch.autocast("cuda", torch.float16):
            return var.generate(vae, labels, cache)

    torch.cuda.manual_seed(7)
    expected = [x.clone() for x in generate()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = generate()
    for _ in range(3):
        for x in captured:
            x.fill_(-1)
        cache.pages.fill_(torch.nan)
        torch.cuda.manual_seed(7)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured.tokens, expected[1])
        torch.testing.assert_close(captured.images, expected[0])
