"""docs/custom-policy.md runs as it stands, and docs/policies.md names policies that exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from amskv_kernels import CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.policies import HeadOrders

DOCS = Path(__file__).parents[2] / "docs"
SCHEDULE = ScaleSchedule.named("var-256")


def test_every_example_runs_and_prints_what_it_says(capsys):
    page = (DOCS / "custom-policy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 6
    names = {"__name__": "custom_policy"}
    for block in blocks:
        exec(compile(block, "custom-policy.md", "exec"), names)
    out = capsys.readouterr().out
    said = re.findall(r"print\(.*\)  # (.*)", page)
    assert len(said) == 3
    for line in said:
        assert line.rstrip("…") in out
    assert "MiB must be free" in out
    assert names["chosen"].retained_tokens <= 0.2 * 680 * 16
    with pytest.raises(ValueError, match="kv_heads is 1; this policy tells one head from the others"):
        CachePlan.build(SCHEDULE, names["OneFullHead"](), 16, kv_heads=1)


def test_a_rule_that_brings_a_scale_back_is_no_policy():
    """What the page says of "every third step"."""
    names = {}
    page = (DOCS / "custom-policy.md").read_text(encoding="utf-8")
    exec(re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1], names)

    class EveryThird(names["Policy"]):
        def visible(self, schedule, layer, step):
            return tuple(range(step)) if step % 3 == 0 else ()

    with pytest.raises(ValueError, match="after having dropped it; a dropped scale must never return"):
        CachePlan.build(SCHEDULE, EveryThird(), 2)


def test_every_budget_on_the_page_can_be_planned(tmp_path):
    page = (DOCS / "policies.md").read_text(encoding="utf-8")
    scores = np.random.default_rng(0).random((8, 2, 10)).tolist()
    HeadOrders.from_scores(scores, SCHEDULE).save(tmp_path / "orders.json")
    found = [text for text in re.findall(r"`([\w-]+@(?:kept|saved|tokens)=[^`]*)`", page) if "POLICY" not in text]
    assert len(found) >= 5
    for text in found:
        if "calibration.json" in text:
            text = text.removesuffix("@calibration.json")
        policy = parse_policy(text.replace("orders.json", str(tmp_path / "orders.json")), SCHEDULE, 8)
        assert CachePlan.build(SCHEDULE, policy, 8, kv_heads=2).retained_tokens > 0
