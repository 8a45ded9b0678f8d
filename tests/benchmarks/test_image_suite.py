"""Whole images: gated, timed, on a pretended GPU."""

import contextlib

import pytest
import torch

from amskv_kernels import CachePlan, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, VARConfig, VQVAEConfig
from benchmarks.__main__ import plan_tasks
from benchmarks.harness import measure
from benchmarks.harness.cases import POLICIES
from benchmarks.harness.gate import WrongResultError
from benchmarks.harness.inputs import UnavailableError
from benchmarks.suites import image


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
