"""`python -m benchmarks` as a command: a run end to end, a killed run, and everything it refuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from amskv_kernels.planning.memory import counted
from benchmarks.__main__ import main, plan_tasks
from benchmarks.harness import measure
from benchmarks.harness.results import committed, read, rows
from benchmarks.harness.tasks import Context
from benchmarks.report import plots, tables

ROOT = Path(__file__).parents[2]


def test_quick_run_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.QUICK_CPU_CASES", (("var-d16", ("full",), 1, "fp32"),))
    monkeypatch.setattr("benchmarks.suites.image.DIGITS", tmp_path / "none")
    path = tmp_path / "quick.json"
    assert main(["cpu", "roof", "--quick", "--device", "cpu", "--out", str(path), "--roof", "a100"]) == 0
    out = capsys.readouterr().out
    assert "PREDICTION for a100" in out
    result = committed([path])[0]
    assert result["finished"]
    assert result["ceilings"]["tb_s"] > 0
    assert {row["suite"] for row in result["rows"]} == {"cpu", "module", "roof"}
    assert all(row["prediction"] for row in result["rows"] if row["suite"] == "roof")
    assert result["missing"]["digits"] == "the example's weights are not there"
    assert "concatenation" in tables.sums(result, "cpu", "github")
    drawn = plots.draw([result], tmp_path / "images")
    assert {path.name for path in drawn} == {"cpu-steps.png", "cpu-roofline.png", "cpu-sums.png", "cpu-module.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


@pytest.mark.parametrize("draw", [plots.sums, plots.modules], ids=["sums", "modules"])
def test_every_row_is_drawn(tmp_path, monkeypatch, draw):
    """Also of more cases than a table would show, and of more contestants than there are colours."""
    result = next(one for one in committed() if rows(one, "cpu") and rows(one, "module"))
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    draw(*((result, "cpu") if draw is plots.sums else (result,)), tmp_path / "x.png")
    [axes] = figures[0].axes
    found = rows(result, "cpu" if draw is plots.sums else "module")
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"{case[0]} {case[1]}\n{counted(case[2], 'image')}, {case[3]}" for case in tables.cases(found)]
    assert len(labels) > 9
    assert all(len(bars) == len(labels) for bars in axes.containers)
    names = [f"contestant {i}" for i in range(20)]
    assert [name for name, _ in plots._coloured(names)] == names


def test_a_killed_run_leaves_a_valid_file(tmp_path):
    path = tmp_path / "killed.json"
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "plan", "--out", str(path), "--no-docs"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert read(path)["format"] == 1


def test_unknown_suites_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["warp"])
    assert "suite 'warp' is not known" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["kernel"], "suite 'kernel' needs a GPU; what runs on cpu: cpu, host, image, module, plan, roof"),
        (["plan", "--device", "cuda"], "--device is cuda; this torch sees no GPU"),
        (["plan", "--budget", "-1"], "--budget: -1 is no number of seconds above 0"),
        (["plan", "--budget", "nan"], "--budget: nan is no number of seconds above 0"),
        (["plan", "--threads", "0"], "--threads: 0 is no number of threads"),
    ],
)
def test_what_cannot_run_here_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_suites_that_share_rows_make_them_once():
    context = Context("cpu", True, {"tb_s": 0.02, "tflop_s": {"fp32": 0.2}}, measure.CpuTimer(1 << 16))
    keys = [task.key for task in plan_tasks(["cpu", "module", "image"], context, "h200")]
    assert len(keys) == len(set(keys))
    assert {key.split("/")[2] for key in keys if key.startswith("module/")} <= {"full", "ams-kv:75"}


@pytest.mark.parametrize("text", [None, "not JSON", "[]", '{"a": 1}', '{"format": 1, "rows": []}'])
@pytest.mark.parametrize("command", ["show", "compare"])
def test_what_is_no_result_is_named(command, text, tmp_path, capsys):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main([command, *[str(path)] * (2 if command == "compare" else 1)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.removeprefix("benchmarks: ").removeprefix("result ").startswith(f"{path} ")
    assert err.count("\n") == 1
