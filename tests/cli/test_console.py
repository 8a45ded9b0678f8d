"""The console as users have it: any encoding, closed pipes and streams, Ctrl-C; a process with a life of its own."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import amskv_command
from amskv_kernels.cli import console, main

ROOT = Path(__file__).parents[2]
PLAN = ("-m", "amskv_kernels", "plan", "--model", "var-d16", "--policy", "ams-kv:75")


def amskv(*arguments, **options):
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, timeout=120, **options
    )


SCREENS = [list(PLAN[2:]), ["doctor"], ["--help"], ["plan", "--help"], ["calibrate", "--help"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_consoles_of_any_encoding(monkeypatch, encoding):
    for arguments in SCREENS:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(arguments) == 0
        assert stream.buffer.getvalue().decode(encoding)


def test_a_console_that_knows_few_signs():
    done = amskv(*PLAN, env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"MiB" in done.stdout


def test_errors_on_an_ascii_console():
    done = amskv("-m", "amskv_kernels", "plan", "--model", "é…", "--policy", "full", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert done.stderr.startswith(b"amskv: model '\\xe9\\u2026' is not known")


@pytest.mark.parametrize("command", [["plan", "--model", "var-d16", "--policy", "full"], ["plan"], ["doctor"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_process_without_a_stream(monkeypatch, capsys, stream, command):
    expected = main(command)
    monkeypatch.setattr(sys, stream, None)
    assert main(command) == expected


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    try:
        done = amskv(*PLAN, "--json", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_behind_the_console_is_one_line():
    with open("/dev/full", "w") as full:
        done = amskv(*PLAN, stdout=full)
    assert done.returncode in (1, 2)  # found while printing, or when the buffer is written at the end
    assert done.stderr.endswith(b"No space left on device\n")
    assert done.stderr.count(b"\n") == 1


WAITING = """
import sys, time
from amskv_kernels.cli import console
def main():
    print("ready", flush=True)
    time.sleep(60)
sys.exit(console.run(main))
"""


def test_an_interrupt_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    assert (child.returncode, error) == (130, b"")


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (lambda: None, 0),
        (lambda: 3, 3),
        (lambda: raising(SystemExit), 0),
        (lambda: raising(SystemExit(4)), 4),
        (lambda: raising(SystemExit("told")), 1),
        (lambda: raising(KeyboardInterrupt), 130),
        (lambda: raising(BrokenPipeError(32, "Broken pipe")), 141),
    ],
)
def test_exit_codes(capfd, what, code):
    assert console.run(what) == code
    assert capfd.readouterr().err == ("told\n" if code == 1 else "")


def test_other_errors_are_their_callers():
    with pytest.raises(FileNotFoundError):
        console.run(lambda: open("no such file"))  # noqa: SIM115
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: 1 // 0)


def commands():
    """Every file of the project that is run by itself, but the one that runs where nothing is installed."""
    for folder in ("benchmarks", "examples", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") and path.name != "one_call.py":
                yield path


@pytest.mark.parametrize("path", list(commands()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_goes_through_the_console(path):
    start = path.read_text(encoding="utf-8").split('if __name__ == "__main__":')[1]
    assert "sys.exit(console.run(" in start


IMPORTING = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"


def test_an_interrupt_while_everything_is_imported_is_quiet(tmp_path):
    (tmp_path / "amskv_kernels").mkdir()
    (tmp_path / "amskv_kernels" / "__init__.py").write_text(IMPORTING)
    command = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import amskv_command; sys.exit(amskv_command.main())"
    done = amskv("-c", command)
    assert (done.returncode, done.stderr) == (130, b"")


def test_the_installed_command_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["amskv", "--version"])
    assert amskv_command.main() == 0
    assert capsys.readouterr().out.startswith("amskv_kernels ")
    assert 'amskv = "amskv_command:main"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


FOREIGN = """
import matplotlib
matplotlib.use("svg")
from matplotlib import pyplot
own = pyplot.figure()
from amskv_kernels.cli import main, plots
assert main(["plan", "--model", "var-d16", "--policy", "full", "--plot", sys.argv[1] + "/plan.png"]) == 0
assert matplotlib.get_backend() == "svg"
assert pyplot.get_fignums() == [1] and pyplot.gcf() is own
"""


def test_a_process_keeps_its_own_matplotlib(tmp_path):
    done = amskv("-c", f"import sys\n{FOREIGN}", str(tmp_path), stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


RELOAD = """
import importlib, sys
import torch, amskv_kernels, amskv_kernels.cli, amskv_kernels.calibrate
import amskv_kernels.integrations.var, amskv_kernels.integrations.infinity, amskv_kernels.models.checkpoint
names = [name for name in sys.modules if name.split(".")[0] == "amskv_kernels" and not name.endswith("__main__")]
for _ in range(2):
    for name in names:
        importlib.reload(sys.modules[name])
q = torch.randn(1, 4, 2, 64)
pages, table = torch.zeros(2, 2, 16, 64), torch.zeros(1, 1, 1, dtype=torch.int32)
arena = torch.tensor([[0, 1]], dtype=torch.int32)
out, _ = torch.ops.amskv.attn(q, q, q, pages, arena, table[..., :0].contiguous(), table + 4, 0.125)
truth = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, scale=0.125).transpose(1, 2)
assert torch.allclose(out, truth, atol=1e-5)
"""


def test_modules_may_be_reloaded():
    done = amskv("-c", RELOAD, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
