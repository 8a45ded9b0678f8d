"""The benchmark suite itself: arithmetic by hand, wrong results refused, files valid and resumed, a run end to end."""

import contextlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from amskv_kernels import CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, VARConfig, VQVAEConfig
from benchmarks.__main__ import main, plan_tasks
from benchmarks.harness import measure, peers
from benchmarks.harness.cases import POLICIES, Case, bytes_per_image, groups, kernel_cases, largest_batch, layer_kinds
from benchmarks.harness.gate import Gate, WrongResultError
from benchmarks.harness.inputs import CallInputs, Pool, UnavailableError, gather, group_work
from benchmarks.harness.results import Run, read
from benchmarks.harness.roofs import GPUS, Ceilings, Work, attention_work
from benchmarks.harness.tasks import Context, Task, run_tasks
from benchmarks.report import compare, readme, targets
from benchmarks.suites import image, module, steps

ROOT = Path(__file__).parents[2]
HEADER = {"commit": "c0ffee", "dirty": False, "sources": "c0de", "quick": False, "ceilings": {}, "machine": {
    "device": "cpu", "name": "a processor", "cpu": "a processor", "threads": 2, "torch": "2.13.0"}}  # fmt: skip
CASE = Case("var-d16", "ams-kv:75", 1, "fp32")


@pytest.fixture(scope="module")
def pool():
    return Pool(CASE, "cpu")


@pytest.fixture
def context():
    measured = {"tb_s": 0.02, "tflop_s": {"fp32": 0.2, "bf16": 0.4}}
    return Context("cpu", True, measured, measure.CpuTimer(1 << 16))


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
    assert list(line_up) == ["amskv", "concatenation", "SDPA"]
    for name, make in line_up.items():
        contestant = make()
        assert len(contestant.calls) == inputs.sets
        assert gate.check(name, contestant.output(contestant.calls[0]())) <= gate.limit
    gate.check_store()
    if inputs.group.history:
        assert gate.check("contiguous", peers.contiguous(inputs).calls[0]()[0]) <= gate.limit


def test_gate_refuses_wrong_results(pool):
    inputs = CallInputs(pool, group_at(4))
    gate = Gate(inputs)
    right = peers.ours(inputs).calls[0]()[0]
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
    assert set(row["times"]) == {"amskv", "concatenation", "SDPA"}
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


def tasks_of(run_log, count=4, fail_at=None):
    def make(i):
        if i == fail_at:
            raise KeyboardInterrupt
        run_log.append(i)
        return {"suite": "cpu", "times": {}}

    return [Task(f"row {i}", 1.0, lambda i=i: make(i)) for i in range(count)]


def test_an_interrupted_run_leaves_a_valid_file_and_goes_on(tmp_path):
    path, done = tmp_path / "run.json", []
    with pytest.raises(KeyboardInterrupt), Run(path, HEADER) as run:
        run_tasks(tasks_of(done, fail_at=2), run, None, quiet=True)
    assert [row["key"] for row in read(path)["rows"]] == ["row 0", "row 1"]
    assert read(path)["finished"] is None
    with Run(path, HEADER) as run:
        run.begin(["cpu"], [])
        assert run_tasks(tasks_of(done), run, None, quiet=True) == (True, [])
        run.finish(["cpu"])
    assert done == [0, 1, 2, 3]
    assert read(path)["finished"]
    assert read(path)["done"] == ["cpu"]


def test_a_suite_that_is_done_is_measured_anew_and_leaves_others_alone(tmp_path):
    path, done = tmp_path / "run.json", []
    with Run(path, HEADER) as run:
        run_tasks(tasks_of(done, 2), run, None, quiet=True)
        run.finish(["cpu"])
    with Run(path, HEADER) as run:
        run.begin(["image"], ["a picture"])
        run.add("a picture", {"suite": "image"})
        run.finish(["image"])
    with Run(path, HEADER) as run:
        run.begin(["cpu"], ["row 0", "row 1"])
        run_tasks(tasks_of(done, 2), run, None, quiet=True)
        run.finish(["cpu"])
    assert done == [0, 1, 0, 1]
    assert {row["key"] for row in read(path)["rows"]} == {"row 0", "row 1", "a picture"}
    assert read(path)["done"] == ["cpu", "image"]


@pytest.mark.parametrize("change", [{"sources": "d00d"}, {"quick": True}, {"machine": {"device": "cuda"}}])
def test_other_sources_or_another_machine_start_anew(tmp_path, change):
    with Run(tmp_path / "run.json", HEADER) as run:
        run.add("row", {"suite": "cpu"})
    with Run(tmp_path / "run.json", {**HEADER, **change}) as run:
        assert "row" not in run
    assert not list(tmp_path.glob(".*"))


def test_a_deadline_stops_between_rows(tmp_path):
    done = []
    with Run(tmp_path / "run.json", HEADER) as run:
        complete, _ = run_tasks(tasks_of(done), run, time.monotonic() - 1, quiet=True)
    assert not complete
    assert not done


def test_failures_are_named(tmp_path):
    def fail(error):
        raise error

    errors = {
        "wrong": WrongResultError("off"),
        "gone": UnavailableError("not here"),
        "large": torch.OutOfMemoryError("x"),
    }
    tasks = [Task(key, 1.0, lambda error=error: fail(error)) for key, error in errors.items()]
    with Run(tmp_path / "run.json", HEADER) as run:
        assert run_tasks(tasks, run, None, quiet=True) == (True, ["wrong"])
    assert read(tmp_path / "run.json")["missing"] == {"wrong": "wrong result: off", "gone": "not here", "large": "x"}


def a_row(key, median, spread=1.0, **more):
    one = {"median_us": median, "q1_us": median - spread, "q3_us": median + spread, "reps": 9}
    return {"key": key, "suite": "kernel", "times": {"amskv": one}, **more}


def test_compare_finds_what_changed(tmp_path, capsys):
    before = {**HEADER, "rows": [a_row("same", 100), a_row("slow", 100), a_row("noise", 100, 30), a_row("fast", 100)]}
    after = {**HEADER, "rows": [a_row("same", 101), a_row("slow", 120), a_row("noise", 120, 30), a_row("fast", 50)]}
    for name, result in (("a", before), ("b", after)):
        whole = {"format": 1, "started": "2026-01-01", "finished": "2026-01-01", "missing": {}, **result}
        (tmp_path / f"{name}.json").write_text(json.dumps(whole), encoding="utf-8")
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert main(["compare", a, b]) == 1
    out = capsys.readouterr().out
    assert "slower: 1" in out
    assert "1.20×" in out
    assert "faster: 1" in out
    assert "4 rows in common, 2 unchanged" in out
    assert main(["compare", a, a]) == 0
    assert main(["compare", a, b, "--above", "1.3"]) == 0
    found = compare.changes(before, after)
    assert [change.key for change in compare.slower(found, 1.05)] == ["slow"]


def test_compare_takes_images_and_plans_too():
    rows = [
        {"key": "digits", "caches": {"full": {"seconds": [2.0, 2.1, 2.2]}, "stock": {"seconds": [3.0]}}},
        {"key": "image", "cache": "full", "seconds": [1.0]},
        {"key": "plan", "plan_ms": 4.0},
    ]
    found = compare.changes({"rows": rows}, {"rows": rows})
    assert [(c.key, c.contestant) for c in found] == [("digits", "full"), ("image", "full"), ("plan", "planner")]
    assert [c.before_us for c in found] == [2.1e6, 1e6, 4e3]
    assert len(compare.changes({"rows": rows}, {"rows": rows}, peers=True)) == 4


def test_targets_are_judged_from_rows():
    def step(n, ratio):
        return a_row(f"{n}", 10.0, model="var-d30", policy="full", images=64, dtype="bf16", step=n, n=100, history=10,
                     bytes=1, head_dim=64, launch_us=1.0, ratios={"cuDNN": ratio, "flash": ratio + 1})  # fmt: skip

    gpu = {**HEADER, "machine": {"device": "cuda", "name": "NVIDIA H200"}, "file": "h200.json"}
    good = {**gpu, "rows": [step(0, 1.2), step(1, 1.3)]}
    bad = {**gpu, "rows": [step(0, 1.2), step(1, 0.9)]}
    target = targets.TARGETS[0]
    assert targets.verdict(target, [good])[0].met
    assert not targets.verdict(target, [bad])[0].met
    assert targets.verdict(target, [bad])[0].figure.startswith("least 0.90×, geometric mean 1.04×")
    assert targets.verdict(target, [{**good, "machine": {"device": "cuda", "name": "NVIDIA L4"}}]) is None
    assert "not measured yet" in targets.render([], "github")


def test_blocks_without_results_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.harness.results.FOLDER", tmp_path)
    for name in ("plans", "gpu-steps", "cpu-sums", "roofs", "pictures", "cpu-digits"):
        page = readme.fill(f"<!-- table: {name} -->\n<!-- end -->")
        assert readme.NONE_YET in page


def test_peers_for_every_row_of_a_wide_head_policy():
    pool = Pool(CASE, "cpu")
    inputs = CallInputs(pool, group_at(6))
    read, write = inputs.tables[0]
    ragged = read.expand(1, 16, -1).contiguous()
    ragged[0, 1, -1] = 0
    inputs.tables = [(ragged, write)]
    gate = Gate(inputs)
    out = peers.ours(inputs).calls[0]()[0]
    assert gate.check("ours", out) <= gate.limit
    for make in (lambda: peers.concatenation(inputs), lambda: peers.contiguous(inputs), lambda: inputs.dense(0)):
        with pytest.raises(UnavailableError, match="heads hold different numbers"):
            make()


def test_batches_are_foretold_and_confirmed():
    asked = []

    def peak(images):
        asked.append(images)
        return None if images > 200 else 10_000 + 400 * images

    assert image.largest_batch(peak, 10_000 + 400 * 203)[0] == 200
    assert len(asked) <= 5
    assert image.largest_batch(lambda images: None, 1) == (0, {"8": None})


SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3)])


@pytest.fixture
def painter():
    torch.manual_seed(0)
    sizes = {"schedule": SCHEDULE, "z_channels": 8, "vocab_size": 32}
    var = VAR(VARConfig(depth=2, embed_dim=64, num_heads=1, num_classes=3, **sizes)).eval().requires_grad_(False)
    vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, **sizes)).eval().requires_grad_(False)
    return image.Painter(var, vae, torch.float32, "cpu", {"top_k": 5})


def test_whole_images_are_gated(painter):
    assert image.check(painter, "full") < 1e-5
    assert image.check(painter, "stock") is None
    assert isinstance(painter.attention("stock", 1), ConcatKVCache)
    cache = painter.attention("full", 2)
    assert isinstance(cache, PagedKVCache)
    assert painter.draw(cache, painter.labels(2)).shape == (2, 3, 6, 6)
    plan = CachePlan.build(SCHEDULE, Full(), 2)

    class Forgetful(ConcatKVCache):
        def attend(self, layer, q, k, v, softmax_scale):
            self.reset()
            return super().attend(layer, q, k, v, softmax_scale)

    with pytest.raises(WrongResultError):
        painter.draw(image.Checked(Forgetful(), plan, 1e-3), painter.labels(1))


def test_random_painters_draw_in_16_bit():
    sizes = {"schedule": SCHEDULE, "z_channels": 8, "vocab_size": 32}
    var = VARConfig(depth=2, embed_dim=64, num_heads=1, num_classes=3, **sizes)
    vae = VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, **sizes)
    painter = image.random_painter("small", "cpu", torch.bfloat16, var, vae)
    painter.sampling = {"top_k": 5}
    assert image.check(painter, "full") < 2e-2
    images = painter.draw(painter.attention("full", 33), painter.labels(33))
    assert images.shape == (33, 3, 6, 6)
    assert images.dtype == torch.float32


def test_cpu_tasks_name_policies_that_are_not_there(context):
    context.quick = False
    keys = [task.key for task in plan_tasks(["cpu", "plan", "roof"], context, "h200")]
    assert len(keys) == len(set(keys))
    unknown = [policy for policy in POLICIES if policy in context.absent]
    assert all(context.absent[policy].startswith(f"policy {policy!r}: ") for policy in unknown)
    for policy in unknown:
        assert not any(f"/{policy}/" in key for key in keys)


class FakeCuda:
    """A device whose clock moves one millisecond per call; what is captured runs again at every replay."""

    def __init__(self, monkeypatch, capturable=True):
        self.now, self.captured, self.capturable = 0.0, 0, capturable
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = fake.now

            def synchronize(self):
                assert self.at is not None

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.now += 1.0

        @contextlib.contextmanager
        def capture(graph):
            fake.captured += 1
            if not fake.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

        class Stream:
            def wait_stream(self, other):
                pass

        class Properties:
            L2_cache_size, total_memory, name = 1 << 10, 141 * 10**9, "NVIDIA H200"

        for name, value in (
            ("Event", Event), ("CUDAGraph", Graph), ("graph", capture), ("Stream", Stream),
            ("current_stream", lambda: Stream()), ("stream", lambda stream: contextlib.nullcontext()),
            ("synchronize", lambda: None), ("current_device", lambda: 0), ("empty_cache", lambda: None),
            ("get_device_properties", lambda index: Properties), ("reset_peak_memory_stats", lambda: None),
            ("max_memory_allocated", lambda: 5 << 30), ("set_per_process_memory_fraction", self.cap),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
        self.caps = []

    def cap(self, share):
        self.caps.append(round(share, 3))


def test_gpu_timer_replays_graphs_between_events(monkeypatch):
    fake, made = FakeCuda(monkeypatch), []
    timer = measure.CudaTimer()
    calls = {name: [lambda name=name: made.append(name)] * 4 for name in "ab"}
    times = timer.run(calls, 0.0, 3, 9, frozenset("b"))
    assert times["a"] == [250.0, 250.0, 250.0]  # one replay of four calls takes a millisecond
    assert fake.captured == 1
    assert [timer.how(name) for name in "ab"] == ["graph", "events"]
    assert made.count("b") == 4 * (2 + 1 + 3)


def test_gpu_timer_falls_back_to_events(monkeypatch):
    FakeCuda(monkeypatch, capturable=False)
    timer = measure.CudaTimer()
    assert len(timer.run({"a": [lambda: None]}, 0.0, 3, 9)["a"]) == 3
    assert timer.how("a") == "events"


def test_image_speed_and_capacity_on_a_pretended_gpu(monkeypatch, painter):
    fake = FakeCuda(monkeypatch)
    row = image._speed(painter, "full", 2, graph=True)
    assert row["peak_gib"] == 5.0
    assert row["images_s"] == pytest.approx(2 / 1e-3)
    assert image.peak_bytes(painter, "stock", 2) == 5 << 30
    with image.memory_cap(80):
        assert fake.caps == [0.567]
    assert fake.caps == [0.567, 1.0]
    with pytest.raises(UnavailableError, match="less than 200 GB"), image.memory_cap(200):
        pass
    fake.capturable = False
    with pytest.raises(UnavailableError, match="cannot be captured: operation not permitted"):
        image._speed(painter, "full", 2, graph=True)


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
