"""The shoot-out's arithmetic: settings within their bytes, and tables that say what the rows do."""

import json
from pathlib import Path

import pytest
import torch
from test_allocation import random_losses

from amskv_kernels import CachePlan, ScaleSchedule
from amskv_kernels.policies import Drafters, HeadOrders, LeastLoss
from examples import contestants, demo, shootout, tables, training
from examples.subjects import subject

RESULT = subject("digits").results / "shootout.json"
VAR_256 = ScaleSchedule.named("var-256")


def test_every_contestant_stays_within_its_share():
    losses = random_losses(VAR_256, 4, 2, 0)
    scores = losses.mass.mean(2).tolist()
    drafters = Drafters(VAR_256.sizes, ((0.0,) * 10,) * 4, ((0,),) * 10, 16, 1)
    measured = contestants.Measured(losses, HeadOrders.from_scores(scores, VAR_256), drafters)
    policies = contestants.contestants(VAR_256, 4, measured)
    names = {name for name, _ in policies}
    assert names >= {*contestants.FITTED, *contestants.RIVALS, *contestants.ABLATION, "AMS-KV", "AMS-KV, calibrated"}
    assert len(policies) == len(names) * len(contestants.SHARES)
    for (name, share), policy in policies.items():
        plan = CachePlan.build(VAR_256, policy, 4, kv_heads=2)
        assert plan.retained_tokens / plan.heads / 4 <= share * VAR_256.total + 0.5, name


def test_the_paired_difference_is_taken_image_by_image():
    rows = [
        {"policy": "a", "share": 0.5, "psnr_each": [30.0, 40.0, 35.0]},
        {"policy": "b", "share": 0.5, "psnr_each": [29.0, 38.0, 32.0]},
    ]
    mean, error = tables.ahead(rows, "a", "b", 0.5)
    assert mean == pytest.approx(2) and error == pytest.approx(3**-0.5)


def test_tables_of_the_committed_result():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert {row["share"] for row in rows} == {1.0, *contestants.SHARES}
    assert all(row["retained_share"] <= row["share"] + 1e-9 for row in rows)
    assert all(len(row["psnr_each"]) == result["images"] for row in rows)
    shown = [row for row in rows if row["policy"] not in contestants.ABLATION]
    assert tables.render(rows).count("\n") == len(shown) + 1
    assert "AMS-KV, calibrated  against sink" in tables.margins(rows)
    assert tables.worth(result["scales"]).count("\n") == len(VAR_256)


@pytest.mark.parametrize("share", contestants.SHARES)
def test_the_committed_result_shows_what_the_docs_say(share):
    """Ahead, image by image, by more than the standard error."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    for ours, rivals in {
        "LeastLoss": contestants.RIVALS,
        "AMS-KV": contestants.WINDOWS,
        "AMS-KV, calibrated": contestants.WINDOWS,
    }.items():
        for rival in rivals:
            mean, error = tables.ahead(rows, ours, rival, share)
            assert mean > error, (ours, rival)


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    losses = random_losses(VAR_256, 8, 2, 0)
    policies = {("LeastLoss", 0.25): LeastLoss(170, losses), ("LeastLoss", 0.1): LeastLoss(68, losses)}
    drawn = []

    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, name, share, policy):
            drawn.append((name, share))
            row = shootout.Row(name, share, 0, 0, 0, 0, 0, 0, 0, [], 0, shootout.settings(policy))
            return type("Future", (), {"result": lambda self: row})()

    monkeypatch.setattr(shootout, "ProcessPoolExecutor", Pool)
    args = type("Args", (), {"images": 2, "batch": 2, "device": "cpu", "model": "digits", "jobs": 1})()
    rows = list(shootout.run(args, policies, []))
    assert drawn == [("full", 1.0), *policies] and len(rows) == 3
    drawn.clear()
    assert list(shootout.run(args, policies, rows[:2])) == rows
    assert drawn == [("LeastLoss", 0.1)]
    drawn.clear()
    policies["LeastLoss", 0.1] = LeastLoss(68, random_losses(VAR_256, 8, 2, 1))
    assert repr(policies["LeastLoss", 0.1]) == repr(LeastLoss(68, losses))
    list(shootout.run(args, policies, rows))
    assert drawn == [("LeastLoss", 0.1)], "what was fitted to other losses is another policy"


def test_rows_of_other_weights_or_another_setup_are_drawn_again(tmp_path):
    path, setup = tmp_path / "shootout.json", {"images": 2, "batch": 2, "sampling": {"cfg": 3.0}}
    measured = [{"tokens": 1, "attention": 0.2}, {"tokens": 4, "attention": 0.05}]
    assert shootout.settled(path, setup, measured) == []
    path.write_text(json.dumps({**setup, "rows": [{"policy": "full"}], "scales": measured}))
    nearly = [{**each, "attention": each["attention"] * 1.0001} for each in measured]
    assert shootout.settled(path, setup, nearly) == [{"policy": "full"}]
    assert shootout.settled(path, {**setup, "images": 3}, measured) == []
    assert shootout.settled(path, setup, measured[:1]) == []
    assert shootout.settled(path, setup, [measured[0], {"tokens": 4, "attention": 0.06}]) == []


def test_a_training_takes_time(capsys):
    parser = training.command_line(None, Path("."))
    assert parser.parse_args(["--minutes", "0.5"]).minutes == 0.5
    for wrong in ("0", "-1", "nan", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--minutes={wrong}"])
        assert "--minutes" in capsys.readouterr().err


def test_no_progress_bar_in_a_log(capsys):
    labels = torch.zeros(1, dtype=torch.int64)
    assert demo.run(subject("digits"), images=1, batch=1)[1].equal(labels)
    assert capsys.readouterr().err == ""
