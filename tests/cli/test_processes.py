"""Commands in several processes: `generate` within a group that there is, `serve` as torchrun starts it."""

import base64
import contextlib
import io
import json
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from amskv_kernels.cli import main
from amskv_kernels.cli.processes import processes
from amskv_kernels.cli.subjects import DIGITS, DIGITS_SAMPLING
from amskv_kernels.models import ConcatKVCache, checkpoint
from amskv_kernels.policies import HeadOrders


def command(mesh, *argv):
    """The command's exit code and what it printed."""
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        code = main(argv)
    return code, printed.getvalue(), complained.getvalue()


@pytest.mark.parametrize("model", [[], ["--stack", "2,128,2"]], ids=["digits", "infinity"])
def test_two_processes_draw_the_pictures_of_one_and_the_first_writes_them(two_ranks, tmp_path, model):
    own = ["generate", *model, "--images", "1", "--device", "cpu", "--policy", "ams-kv:60", "--out"]
    assert main([*own, str(tmp_path / "one")]) == 0
    (code, printed, complained), other = two_ranks.run(command, *own, str(tmp_path / "two"))
    assert code == 0 and complained == "" and other == (0, "", "")
    assert "in each of 2 processes" in printed
    one, two = (json.loads((tmp_path / name / "generation.json").read_text()) for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one["pool_bytes"] == 2 * two["pool_bytes"] and one["stock_bytes"] == 2 * two["stock_bytes"]
    pictures = [torch.from_numpy(imread(tmp_path / name / "0000.png")) for name in ("one", "two")]
    torch.testing.assert_close(*pictures, rtol=0, atol=1.01 / 255)


def test_what_cannot_be_sharded_is_told_before_anything_is_drawn(two_ranks, tmp_path):
    schedule = checkpoint.model_shape(DIGITS / "var.safetensors").schedule
    orders, out = tmp_path / "orders.json", tmp_path / "out"
    HeadOrders.from_scores(torch.rand(8, 2, len(schedule)).tolist(), schedule).save(orders)
    for argv, message in (
        (["--stack", "2,192,3"], "model.unregistered_blocks[0].sa has 3 heads; 2 processes must divide them"),
        (["--policy", f"heatkv:0.5@{orders}"], "policy is a HeatKV, which tells heads apart"),
    ):
        own = ["generate", *argv, "--device", "cpu", "--out", str(out)]
        for code, printed, complained in two_ranks.run(command, *own):
            assert code == 2 and printed == "" and message in complained
    assert not out.exists()


def entered(mesh, device):
    with pytest.raises(ValueError) as refused, processes(device):
        pass
    return str(refused.value)


def test_every_process_takes_a_gpu_of_its_own(two_ranks):
    for said in two_ranks.run(entered, "cuda:0"):
        assert said.startswith("--device is cuda:0; among several processes each takes a GPU of its own")


def test_other_commands_run_in_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "as torchrun says")
    assert main(["evaluate", "--images", "1", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "this command runs in one process; start it without torchrun" in capsys.readouterr().err


def test_one_process_is_no_group():
    with processes("cpu") as mesh:
        assert mesh is None


def test_torchrun_serves_one_model_in_two_processes_until_a_signal():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    serve = ["-m", "amskv_kernels", "serve", "--device", "cpu", "--port", "0", "--memory", "4MiB"]
    with subprocess.Popen(launcher + serve, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = [process.stdout.readline() for _ in range(3)]
            assert said[0] == "model     digits, 32x32, 10 classes, under full\n"
            assert re.match(r"pool      4\.00 MiB, .* inside at once in each of 2 processes$", said[1])
            address = said[2].split()[1]
            request = urllib.request.Request(
                f"{address}/v1/images/generations", json.dumps({"prompt": "seven", "seed": 1, "n": 2}).encode(),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=100) as answer:
                images = [base64.b64decode(image["b64_json"]) for image in json.load(answer)["data"]]
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=100)  # until no process is left that could write
        finally:
            process.kill()
    for seed, png in zip((1, 2), images, strict=True):
        torch.testing.assert_close(pixels(png), 255 * drawn_alone(seed), rtol=0, atol=1)


def drawn_alone(seed):
    """(3, H, W) of the digits' seven, in one process."""
    var, vae = checkpoint.load(DIGITS / "var.safetensors", DIGITS / "vqvae.safetensors")
    own, rng = DIGITS_SAMPLING, torch.Generator().manual_seed(seed)
    return var.generate(vae, torch.tensor([7]), ConcatKVCache(), generator=rng, **own).images[0]


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
