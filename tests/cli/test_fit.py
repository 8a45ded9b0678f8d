"""`amskv fit` from end to end on models of a few weights: what it prints, writes, and refuses."""

import json
from argparse import Namespace

import pytest
from test_allocation import random_losses

from amskv_kernels import CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.cli import main
from amskv_kernels.cli.drawing import RandomStack
from amskv_kernels.cli.fit import _policies, memory
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.models.checkpoint import save
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
from amskv_kernels.policies import Full, Losses, Tokens

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)])
VAR_SIZES = {"depth": 3, "embed_dim": 128, "num_heads": 2, "vocab_size": 32, "z_channels": 8, "num_classes": 3}
VAE_SIZES = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    save(folder / "var.safetensors", VAR(VARConfig(schedule=SCHEDULE, **VAR_SIZES)), VAR_SIZES, SCHEDULE)
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **{**VAE_SIZES, "ch_mult": (1, 1)}))
    save(folder / "vae.safetensors", vae, VAE_SIZES, SCHEDULE)
    return ["--var", str(folder / "var.safetensors"), "--vae", str(folder / "vae.safetensors")]


SMALL = ["--measure", "2", "--draw", "2"]


@pytest.mark.parametrize("budget", [["--kept", "20"], ["--saved", "80%"], ["--memory", "1MiB", "--images", "8"]])
def test_a_checkpoint_gets_its_policy(files, tmp_path, capsys, budget):
    assert main(["fit", *files, *SMALL, *budget, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()[:5]}
    assert set(rows) == {"policy", "full", "least loss, by layer", "least loss, by head", "AMS-KV"}
    assert "identical" in rows["full"] and "at most" in out and err == ""
    assert json.loads((tmp_path / "policy.json").read_text(encoding="utf-8"))["format"] == "amskv-lifetimes-1"
    policy = parse_policy(f"lifetimes@{tmp_path / 'policy.json'}", SCHEDULE, 3)
    plan = CachePlan.build(SCHEDULE, policy, 3, kv_heads=2)
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000
    if budget[0] == "--memory":
        # fp32, two sequences an image: 2 · 2 heads · K and V · 64 · 4 bytes.
        assert 8 * plan.allocated_tokens / plan.heads * 2 * 2 * 2 * 64 * 4 <= 2**20
    else:
        assert plan.retained_tokens / plan.heads <= 0.2 * SCHEDULE.total * 3 + 1e-6
    losses = ["--losses", str(tmp_path / "losses.json")]
    assert main(["fit", *files, *losses, "--draw", "1", *budget, "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "policy.json").exists() and not (tmp_path / "again" / "losses.json").exists()


def test_pages_of_eight_bits_fit_where_the_models_do_not(files, tmp_path, capsys):
    budget = ["--memory", "1MiB", "--images", "16", "--out", str(tmp_path)]
    assert main(["fit", *files, *SMALL, *budget]) == 2
    assert "one image needs at least" in capsys.readouterr().err
    assert main(["fit", *files, *SMALL, *budget, "--pages", "int8"]) == 0
    policy = parse_policy(f"lifetimes@{tmp_path / 'policy.json'}", SCHEDULE, 3)
    plan = CachePlan.build(SCHEDULE, policy, 3, kv_heads=2)
    # Two sequences an image, 2 heads, K and V of 64 bytes with a scale of 4.
    assert 16 * plan.allocated_tokens / plan.heads * 2 * 2 * 2 * (64 + 4) <= 2**20


def test_the_digits_are_there_where_no_model_is_named(tmp_path, capsys):
    assert main(["fit", "--kept", "25", "--measure", "1", "--draw", "1", "--out", str(tmp_path)]) == 0
    assert "least loss, by layer" in capsys.readouterr().out
    losses = Losses.load(tmp_path / "losses.json")
    assert (losses.num_layers, losses.schedule) == (8, ScaleSchedule.named("var-256").sizes)
    assert main(["fit", "--kept", "25", "--var", "var.pth", "--out", str(tmp_path)]) == 2
    assert "give --var and --vae, or --stack, or none of them" in capsys.readouterr().err


def test_a_stack_of_random_weights_runs_too(tmp_path, capsys):
    stack = ["--stack", "2,128,2", "--schedule", "infinity-0.06m-1.000"]
    assert main(["fit", *stack, "--kept", "25", "--measure", "1", "--draw", "1", "--out", str(tmp_path)]) == 0
    assert "least loss, by head" in capsys.readouterr().out
    losses = Losses.load(tmp_path / "losses.json")
    assert (losses.num_layers, losses.kv_heads, losses.images) == (2, 2, 1)


def test_what_is_protected_is_protected_in_every_row():
    schedule = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)])
    losses = random_losses(schedule, 2, 2, 0)
    losses.gram[..., 1, :] = losses.gram[..., 1] = (
        0  # nothing is lost by forgetting the second scale, for the third there would be room
    )
    stack = InfinityStack(InfinityConfig(2, 128, 2, chunks=1)).requires_grad_(False)
    policies = _policies(Namespace(protected=2), RandomStack.of(stack, schedule), losses, Tokens(10))
    assert len(policies) == 4
    for name, policy in policies.items():
        for layer in range(2):
            assert all({0, 1} <= set(policy.visible(schedule, layer, step)) for step in range(2, 5)), name


def test_calibrate_measures_losses(files, tmp_path, capsys):
    out, plot = tmp_path / "losses.json", tmp_path / "losses.png"
    argv = ["calibrate", *files, "--method", "loss", "--images", "3", "--batch", "2"]
    assert main([*argv, "--out", str(out), "--plot", str(plot)]) == 0
    assert f"--policy least-loss:25@{out}" in capsys.readouterr().out.replace("'", "")
    losses = Losses.load(out)
    assert (losses.images, losses.schedule) == (3, SCHEDULE.sizes) and plot.stat().st_size > 1000
    CachePlan.build(SCHEDULE, parse_policy(f"least-loss:25@{out}", SCHEDULE, 3), 3)
    assert main([*argv, "--top", "3", "--out", str(out)]) == 2
    assert "--top means nothing to --method loss" in capsys.readouterr().err


def test_the_same_seed_draws_the_same():
    stack = InfinityStack(InfinityConfig(1, 128, 2, chunks=1)).requires_grad_(False)
    subject = RandomStack.of(stack, SCHEDULE)
    one, other, third = (subject.draw(Full(), 1, seed) for seed in (0, 0, 1))
    assert one.images.equal(other.images) and not one.images.equal(third.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "8GiB"], "give --memory with --images, or --saved, or --kept"),
        (["--images", "8"], "give --memory with --images"),
        (["--kept", "20", "--saved", "80"], "give --memory with --images, or --saved, or --kept"),
        (["--kept", "100"], "'100' is no percentage; it must be above 0 and below 100"),
        (["--memory", "8GB", "--images", "1"], "'8GB' is no memory; it must be a number with MiB or GiB"),
        (["--memory", "0.001MiB", "--images", "9"], "one image needs at least"),
        (["--kept", "20", "--schedule", "var-256"], "--schedule is of --stack"),
        (["--kept", "20", "--stack", "1,2,3"], "give --var and --vae, or --stack"),
        (["--kept", "20", "--losses", "no.json"], "losses file no.json cannot be read"),
        (["--kept", "9", "--protected", "3"], "the 3 protected scales"),
    ],
)
def test_what_is_wrong_is_told(files, tmp_path, capsys, arguments, message):
    assert main(["fit", *files, *SMALL, *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_memory_is_read_as_written():
    assert memory("8GiB") == 8 * 2**30 and memory("1.5MiB") == 3 * 2**19
