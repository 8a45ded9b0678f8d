"""The command line as a user meets it: output, files, and one clear line with exit code 2."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from amskv_kernels import CachePlan, ScaleSchedule, parse_policy
from amskv_kernels.cli import main, plots
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.models.checkpoint import load, save

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)])
VAR_SIZES = {"depth": 2, "embed_dim": 64, "num_heads": 1, "vocab_size": 32, "z_channels": 8, "num_classes": 3}
VAE_SIZES = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 32}


CALIBRATE = ["calibrate", "--var", "no.pth", "--vae", "no.pth"]


def run(capsys, *argv):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_plan_reports_the_papers_case(capsys):
    argv = ["plan", "--model", "var-d30", "--policy", "ams-kv:84.83", "--images", "50", "--dtype", "bf16", "--json"]
    code, out, _ = run(capsys, *argv)
    figures = json.loads(out)
    assert code == 0
    assert figures["stock_mib"] == pytest.approx(22412, abs=0.5)
    assert figures["retained_tokens_per_layer"] <= 103.2
    assert figures["retained_mib"] <= 0.11 * figures["stock_mib"]
    assert figures["retained_mib"] <= figures["peak_mib"] <= figures["needed_mib"]
    assert figures["allocated_mib"] <= 1.25 * figures["retained_mib"]
    assert figures["saved_of_all"] == pytest.approx(0.8483, abs=1e-4)
    assert figures["saved_of_prefix"] < figures["saved_of_all"]
    assert figures["page_size"] in (16, 32, 64, 128)


def test_plan_full_is_lossless(capsys):
    _, out, _ = run(capsys, "plan", "--model", "var-d30", "--policy", "full")
    assert "424.0 of 680 tokens per layer, lossless" in out
    assert "62.4% kept, 37.6% saved of all; 100.0% kept, 0.0% saved of those before the last scale" in out


def test_plan_by_dtype_and_guidance(capsys):
    def figures(*more):
        return json.loads(run(capsys, "plan", "--model", "var-d16", "--policy", "full", "--json", *more)[1])

    assert figures("--dtype", "fp32")["retained_mib"] == 2 * figures()["retained_mib"]
    assert figures("--dtype", "int8")["retained_mib"] == figures()["retained_mib"] * (64 + 4) / 128
    assert figures("--no-cfg")["stock_mib"] * 2 == figures()["stock_mib"]
    assert figures("--page-size", "128")["page_size"] == 128
    assert figures("--schedule", "var-512")["prefix_tokens"] == 1216


def test_plan_in_eight_bits(capsys, tmp_path):
    argv = ["plan", "--model", "var-d30", "--policy", "full", "--dtype", "int8", "--plot", str(tmp_path / "plan.png")]
    _, out, _ = run(capsys, *argv)
    assert "424.0 of 680 tokens per layer, all that is read, in eight bits" in out
    assert "tokens and a scale per row, made before step 1" in out


def test_plan_says_what_rows_cost_heads_without_kernels(capsys):
    _, out, _ = run(capsys, "plan", "--model", "infinity-layer32", "--policy", "full")
    assert "MiB  of both: there are no kernels of this head size, heads lie in rows of 128\n" in out
    assert "padding" not in run(capsys, "plan", "--model", "infinity-2b", "--policy", "full")[1]


def test_plan_draws(capsys, tmp_path):
    code, out, _ = run(
        capsys, "plan", "--model", "var-d16", "--policy", "sink:2,1", "--plot", str(tmp_path / "p" / "plan.png")
    )
    assert code == 0
    assert str(tmp_path) in out
    assert (tmp_path / "p" / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_plan_says_where_the_picture_is(capsys, tmp_path):
    _, out, _ = run(
        capsys, "plan", "--model", "var-d16", "--policy", "full", "--plot", str(tmp_path / "plan"), "--no-cfg"
    )
    assert f"plot       {tmp_path / 'plan.png'}\n" in out
    assert (tmp_path / "plan.png").exists()
    assert "1 image = 1 sequence, bf16" in out


def test_plan_reports_scalekv_as_its_paper_does(capsys):
    argv = ["plan", "--model", "infinity-2b", "--policy", "scalekv:10", "--images", "8"]
    figures = json.loads(run(capsys, *argv, "--json")[1])
    assert figures["retained_at_stock_dtype_mib"] == 3900.0
    assert (figures["retained_mib"], figures["retained_tokens_per_layer"]) == (2600.0, 650.0)
    assert figures["saved_of_prefix"] < figures["saved_of_all"]
    assert figures["peak_mib"] > figures["retained_mib"]
    out = run(capsys, *argv)[1]
    assert "3,900.0 MiB  the same tokens" in out
    assert "approximate: some earlier tokens are dropped" in out


@pytest.mark.parametrize("policy", ["snapkv:10", "pyramidkv:10", "h2o:10", "recent:10,4", "scalekv:20,paper"])
def test_plan_knows_every_policy(capsys, policy, tmp_path):
    argv = ["plan", "--model", "var-d16", "--policy", policy, "--plot", str(tmp_path / "p.png")]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert f"policy     {policy}" in out
    assert (tmp_path / "p.png").exists()


@pytest.fixture
def checkpoints(tmp_path):
    torch.manual_seed(0)
    var = VAR(VARConfig(schedule=SCHEDULE, **VAR_SIZES))
    vae = VQVAE(VQVAEConfig(schedule=SCHEDULE, **{**VAE_SIZES, "ch_mult": (1, 1)}))
    save(tmp_path / "var.safetensors", var, VAR_SIZES, SCHEDULE)
    save(tmp_path / "vae.safetensors", vae, VAE_SIZES, SCHEDULE)
    return tmp_path


def test_checkpoints_come_back(checkpoints):
    var, vae = load(checkpoints / "var.safetensors", checkpoints / "vae.safetensors")
    assert var.config.schedule == vae.config.schedule == SCHEDULE
    assert not any(p.requires_grad for p in var.parameters())


def test_calibrate_writes_what_plan_and_policies_read(checkpoints, capsys):
    out_file, picture = checkpoints / "c.json", checkpoints / "c.png"
    code, out, _ = run(
        capsys, "calibrate", "--var", str(checkpoints / "var.safetensors"), "--vae",
        str(checkpoints / "vae.safetensors"), "--count", "1", "--images", "4", "--batch", "3",
        "--out", str(out_file), "--plot", str(picture),
    )  # fmt: skip
    assert code == 0, out
    raw = json.loads(out_file.read_text())
    assert (len(raw["similarity"]), len(raw["similarity"][0]), raw["images"]) == (2, 4, 4)
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("method", "policy", "more"),
    [("asi", "scalekv:100", ["--count", "2", "--top", "4"]), ("scas", "heatkv:80", ["--protected", "2"])],
)
def test_calibrate_measures_attention(checkpoints, capsys, method, policy, more):
    out_file = checkpoints / "m.json"
    code, out, err = run(
        capsys, "calibrate", "--method", method, "--var", str(checkpoints / "var.safetensors"), "--vae",
        str(checkpoints / "vae.safetensors"), "--images", "3", "--batch", "2", "--out", str(out_file), *more,
    )  # fmt: skip
    assert code == 0, err
    assert f"--policy {policy.partition(':')[0]}:" in out
    parsed = parse_policy(f"{policy}@{out_file}", SCHEDULE, 2)
    plan = CachePlan.build(SCHEDULE, parsed, 2, kv_heads=1)
    assert 0 < plan.retained_tokens <= 2 * SCHEDULE.prefix


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "--method", "magic", "--var", "x", "--vae", "x"], "invalid choice: 'magic'"),
        (["calibrate", "--method", "asi", "--var", "no.pth", "--vae", "no.pth"], "no.pth cannot be read"),
        (["plan", "--model", "var-d30", "--policy", "heatkv:5@no.json"], "head order no.json cannot be read"),
        (["plan", "--model", "var-d30", "--policy", "scalekv:2"], "it must hold the observation window of 16"),
        (
            ["plan", "--model", "var-d30", "--policy", "sink:1"],
            "the number of arguments is 1; it must be 2; write sink:",
        ),
        (["plan", "--model", "var-d99", "--policy", "full"], "model 'var-d99' is not known; known: var-d16"),
        (["plan", "--model", "var-d30", "--policy", "magic"], "policy 'magic' is not known; known: full"),
        (
            ["plan", "--model", "var-d30", "--policy", "full", "--images", "0"],
            "--images: '0' is not a whole number within 1 … 1000000",
        ),
        (
            ["plan", "--model", "var-d30", "--policy", "full", "--images", "many"],
            "--images: 'many' is not a whole number",
        ),
        (["plan", "--model", "var-d30", "--policy", "full", "--dtype", "int4"], "dtype is 'int4'; it must be one of"),
        (["plan", "--model", "var-d30", "--policy", "full", "--page-size", "17"], "page_size is 17"),
        (["plan", "--model", "var-d30", "--policy", "full", "--schedule", "x"], "schedule 'x' is not a published one"),
        (["plan", "--model", "var-d30"], "required: --policy"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["plan", "--model", "var-d30", "--policy", "full", "--plot", "/tmp"], "--plot: '/tmp' is a directory"),
        (["plan", "--model", "var-d30", "--policy", "full", "--plot", ""], "--plot: '' is empty; it must name a file"),
        ([*CALIBRATE, "--count", "1", "--plot", "x.xyz"], "--plot: 'x.xyz' ends in .xyz; pictures are .png or .pdf"),
        ([*CALIBRATE, "--count", "1", "--out", "/tmp"], "--out: '/tmp' is a directory; it must name a file"),
        ([*CALIBRATE, "--count", "1", "--out", ""], "--out: '' is empty; it must name a file"),
        ([*CALIBRATE, "--theta", "nan"], "--theta: nan is not finite; it must be a similarity to compare with"),
        ([*CALIBRATE, "--theta", "low"], "--theta: invalid number value: 'low'"),
        ([*CALIBRATE, "--count", "1", "--device", "tpu"], "--device: 'tpu' is not one to measure on; it must be cpu"),
        ([*CALIBRATE, "--count", "1", "--device", "meta"], "--device: 'meta' is not one to measure on; it must be cpu"),
        ([*CALIBRATE, "--count", "1", "--device", "cuda:99"], "--device: cuda:99 is not there; torch sees"),
        ([*CALIBRATE, "--count", "1", "--seed", "99999999999999999999"], "is out of range; a seed has 64 bits"),
        ([*CALIBRATE, "--count", "1", "--top", "4"], "--top means nothing to --method similarity, whose own options"),
        ([*CALIBRATE, "--method", "asi", "--theta", "0"], "--theta means nothing to --method asi"),
        ([*CALIBRATE, "--method", "asi", "--plot", "x.png"], "whose own options are --count, --top"),
        ([*CALIBRATE, "--method", "scas", "--count", "1"], "--count means nothing to --method scas"),
        (["calibrate", "--var", "no.pth", "--vae", "no.pth"], "give --theta or --count"),
        (["calibrate", "--var", "no.pth", "--vae", "no.pth", "--count", "1"], "no.pth cannot be read"),
        (
            ["calibrate", "--var", "no.safetensors", "--vae", "x", "--count", "1"],
            "no.safetensors cannot be read",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("amskv: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--count", "1", "--model", "var-d16"],
            "var.safetensors has other sizes than var-d16: schedule is custom and must be var-256, depth is 2",
        ),
        (["--count", "1", "--model", "foo"], "model 'foo' is not a released one"),
        (["--method", "asi", "--top", "100000"], "top is 100000; it must be below 14, the longest history of schedule"),
        (["--method", "asi", "--count", "99", "--top", "4"], "count is 99; there are 4 pairs of a layer and a scale"),
        (["--method", "scas", "--protected", "3"], "--protected is 3; it must be within 0 … 2"),
        (["--count", "3"], "--count is 3; it must be within 0 … 2"),
    ],
)
def test_what_a_model_cannot_have_is_refused_before_it_is_measured(checkpoints, capsys, monkeypatch, more, message):
    monkeypatch.setattr(VAR, "generate", None)
    code, _, err = run(
        capsys, "calibrate", "--var", str(checkpoints / "var.safetensors"), "--vae",
        str(checkpoints / "vae.safetensors"), "--out", str(checkpoints / "m.json"), *more,
    )  # fmt: skip
    assert code == 2
    assert message in err


def test_a_pth_says_itself_what_it_is(checkpoints, capsys):
    var, _ = load(checkpoints / "var.safetensors", checkpoints / "vae.safetensors")
    folder = checkpoints / "a name with spaces"
    folder.mkdir()
    torch.save(var.state_dict(), folder / "custom.pth")
    argv = ["--vae", str(checkpoints / "vae.safetensors"), "--out", str(folder / "c.json"), "--images", "2"]
    code, out, err = run(capsys, "calibrate", "--var", str(folder / "custom.pth"), *argv, "--count", "1")
    assert code == 0, err
    hint = shlex.split(out.splitlines()[-1])
    assert hint[:2] == ["next", "amskv"]
    code, out, err = run(capsys, *hint[2:])
    assert code == 0, err
    assert out.startswith("custom (custom), 1 image = 2 sequences, bf16\n")


def test_a_corrupt_checkpoint_is_named(checkpoints, capsys):
    path = checkpoints / "var.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    code, _, err = run(
        capsys, "calibrate", "--var", str(path), "--vae", str(checkpoints / "vae.safetensors"), "--count", "1"
    )
    assert code == 2
    assert f"{path} cannot be read" in err


def test_doctor_tells_backends(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "\n  attn on cpu " in out
    assert max(map(len, out.splitlines())) <= 100
    assert json.loads(run(capsys, "doctor", "--json")[1])["versions"]["torch"].startswith(torch.__version__)


@pytest.mark.parametrize(
    ("reason", "no_cuda", "shown"),
    [
        (None, None, "loaded, for the CPU with plain, avx2; built with CUDA 13.0 for 8.0, 9.0a, PTX 8.0"),
        (
            None,
            "libamskv.so was built without CUDA kernels",
            "loaded, for the CPU with plain, avx2; built without CUDA kernels",
        ),
        ("libamskv.so was not built (install with nvcc)", None, "was not built (install with nvcc)"),
    ],
)
def test_doctor_tells_whether_the_library_loads(capsys, monkeypatch, reason, no_cuda, shown):
    built = {"cuda": "13.0", "architectures": "8.0, 9.0a, PTX 8.0"}
    found = {
        "why_not_loaded": reason,
        "why_no_cuda": no_cuda,
        "build_info": built,
        "instruction_sets": ["plain", "avx2"],
    }
    for name, value in found.items():
        monkeypatch.setattr(f"amskv_kernels.ops.backends.library.{name}", lambda value=value: value)
    assert json.loads(run(capsys, "doctor", "--json")[1])["versions"]["libamskv.so"] == shown


def test_the_first_screen_says_what_to_do():
    shown = subprocess.run([sys.executable, "-m", "amskv_kernels"], capture_output=True, text=True, check=True)
    assert "start here:" in shown.stdout


def test_quality_is_drawn_without_what_is_identical(tmp_path):
    rows = [
        {"policy": "full", "retained_share": 0.6, "psnr_db": None, "attention_error": 0.0},
        *({"policy": f"p{i}", "retained_share": 0.1 * j, "psnr_db": 30.0 + i, "attention_error": 0.2}
          for i in range(12) for j in (1, 2)),
    ]  # fmt: skip
    plots.quality(rows, "title", tmp_path / "sub" / "q.png")
    assert (tmp_path / "sub" / "q.png").read_bytes()[:4] == b"\x89PNG"
