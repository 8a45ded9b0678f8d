"""Files as users have them: what is no measurement is named, and a save that fails leaves what was there."""

import ast
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from amskv_kernels import Calibration
from amskv_kernels.cli import plots
from amskv_kernels.files import check_writable, parse_json, read_json, replacing, write_json, write_text
from amskv_kernels.models import checkpoint
from amskv_kernels.policies import Drafters, HeadOrders
from benchmarks.harness.results import Run, UnreadableResultError, read

ROOT = Path(__file__).parents[1]
SIZES = ((1, 1), (2, 2), (3, 3))
TABLE = ((0.0, -1.0, -0.5), (0.0, -0.2, -0.1))
CALIBRATION = Calibration(SIZES, TABLE, (0,), -0.5, 4)
DRAFTERS = Drafters(SIZES, TABLE, ((), (0,), (1,)), 4, 8)
ORDERS = HeadOrders((((0, 0), (0, 1)),), SIZES, 4)

LOADERS = {"calibration": Calibration.load, "drafters": Drafters.load, "orders": HeadOrders.load, "result": read}
NO_JSON = {
    "text": b"hello\n",
    "empty": b"",
    "binary": bytes(range(256)),
    "not a number": b'{"format": NaN}',
    "infinity": b'{"format": "amskv-similarity-1", "theta": Infinity}',
    "an overflow": b'{"format": "amskv-asi-1", "theta": -1e999}',
    "a huge integer": b'{"orders": [' + b"9" * 5000 + b"]}",
    "65 bits": b'{"orders": [18446744073709551617]}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("what", NO_JSON)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_not_json_is_named(tmp_path, loader, what):
    path = tmp_path / "m.json"
    path.write_bytes(NO_JSON[what])
    with pytest.raises(ValueError, match="cannot be read: ") as caught:
        LOADERS[loader](path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


WRONG_FIELDS = [None, True, "1", [], {}, -1, 1.5, [[1]], "x" * 1000]


@pytest.mark.parametrize("found", [CALIBRATION, DRAFTERS, ORDERS], ids=lambda each: type(each).__name__)
def test_every_field_of_a_wrong_kind_is_named(tmp_path, found):
    path = tmp_path / "m.json"
    found.save(path)
    raw = json.loads(path.read_text())
    for name in raw.keys() - {"model"}:
        for wrong in WRONG_FIELDS:
            if (name, wrong) in (
                ("schedule", None),
                ("half", None),
                ("theta", -1),
                ("theta", 1.5),
                ("demanding_layers", []),
                ("demanding_layers", {}),
            ):
                continue  # as good as any
            path.write_text(json.dumps({**raw, name: wrong}))
            if name == "format" and isinstance(found, HeadOrders):
                continue  # the authors' own files have none
            with pytest.raises(ValueError, match=r"is corrupt: |has format ") as caught:
                type(found).load(path)
            assert str(path) in str(caught.value), (name, wrong)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("whole", ["1", "null", "[]", "[[]]", "[1]", '"text"', "{}", '{"format": []}', "[[[[0]]]]"])
def test_json_of_another_kind_is_named(tmp_path, loader, whole):
    path = tmp_path / "m.json"
    path.write_text(whole)
    with pytest.raises(ValueError, match=str(path)):
        LOADERS[loader](path)


def test_a_checkpoint_in_place_of_a_measurement_is_refused_unread(tmp_path):
    path = tmp_path / "var.pth"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # a hole: nothing is on the disk, reading it would take 8 GiB
    with pytest.raises(ValueError, match="it has 8589934592 bytes; such a file has at most"):
        read_json(path, "calibration")


def test_a_device_without_an_end_is_refused():
    with pytest.raises(ValueError, match="calibration /dev/zero cannot be read: it goes on after 67108864 bytes"):
        read_json("/dev/zero", "calibration")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(UnreadableResultError, match=f"result {path} cannot be read: "):
            read(path)


def test_json_has_finite_numbers_of_64_bits():
    assert parse_json("[9223372036854775807, -9223372036854775808, 1e308, -0.0]") == [2**63 - 1, -(2**63), 1e308, 0.0]


class DiskFullError(OSError):
    """What a write raises once the disk is full."""


SAVES = {
    "calibration": CALIBRATION.save,
    "drafters": DRAFTERS.save,
    "orders": ORDERS.save,
    "json": lambda path: write_json(path, [1, 2]),
    "text": lambda path: write_text(path, "x" * 100_000),
    "checkpoint": lambda path: checkpoint.save(path, torch.nn.Linear(300, 300), {}, checkpoint.ScaleSchedule(SIZES)),
    "picture": lambda path: plots.similarity(CALIBRATION, path),
    "result": lambda path: Run(path, {}).save(),
}


@pytest.mark.parametrize("name", SAVES)
def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch, name):
    path = tmp_path / "file.png"
    path.write_bytes(b"old")
    real = os.fsync

    def full(file):
        real(file)
        raise DiskFullError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # everything is written by then, nothing is in its place
    with pytest.raises(DiskFullError):
        SAVES[name](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    SAVES[name](path)
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        beside.write_text("half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, [float("nan")])
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_modes_and_links_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("real")
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    write_text(tmp_path / "a" / "b", "new")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o666 & ~umask


def test_what_is_no_regular_file_is_written_to_directly(tmp_path):
    write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    check_writable("/dev/null")


def test_outputs_that_cannot_be_written_are_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        ("", "'' is empty; it must name a file"),
        (f"{tmp_path}/", "is a directory"),
        (str(tmp_path), "is a directory"),
        (f"{tmp_path}/file/x", "cannot be written: Not a directory"),
        (f"{tmp_path}/{'x' * 300}", "cannot be written: File name too long"),
        (f"{tmp_path}/new/{'x' * 300}", "cannot be written: File name too long"),
        (f"{tmp_path}/{'x' * 300}/new", "cannot be written: File name too long"),
        ("/proc/none/x", "cannot be written: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            check_writable(path)
        assert len(str(caught.value)) < 200
    check_writable(tmp_path / "new" / "er" / "x")
    check_writable(tmp_path / "file")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_everything_that_is_saved_goes_through_replacing():
    direct = {"write_text", "write_bytes", "savefig", "save_file", "dump"}
    for folder in ("amskv_kernels", "benchmarks", "examples"):
        for source in (ROOT / folder).rglob("*.py"):
            text = source.read_text(encoding="utf-8")
            within = [
                range(node.lineno, node.end_lineno + 1)
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.With) and "replacing(" in ast.unparse(node.items[0])
            ]
            for node in ast.walk(ast.parse(text)):
                method = isinstance(node, ast.Call) and (
                    (isinstance(node.func, ast.Attribute) and node.func.attr in direct)
                    or (isinstance(node.func, ast.Name) and node.func.id == "save_file")
                    or ast.unparse(node.func) == "torch.save"
                )
                assert not method or any(node.lineno in lines for lines in within), f"{source}:{node.lineno}"
