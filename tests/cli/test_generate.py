"""`amskv generate` and `amskv evaluate` from end to end: the digits, a checkpoint of the official keys, a stack."""

import json
import sys
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread

from amskv_kernels import CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.cli import evaluate, main, subjects
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """State dicts of the official keys, one file each, and a trainer's checkpoint of both."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    var = VAR(
        VARConfig(SCHEDULE, depth=3, embed_dim=128, num_heads=2, vocab_size=32, z_channels=8, num_classes=5)
    ).state_dict()
    vae = VQVAE(
        VQVAEConfig(schedule=SCHEDULE, ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, vocab_size=32)
    ).state_dict()
    torch.save(var, folder / "var.pth")
    torch.save(vae, folder / "vae.pth")
    torch.save({"trainer": {"var_wo_ddp": var, "vae_local": vae}}, folder / "both.pth")
    return folder


@pytest.fixture
def two(files):
    return ["--var", str(files / "var.pth"), "--vae", str(files / "vae.pth")]


def test_a_checkpoint_draws_what_its_labels_say(files, two, tmp_path, capsys):
    labels = ["--labels", "3,0,3", "--seed", "5"]
    assert main(["generate", *two, *labels, "--out", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    assert "drawn     3 of 8×8" in out and "under full" in out and err == ""
    assert main(["generate", "--checkpoint", str(files / "both.pth"), *labels, "--out", str(tmp_path / "b")]) == 0
    pictures = [imread(tmp_path / "a" / f"000{i}.png") for i in range(3)]
    for i, picture in enumerate(pictures):
        assert (picture == imread(tmp_path / "b" / f"000{i}.png")).all()
    assert pictures[0].shape[:2] == (8, 8) and (pictures[0] != pictures[1]).any()
    assert imread(tmp_path / "a" / "contact-sheet.png").shape[:2] == (16, 16)
    found = json.loads((tmp_path / "a" / "generation.json").read_text(encoding="utf-8"))
    plan = CachePlan.build(SCHEDULE, parse_policy("full", SCHEDULE, 3), 3)
    assert found["pool_bytes"] == 3 * 2 * 2 * plan.allocated_tokens * 2 * 64 * 4  # images, sequences, heads, fp32 rows
    assert found["stock_bytes"] == 3 * 2 * 3 * 2 * 64 * SCHEDULE.total * 8 and found["images"] == 3


def test_pages_of_eight_bits_take_their_bytes(two, tmp_path):
    for pages in ("model", "int8"):
        argv = ["generate", *two, "--images", "1", "--pages", pages, "--out", str(tmp_path / pages)]
        assert main(argv) == 0
    own, eight = (
        json.loads((tmp_path / pages / "generation.json").read_text(encoding="utf-8"))["pool_bytes"]
        for pages in ("model", "int8")
    )
    assert eight / own == (64 + 4) / (64 * 4)


def test_the_digits_are_drawn_where_no_checkpoint_is_named(tmp_path, capsys, monkeypatch):
    argv = ["--images", "2", "--out", str(tmp_path)]
    assert main(["generate", *argv, "--policy", "ams-kv:75"]) == 0
    assert "drawn     2 of 32×32" in capsys.readouterr().out
    monkeypatch.setattr(subjects, "DIGITS", tmp_path / "none")
    assert main(["generate", *argv]) == 2
    assert "no checkpoint is named, and this installation has no digits beside it" in capsys.readouterr().err


def test_policies_are_compared_with_the_full_cache(two, tmp_path, capsys, monkeypatch):
    seen = []

    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, own, other, normalize):
            seen.append(own.shape)
            return (own - other).abs().mean((1, 2, 3), keepdim=True)

    lpips = ModuleType("lpips")
    lpips.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    argv = ["evaluate", *two, "--policies", "sliding:1,sink:1,1,full", "--labels", "1,2", "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "LPIPS" in out and "equal tokens" in out and "identical" in out
    rows = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [row["policy"] for row in rows] == ["full", "sliding:1", "sink:1,1"]
    assert rows[0]["psnr_db"] is None and rows[0]["lpips"] == 0 and rows[0]["equal_tokens"] == 1
    assert rows[1]["psnr_db"] < 58 and rows[1]["equal_tokens"] < 1 and rows[1]["lpips"] > 0
    assert seen == [(2, 3, 8, 8)] * 3
    assert (tmp_path / "contact-sheet.png").stat().st_size > 1000


def test_lpips_is_left_out_where_it_is_not_there_or_has_no_weights(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert evaluate.perceptual_distance() is None

    def unreachable(**_):
        raise OSError("no route to host")

    lpips = ModuleType("lpips")
    lpips.LPIPS = unreachable
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    assert evaluate.perceptual_distance() is None
    assert "its weights cannot be loaded (no route to host)" in capsys.readouterr().out


def test_a_stack_takes_the_features_of_prompts(tmp_path, capsys):
    torch.save([torch.randn(5, 128), torch.randn(3, 128)], tmp_path / "prompts.pt")
    stack = ["--family", "infinity", "--stack", "2,128,2", "--prompt-features", str(tmp_path / "prompts.pt")]
    assert main(["generate", *stack, "--out", str(tmp_path)]) == 0
    assert "drawn     2 of 16×16" in capsys.readouterr().out
    assert main(["evaluate", *stack, "--policies", "sliding:1", "--pages", "int8", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--var", "a.pth"], "give --var and --vae, or --checkpoint alone"),
        (["--var", "a.pth", "--vae", "b.pth", "--checkpoint", "c.pth"], "give --var and --vae, or --checkpoint alone"),
        (["--labels", "3,x"], "--labels is '3,x'; it must be classes such as 3,207"),
        (["--labels", "10"], "--labels has 10; this model has classes 0 … 9"),
        (["--labels", "1", "--images", "2"], "labels and prompts are one image each"),
        (["--schedule", "var-256"], "--schedule is of --stack"),
        (["--prompt-features", "p.pt"], "--prompt-features are of --family infinity"),
        (["--family", "infinity", "--labels", "1"], "--labels is of a VAR; an Infinity stack has random weights"),
        (["--stack", "2,64,1", "--top-k", "5"], "--top-k is of a VAR"),
        (["--family", "infinity", "--top-p", "0.5"], "--top-p is of a VAR"),
        (["--family", "infinity", "--cfg", "3"], "--cfg is of a VAR"),
        (["--family", "infinity", "--model", "var-d16"], "--model is of a VAR"),
        (["--family", "var", "--stack", "2,64,1"], "--stack is of --family infinity"),
        (["--family", "infinity", "--prompt-features", __file__], "it is not a PyTorch checkpoint of tensors alone"),
        (["--family", "infinity", "--stack", "2"], "--stack is '2'; it must be LAYERS,WIDTH,HEADS"),
        (["--family", "infinity", "--prompt-features", "none.pt"], "--prompt-features none.pt cannot be read"),
        (["--policy", "ams"], "policy 'ams' is not known"),
        (["--top-k", "9999"], "top_k is 9999; it must be within 0 … 256"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, capsys, arguments, message):
    assert main(["generate", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_features_of_another_width_and_policies_that_are_none_are_told(two, tmp_path, capsys):
    torch.save(torch.randn(5, 64), tmp_path / "prompts.pt")
    argv = ["--stack", "2,128,2", "--prompt-features", str(tmp_path / "prompts.pt"), "--out", str(tmp_path)]
    assert main(["generate", *argv]) == 2
    assert "has (5, 64); each prompt must be (n, 128), n > 0" in capsys.readouterr().err
    assert main(["evaluate", *two, "--policies", "sliding:1,,full", "--out", str(tmp_path)]) == 2
    assert "it must be policies by commas" in capsys.readouterr().err
