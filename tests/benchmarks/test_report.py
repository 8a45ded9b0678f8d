"""Comparisons, targets and tables, judged from rows."""

import json

from rows import HEADER

from benchmarks.__main__ import main
from benchmarks.report import compare, readme, targets


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
