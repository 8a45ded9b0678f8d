"""The shoot-out's arithmetic: settings within their bytes, and tables that say what the rows do."""

import json
from pathlib import Path

import pytest
import torch

from amskv_kernels import CachePlan, ScaleSchedule
from amskv_kernels.policies import HeadOrders
from examples.digits import demo, shootout

RESULT = Path(shootout.__file__).parent / "results" / "shootout.json"
VAR_256 = ScaleSchedule.named("var-256")


def measured(layers, needs):
    scores = [[need] * 2 for need in needs]
    return shootout.Measured(tuple(range(layers)), HeadOrders.from_scores(scores, VAR_256), ((0,),), needs)


def test_every_contestant_stays_within_its_share():
    needs = [[1 / (1 + scale + layer) for scale in range(10)] for layer in range(4)]
    policies = shootout.contestants(VAR_256, 4, measured(4, needs))
    names = {name for name, _ in policies}
    assert len(policies) == len(names) * len(shootout.SHARES)
    for (name, share), policy in policies.items():
        plan = CachePlan.build(VAR_256, policy, 4, kv_heads=2)
        assert plan.retained_tokens / plan.heads / 4 <= share * VAR_256.total + 0.5, name


@pytest.mark.parametrize("wanted", [3, 8])
def test_tuning_keeps_the_scale_that_matters(wanted):
    needs = [[float(scale == wanted) for scale in range(10)]] * 4
    policy = shootout.tuned(VAR_256, measured(4, needs), 180)
    assert wanted in policy.visible(VAR_256, 0, 9)


def test_tables_of_the_committed_result():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert {row["share"] for row in rows} == {1.0, *shootout.SHARES}
    assert all(row["retained_share"] <= row["share"] + 1e-9 for row in rows)
    assert shootout.render(rows).count("\n") == len(rows) + 1
    assert "ScaleKV, paper  against H2O" in shootout.margins(rows)
    assert shootout.worth(result["scales"]).count("\n") == len(VAR_256)


def test_no_progress_bar_in_a_log(capsys):
    labels = torch.zeros(1, dtype=torch.int64)
    assert demo.run(images=1, batch=1)[1].equal(labels)
    assert capsys.readouterr().err == ""
