"""The demo's table: medians of interleaved runs, and results of older runs still shown."""

from dataclasses import replace

import torch

from amskv_kernels import CachePlan, Full, PagedKVCache
from examples import demo
from examples.digits.model import load
from examples.digits.subject import SUBJECT

UNJUDGED = replace(SUBJECT, judge=lambda *_: (1.0, {}))


def contestant(name, plan, seconds):
    images = [torch.zeros(1, 3, 4, 4) for _ in seconds]
    return demo.Contestant(name, plan, seconds, images, [torch.zeros(1, 680) for _ in seconds])


def test_one_slow_run_moves_no_ratio():
    """A machine that is busy during one batch of five: sums would say 0.37 and 2.6."""
    var, _ = load()
    plan = CachePlan.build(var.config.schedule, Full(), var.config.depth)
    runners = [
        contestant("stock", None, [1.0, 1.0, 9.0, 1.0, 1.0]),
        contestant("full", plan, [0.5, 0.5, 0.5, 9.0, 0.5]),
        contestant("slow", plan, [2.0, 2.0, 9.0, 2.0, 20.0]),
    ]
    rows = demo.table(UNJUDGED, runners, torch.zeros(5), 1, var)
    assert [row.attention_share for row in rows] == [1.0, 0.5, 2.0]


def test_needed_memory_is_what_the_caches_take():
    """Of one image with guidance: the pool and the last map in flight; stock's tensors while it concatenates."""
    var, _ = load()
    config = var.config
    plan = CachePlan.build(config.schedule, Full(), config.depth)
    stock, ours = demo.table(
        UNJUDGED, [contestant("stock", None, [1.0]), contestant("full", plan, [1.0])], torch.zeros(1), 1, var
    )
    paged = PagedKVCache(plan, batch=2, kv_heads=config.num_heads, head_dim=config.head_dim, dtype=torch.float32)
    last = torch.zeros(2, config.schedule.tokens[-1], config.num_heads, config.head_dim)
    assert ours.needed_mib * 2**20 == paged.nbytes + 2 * last.nbytes
    full = config.schedule.total * 2 * config.num_heads * config.head_dim * 8
    assert stock.needed_mib * 2**20 == full * (config.depth + 1)
    assert stock.retained_mib * 2**20 == full * config.depth


def test_results_of_older_runs_are_shown_as_they_are():
    row = {
        "policy": "full", "tokens_per_layer": 424.0, "retained_mib": 331.2, "retained_share": 0.62, "peak_mib": 356.2,
        "attention_share": 1.2, "accuracy": 1.0, "same_tokens": 1.0, "psnr_db": None,
    }  # fmt: skip
    assert "peak MiB" in demo.render([row])
    assert "needed MiB" in demo.render([row | {"needed_mib": 360.0}])


def test_what_a_judge_finds_becomes_columns():
    row = {
        "policy": "full", "tokens_per_layer": 424.0, "retained_mib": 331.2, "retained_share": 0.62, "peak_mib": 356.2,
        "attention_share": 1.2, "accuracy": 1.0, "same_tokens": 1.0, "psnr_db": None,
        "judged": {"eyes": 0.925, "Fréchet distance": 3.14159},
    }  # fmt: skip
    header, _, line = demo.render([row]).splitlines()
    assert header.split("PSNR")[1].split("  ", 1)[1].split() == ["eyes", "Fréchet", "distance"]
    assert line.split()[-2:] == ["92.5%", "3.14"]
