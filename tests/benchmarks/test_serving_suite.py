"""Serving measured: the clock, every server on a small model, and what is made of the rows."""

import pytest
import torch
from matplotlib.image import imread
from small_models import pair

from amskv_kernels.schedule import ScaleSchedule
from benchmarks.report import serving as report
from benchmarks.report import tables, targets
from benchmarks.suites import image, serving

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3)])


def test_the_clock_waits_for_somebody_and_runs_while_there_is_work(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(serving.time, "perf_counter", lambda: now[0])
    tick = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    clock = serving.Clock([1.0, 1.5, 9.0])
    assert clock.newcomers() == 1 and clock.now == 1.0
    clock.run(lambda: (tick(0.5), clock.note(1, 0.2), tick(1.5), clock.note(1, 0.6)))
    clock.finish(1)
    assert clock.newcomers() == 1 and clock.now == 3.0, "one came while the first was drawn"
    clock.run(lambda: tick(1.0))
    clock.note(1, 0.5)
    clock.finish(1)
    assert clock.newcomers() == 1 and clock.now == 9.0
    clock.run(lambda: tick(1.0))
    clock.note(2, 1.0)
    clock.finish(1)
    assert clock.finished == [3.0, 4.0, 10.0]
    row = clock.row()
    assert row["images_s"] == pytest.approx(3 / 9.0)
    assert row["p50_s"] == pytest.approx(2.0) and row["inside"] == pytest.approx((2 + 1 + 2) / 4)
    assert row["pool_share"] == pytest.approx((0.5 * 0.2 + 1.5 * 0.6 + 0.5 + 1.0) / 4)


@pytest.fixture(scope="module")
def rows():
    var, vae = pair(SCHEDULE, embed_dim=128)
    painter = image.Painter(var, vae, torch.float32, "cpu", {"cfg": 2.0, "top_k": 5})
    setting = serving.Setting("small", "full", 2, 6, (1.0, 1.5))
    with torch.no_grad():
        rate = serving.capacity(painter, "full", 2)
        return [serving.serving_row(painter, setting, load, rate) for load in setting.loads]


def test_all_servers_draw_all_images_in_the_same_memory(rows):
    for row in rows:
        assert list(row["servers"]) == [serving.ENGINE, serving.LOCKSTEP, serving.SINGLE]
        for one in row["servers"].values():
            assert one["images_s"] > 0 and 0 < one["p50_s"] <= one["p99_s"] and 0 < one["pool_share"] <= 1
        assert row["servers"][serving.LOCKSTEP]["inside"] <= 2 and row["servers"][serving.SINGLE]["inside"] == 1
        assert row["pool_mib"] > 0


def test_rows_become_a_table_a_picture_and_a_verdict(rows, tmp_path):
    result = {"rows": rows, "machine": {"device": "cpu", "name": "some", "threads": 1, "torch": "2"}, "file": "a.json"}
    found = tables.serving(result, "github")
    assert found.count("lockstep") == 2 and "1.5×" in found
    report.picture(result, tmp_path / "serving.png")
    assert imread(tmp_path / "serving.png").shape[0] > 100
    target = next(target for target in targets.TARGETS if target.what.startswith("serving"))
    gain, p99 = report.gain(rows[1])
    verdict = target.judge(result)
    assert f"{gain:.2f}×" in verdict.figure and verdict.met == (gain >= 1.3 and p99 <= 1)
    assert target.judge({"rows": []}) is None
