"""The rooms: who may import whom, how long a file and a function may be, and that CONTRIBUTING's map is the tree's."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "amskv_kernels"

# Room → the rooms that it may import. What every room may import stands in COMMON.
COMMON = {"arguments", "files", "schedule", "shapes", "version"}
MAY_IMPORT = {
    "version": set(),
    "arguments": set(),
    "schedule": {"arguments"},
    "shapes": {"schedule", "arguments"},
    "files": {"schedule", "arguments"},
    "policies": COMMON,
    "planning": COMMON | {"policies"},
    "models": COMMON,
    "calibrate": COMMON | {"models", "policies"},
    "ops": COMMON | {"planning"},
    "cache": COMMON | {"calibrate", "ops", "planning", "policies"},
    "integrations": COMMON | {"cache", "models", "ops", "planning", "policies"},
    "serving": COMMON | {"models", "ops", "planning", "policies"},
    "cli": COMMON | {"serving", "cache", "calibrate", "integrations", "models", "ops", "planning", "policies"},
    "__init__": COMMON | {"cache", "integrations", "ops", "planning", "policies"},
    "__main__": {"cli"},
}
# Within ops: the doors import the checks and the backends; a backend knows neither the doors nor another backend.
OUTSIDE = {"benchmarks", "examples", "tests", "tools"}
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 60

SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(source: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def room_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(source):
    room = room_of(source)
    for module in imported(source):
        first, *rest = module.split(".")
        assert first not in OUTSIDE, f"{room} imports {module}"
        if first != "amskv_kernels" or not rest or not _is_module(rest[0]):
            continue
        assert rest[0] == room or rest[0] in MAY_IMPORT[room], f"{room} imports {module}"


@pytest.mark.parametrize("source", sorted(PACKAGE.glob("ops/backends/**/*.py")), ids=lambda path: path.name)
def test_backends_know_neither_the_doors_nor_each_other(source):
    own = source.relative_to(PACKAGE / "ops" / "backends").parts[0].removesuffix(".py")
    for module in imported(source):
        assert not re.match(r"amskv_kernels\.ops\.(dispatch|schemas)\b", module), module
        other = re.match(r"amskv_kernels\.ops\.backends\.(\w+)", module)
        assert other is None or other[1] == own, module


def test_no_room_is_without_its_rule():
    assert {room_of(source) for source in SOURCES} == set(MAY_IMPORT)


def test_no_circles_between_rooms():
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {room for room, needs in MAY_IMPORT.items() if needs <= done} - done
        assert ready, f"a circle among {set(MAY_IMPORT) - done}"
        done |= ready


def python_files() -> list[Path]:
    folders = ("amskv_kernels", "benchmarks", "examples", "tools", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_FUNCTION, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_sources_of_the_library_are_short(path):
    if path.suffix in (".cu", ".cuh", ".cpp", ".h"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = [path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    rooms += [
        f"csrc/{path.name}"
        for path in (ROOT / "csrc").iterdir()
        if path.is_dir() and set(path.rglob("*.*")) - set(path.rglob("*.pyc"))
    ]
    missing = [room for room in rooms if f"`{room}/`" not in text]
    assert not missing


def _is_module(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
