"""`amskv serve` as a user starts it: one command, an image, a signal; and what is wrong is told before it listens."""

import base64
import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from amskv_kernels.cli import main

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def test_the_digits_are_served_by_one_command_until_a_signal(tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n", encoding="utf-8")
    own = ["--port", "0", "--memory", "8MiB", "--key-file", str(key)]
    command = [sys.executable, "-m", "amskv_kernels", "serve", *own]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = [process.stdout.readline() for _ in range(3)]
            assert said[0] == "model     digits, 32x32, 10 classes, under full\n"
            assert said[1].startswith("pool      8.00 MiB, ")
            port = re.search(r":(\d+)$", said[2])[1]
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/images/generations",
                json.dumps({"prompt": "seven", "seed": 1}).encode(),
                {"Content-Type": "application/json", "Authorization": "Bearer 0123456789abcdef"},
            )
            with urllib.request.urlopen(request, timeout=100) as answer:
                (image,) = json.load(answer)["data"]
            assert base64.b64decode(image["b64_json"]).startswith(b"\x89PNG")
            process.send_signal(signal.SIGTERM)
            assert process.wait(100) == -signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "'much' is no memory"),
        (["--memory", "0.01MiB"], "one sequence of this plan holds up to"),
        (["--policy", "ams"], "policy 'ams' is not known"),
        (["--policy", "h2o:25"], "token policy; serving runs policies that keep whole scales"),
        (["--port", "70000"], "'70000' is not a whole number within 0 … 65535"),
        (["--classes", "none.txt"], "--classes none.txt cannot be read"),
        (["--classes", __file__], "classes; the model has 10"),
        (["--key-file", "none.txt"], "--key-file none.txt cannot be read"),
        (["--key-file", __file__], "must hold one word of at least 16 printable ASCII characters"),
        (["--var", "a.pth"], "give --var and --vae, or --checkpoint alone"),
        (["--top-k", "9999"], "top_k is 9999; it must be at most 256"),
        (["--stack", "2,128,2"], "unrecognized arguments"),
    ],
)
def test_what_is_wrong_is_told(capsys, arguments, message):
    assert _code(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "serving needs pip install 'amskv_kernels[serve]'" in capsys.readouterr().err


def _code(argv):
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code
