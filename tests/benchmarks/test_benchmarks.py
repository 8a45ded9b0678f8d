"""The benchmark suite itself: arithmetic by hand, wrong results refused, files valid and resumed, a run end to end."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

import amskv_kernels
from amskv_kernels import ScaleSchedule
from benchmarks.harness import measure, peers
from benchmarks.harness.cases import Case, bytes_per_image, groups, kernel_cases, largest_batch, layer_kinds
from benchmarks.harness.gate import EIGHT_BITS, Gate, WrongResultError
from benchmarks.harness.inputs import CallInputs, Pool, UnavailableError, gather, group_work
from benchmarks.harness.roofs import GPUS, Ceilings, Work, attention_work
from benchmarks.suites import module, steps

ROOT = Path(__file__).parents[2]
CASE = Case("var-d16", "ams-kv:75", 1, "fp32")
# The library's kernels serve by themselves where it is built; PyTorch's are raced beside them.
RACE = ["amskv", *(f"amskv {name}" for name in peers.backends("cpu")[1][1:]), "concatenation", "SDPA"]
EIGHT_BIT = [f"amskv {name}, int8 pages" for name in peers.backends("cpu")[1] if name != "torch"]


def group_at(step, index=0):
    return [group for group in groups((CASE.model, CASE.policy)) if group.step == step][index]


def test_work_of_the_last_step_by_hand():
    # VAR-d30, 64 images with guidance: 128 sequences, 30 heads of 64, 256 queries, 424 + 256 keys, nothing stored.
    work = attention_work(128, 30, 30, 64, 256, 424, 0, 2)
    assert work.flops == 4 * 128 * 30 * 256 * 680 * 64 == 171_127_603_200
    assert work.bytes == 2 * 64 * 128 * 30 * (256 + 256 + 2 * 256 + 2 * 424) == 920_125_440
    assert work == group_work(Case("var-d30", "full", 64), groups(("var-d30", "full"))[-1])


def test_work_counts_what_is_stored_and_shared_heads():
    # 2 sequences, 4 query heads on 1 KV head of 64, 3 queries, 5 earlier keys, 3 rows stored, fp32.
    assert attention_work(2, 4, 1, 64, 3, 5, 3, 4).bytes == 2 * 64 * 4 * (2 * 4 * 3 + 2 * (3 + 5 + 3))


def test_roof_is_the_slowest_of_memory_compute_and_launch():
    ceilings = Ceilings(4.0, 800.0, launch_us=3.0)
    assert ceilings.roof_us(Work(400_000_000, 8_000_000_000)) == pytest.approx(100)
    assert ceilings.roof_us(Work(4_000_000, 160_000_000_000)) == pytest.approx(200)
    assert ceilings.roof_us(Work(4_000, 8_000)) == 3.0
    bounds = [ceilings.bound(work) for work in (Work(10**9, 1), Work(1, 10**12), Work(1, 1))]
    assert bounds == ["memory", "compute", "launch"]
    assert GPUS["h200"].ceilings == Ceilings(4.8, 989)
    assert GPUS["a100"].ceilings == Ceilings(2.04, 312)
    assert "datasheet" in GPUS["a100"].source


@pytest.mark.parametrize(
    ("model", "policy"), [("var-d30", "full"), ("var-d30", "ams-kv:84.83"), ("infinity-2b", "full")]
)
def test_groups_cover_every_layer_once(model, policy):
    found = groups((model, policy))
    case = Case(model, policy, 1)
    for step, n in enumerate(case.shape.schedule.tokens):
        own = [group for group in found if group.step == step]
        assert sorted(layer for group in own for layer in group.layers) == list(range(case.shape.layers))
        assert all(group.n == n for group in own)
        assert {group.stored for group in own} <= {0, n}
    assert sorted(layer for kind in layer_kinds(case) for layer in kind) == list(range(case.shape.layers))


def test_histories_under_full_are_the_earlier_scales():
    offsets = ScaleSchedule.named("var-256").offsets
    assert [group.history for group in groups(("var-d30", "full"))] == list(offsets)


def test_largest_batch_fits_and_one_more_does_not():
    case = Case("var-d30", "full", 1)
    most = largest_batch(case, 100 << 30)
    assert most * bytes_per_image(case) <= 0.9 * (100 << 30) < (most + 1) * bytes_per_image(case)
    # The pool alone, as the plan has it: 190 MiB an image with guidance.
    assert bytes_per_image(case) > 190 * 2**20


def test_what_cannot_be_measured_is_named():
    found = list(kernel_cases(("infinity-2b",), ("full", "no-such-policy:1"), (64, 1), 20 << 30))
    cases = [one for one in found if isinstance(one, Case)]
    assert [case.images for case in cases] == [1, largest_batch(cases[0], 20 << 30)]
    names = dict(one for one in found if not isinstance(one, Case))
    assert "does not fit" in names["infinity-2b/full/64"]
    assert names["infinity-2b/no-such-policy:1"].startswith("policy 'no-such-policy:1' is not known")


def test_gather_gives_the_rows_that_slots_name(pool):
    read, _ = pool.tables(9, 0)
    k, v = gather(pool.pages, pool.arena, read)
    at, b, h = 0, 1, 3
    for slot in read.flatten().tolist():
        page, rows = int(pool.arena[b, h]) + (slot >> 8), slot & 0xFF
        assert torch.equal(k[b, h, at : at + rows], pool.pages[page, 0, :rows])
        assert torch.equal(v[b, h, at : at + rows], pool.pages[page, 1, :rows])
        at += rows
    assert k.shape == (2, 16, at, 64)
    assert at == group_at(9, -1).history or at == group_at(9).history


@pytest.mark.parametrize("step", [0, 4, 9])
def test_all_contestants_of_a_cpu_pass_the_gate(pool, step):
    inputs = CallInputs(pool, group_at(step), 50.0)
    gate = Gate(inputs)
    line_up = peers.line_up(inputs)
    assert [name for name in line_up if name not in EIGHT_BIT] == RACE
    assert [name for name in line_up if name in EIGHT_BIT] == (EIGHT_BIT if inputs.group.history else [])
    for name, make in line_up.items():
        contestant = make()
        assert len(contestant.calls) == inputs.sets
        found = gate.check(name, contestant.output(contestant.calls[0]()), contestant.rounded)
        assert found <= gate.limit + (EIGHT_BITS if contestant.rounded else 0)
    gate.check_store()
    if inputs.group.history:
        assert gate.check("contiguous", peers.contiguous(inputs).calls[0]()[0]) <= gate.limit


def test_gate_refuses_wrong_results(pool):
    inputs = CallInputs(pool, group_at(4))
    gate = Gate(inputs)
    right = peers.ours(inputs).calls[0]()
    one_head, one_number = right.clone(), right.clone()
    one_head[1, :, 5] *= 1.1  # not among the heads compared in fp64
    one_number[0, 0, 0, 0] = torch.nan
    for wrong in (right * 1.01, one_head, one_number, right[:, :3], right.roll(1, 1)):
        with pytest.raises(WrongResultError, match="peer"):
            gate.check("peer", wrong)


def test_gate_refuses_a_wrong_store(pool):
    inputs = CallInputs(pool, group_at(4))
    gate = Gate(inputs)
    peers.ours(inputs).calls[0]()
    gate.check_store()
    inputs.qkv[0][2].add_(1)
    with pytest.raises(WrongResultError, match="do not hold the rows stored"):
        gate.check_store()


def test_wrong_peers_are_named_and_left_out(pool, context, monkeypatch):
    wrong = peers.Peer("wrong", lambda dense: lambda: dense.q * 0, ("cpu",))
    absent = peers.Peer("absent", lambda dense: lambda: dense.q, ("cpu",), "no_such_package")
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, wrong, absent))
    row = steps.step_row(pool, group_at(5), context)
    assert set(row["times"]) == {*RACE, *EIGHT_BIT}
    assert row["missing"]["wrong"].startswith("wrong result: wrong is off by 1.00e+00")
    assert row["missing"]["absent"] == "no_such_package is not installed"


def test_our_own_wrong_result_stops_the_row(pool, context, monkeypatch):
    monkeypatch.setattr(
        peers, "ours", lambda inputs, backend="auto": peers.Contestant([lambda: inputs.qkv[0][0] * 0], lambda out: out)
    )
    with pytest.raises(WrongResultError):
        steps.step_row(pool, group_at(5), context)


def test_a_row_says_all(pool, context):
    row = steps.step_row(pool, group_at(9), context)
    own = row["times"]["amskv"]
    assert own["q1_us"] <= own["median_us"] <= own["q3_us"]
    assert own["reps"] >= 3
    assert own["tb_s"] == pytest.approx(row["bytes"] / own["median_us"] * 1e-6)
    assert own["tflop_s"] == pytest.approx(row["flops"] / own["median_us"] * 1e-6)
    assert own["share_of_roof"] == pytest.approx(row["roof_us"] / own["median_us"])
    assert own["error"] < 1e-5
    assert set(row["ratios"]) == set(row["times"]) - {"amskv"}
    json.dumps(row)


def test_timer_takes_turns_and_counts_rounds():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    times = measure.CpuTimer(1 << 10).run(calls, 0.0, 4, 9)
    assert {name: len(series) for name, series in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(order[3:]) == "abccbaabccba"
    assert measure.rounds(1e3, 0.01, 3, 21) == 10
    assert measure.ratio([2, 30, 4], [1, 10, 2]) == 2
    assert measure.summary([3.0]) == {"median_us": 3.0, "q1_us": 3.0, "q3_us": 3.0, "reps": 1}


@pytest.mark.parametrize("model", ["var-d16", "infinity-2b@infinity-0.06m-1.000"])
def test_module_rows(model, context):
    case = Case(model, "full", 1, "fp32")
    row = module.module_row(Pool(case, "cpu"), layer_kinds(case)[0], context)
    assert set(row["times"]) == {"amskv", "stock"}
    assert row["times"]["stock"]["error"] < 1e-5
    tokens = case.shape.schedule.total * case.shape.layers * case.shape.heads * case.shape.head_dim
    assert row["memory"]["stock_cache_mib"] == tokens * 8 * 2 / 2**20


def test_module_check_refuses(context):
    case = Case("var-d16", "ams-kv:75", 1, "fp32")
    layer = module.Layer(Pool(case, "cpu"), layer_kinds(case)[0][0])
    with pytest.raises(WrongResultError):  # stock sees every scale, this layer does not
        module.check(layer, "stock", layer.stock(), layer.visible(9))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_peers_for_every_row_of_a_wide_head_policy(backend):
    pool = Pool(CASE, "cpu")
    inputs = CallInputs(pool, group_at(6))
    read, write = inputs.tables[0]
    ragged = read.expand(1, 16, -1).contiguous()
    ragged[0, 1, -1] = 0
    inputs.tables = [(ragged, write)]
    gate = Gate(inputs)
    with amskv_kernels.backend(backend):
        out = peers.ours(inputs).calls[0]()
    assert gate.check("ours", out) <= gate.limit
    for make in (lambda: peers.concatenation(inputs), lambda: peers.contiguous(inputs), lambda: inputs.dense(0)):
        with pytest.raises(UnavailableError, match="heads hold different numbers"):
            make()


def test_packages_get_the_layouts_they_document(pool, monkeypatch):
    """FlashInfer: pages (N, 2, 16, Hkv, D) behind index lists; FlashAttention-3: (B, n, H, D)."""

    class Wrapper:
        def __init__(self, workspace, layout):
            assert layout == "NHD"

        def plan(
            self, q_ends, page_ends, pages, last, heads, kv_heads, head_dim, page_size, causal, sm_scale, q_data_type
        ):
            assert not causal
            self.q_ends, self.page_ends, self.pages, self.last, self.scale = q_ends, page_ends, pages, last, sm_scale

        def run(self, q, cache):
            out = torch.empty_like(q)
            for b in range(len(self.last)):
                mine = cache[self.pages[self.page_ends[b] : self.page_ends[b + 1]].long()]
                rows = (mine.shape[0] - 1) * 16 + int(self.last[b])
                k, v = (mine[:, i].flatten(0, 1)[:rows].transpose(0, 1) for i in (0, 1))
                part = slice(int(self.q_ends[b]), int(self.q_ends[b + 1]))
                scores = (q[part].transpose(0, 1) @ k.mT) * self.scale
                out[part] = (scores.softmax(-1) @ v).transpose(0, 1)
            return out

    def flash_attn_func(q, k, v, softmax_scale, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)

    for name, content in (
        ("flashinfer", {"BatchPrefillWithPagedKVCacheWrapper": Wrapper}),
        ("flash_attn_interface", {"flash_attn_func": flash_attn_func}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    inputs = CallInputs(pool, group_at(7))
    gate = Gate(inputs)
    for which in peers.PEERS:
        if which.name in ("FlashInfer", "FlashAttention-3", "flash"):
            contestant = peers.peer(which, inputs)
            assert gate.check(which.name, contestant.output(contestant.calls[0]())) <= gate.limit
