"""Write the tables of README.md and docs/ from committed results: `python -m benchmarks.report.readme`.

A block between `<!-- table: NAME -->` and `<!-- end -->` is replaced by what `BLOCKS[NAME]` makes; with --check
nothing is written and the exit code tells whether something would be.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amskv_kernels.cli import console
from amskv_kernels.files import write_text
from amskv_kernels.planning.memory import counted
from amskv_kernels.policies import parse_policy
from amskv_kernels.shapes import ModelShape
from benchmarks.harness.results import committed, newest, rows
from benchmarks.report import families, plots, shipped, staggering, tables, targets
from benchmarks.report.tables import NONE_YET
from benchmarks.suites.plans import memory_of

Result = dict[str, Any]
ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NATIVE_REPORT = ROOT / "tools" / "reports" / "native-report.json"
FUZZ = ROOT / "tools" / "reports" / "fuzz.json"
COMPATIBILITY = ROOT / "tools" / "reports" / "compatibility.json"
HEADLINE = (("var-d30", "full"), ("var-d30", "ams-kv:75"), ("var-d30", "ams-kv:84.83"), ("var-d36", "ams-kv:75"),
            ("infinity-2b", "ams-kv:75"), ("infinity-8b", "ams-kv:75"))  # fmt: skip

STEPS = (("var-d30", "full"), ("var-d30", "ams-kv:75"), ("infinity-2b", "full"))
PEERS_NOTE = "Columns to the right: a peer's time over ours, so more than 1 is slower than ours."


def _newest(suite: str, device: str | None, make: Callable[[Result], str]) -> str:
    """What `make` says of the newest committed result that has the suite."""
    result = newest(committed(), suite, device)
    return NONE_YET if result is None else make(result)


def _planned(cases: tuple[tuple[str, str], ...] | None) -> str:
    def make(result: Result) -> str:
        found = [row for row in rows(result, "plan") if cases is None or (row["model"], row["policy"]) in cases]
        return (
            f"{tables.plans(found, 'github')}\n\nOne image with guidance, MiB; bf16 pages, and what int8 pages need. "
            f"Memory is exact arithmetic; "
            f"planned on {result['machine']['cpu']}, one core (`benchmarks/results/{result['file']}`)."
        )

    return _newest("plan", None, make)


def _lossless() -> str:
    """What `Full()` needs of stock's bytes: of a released model in 16 bit, and of the digits in fp32."""
    planned = memory_of("var-d30", "full")
    result = shipped.result_of("digits", "demo.json")
    assert result is not None
    digits = next(row for row in result["rows"] if row["policy"] == "full")
    needed = 1 - float(str(planned["saved"]))
    return (
        f'`"full"` in place of the policy gives the unpatched model\'s images: the last scale, which nothing reads, is '
        f"not stored.\nIn bf16, var-d30 then needs {needed:.0%} of the bytes that stock caches, whose keys are fp32; "
        f"in fp32, as the digits\nbelow, {digits['retained_share']:.0%} of stock's bytes are retained."
    )


def _settings() -> str:
    def make(result: Result) -> str:
        lines = []
        for row in (row for row in rows(result, "plan") if row["policy"] != "full"):
            shape = ModelShape.named(row["model"])
            own, policy = (
                memory_of(shape.name, row["policy"]),
                parse_policy(row["policy"], shape.schedule, shape.layers),
            )
            shares = f"{own['kept_of_all']:.2%} | {own['saved_of_all']:.2%}"
            lines.append(f"| {shape.name} | `{row['policy']}` | {shares} | `{policy!r}` |")
        return "\n".join(["| model | policy | tokens kept | saved | settings |", "|---|---|---|---|---|", *lines])

    return _newest("plan", None, make)


def _captioned(make: Callable[[Result, str], str], before: str = "") -> Callable[[Result], str]:
    """A table with its machine under it."""
    return lambda result: f"{make(result, 'github')}\n\n{before}{tables.caption(result)}"


def _steps(suite: str) -> Callable[[Result], str]:
    def make(result: Result) -> str:
        parts = []
        for case in tables.cases(rows(result, suite)):
            if case[:2] not in STEPS or case[2] != (1 if suite == "cpu" else 64):
                continue
            own = [row for row in rows(result, suite) if tables.case_of(row) == case]
            title = f"**{case[0]}, `{case[1]}`, {counted(case[2], 'image')} with guidance, {case[3]}**"
            parts.append(f"{title}\n\n{tables.steps(own, 'github')}")
        return "\n\n".join([*parts, f"{PEERS_NOTE} {tables.caption(result)}"])

    return make


def _one_thread() -> str:
    """The sums of the newest result on one thread."""
    alone = [result for result in committed() if result["machine"].get("threads") == 1]
    found = newest(alone, "cpu", "cpu")
    return NONE_YET if found is None else _captioned(lambda r, s: tables.sums(r, "cpu", s), PEERS_NOTE + " ")(found)


def _roofs(result: Result) -> str:
    found = rows(result, "roof")
    wanted = [row for row in found if row["images"] == 64]
    first = next((row for row in found if (row["model"], row["policy"]) == STEPS[0]), found[0])
    title = f"{first['model']}, `{first['policy']}`, {counted(first['images'], 'image')} with guidance, bf16"
    return (
        f"**Prediction, nothing measured**: the least times that bytes and operations allow on one "
        f"{first['gpu'].upper()}, {first['ceilings']}.\n\n{tables.roofs(wanted, 'github')}\n\n"
        f"{title}, one layer's call of each step:\n\n"
        f"{tables.roof_steps(first, 'github')}\n\n`benchmarks/results/{result['file']}`"
    )


def _last_calls(result: Result) -> str:
    wanted = (*STEPS, ("var-d36", "full"), ("var-d36", "ams-kv:75"), ("infinity-2b", "ams-kv:75"))
    found = [r for r in rows(result, "roof") if r["images"] == 64 and (r["model"], r["policy"]) in wanted]
    return (
        f"**Prediction, nothing measured**: one layer's call of the last step, 64 images with guidance, bf16, on one "
        f"{found[0]['gpu'].upper()}, {found[0]['ceilings']}.\n\n{tables.last_calls(found, 'github')}\n\n"
        f"`benchmarks/results/{result['file']}`"
    )


def _api() -> str:
    from tools import api_page

    return api_page.render()


def _hopper_kernels() -> str:
    report = json.loads(NATIVE_REPORT.read_text(encoding="utf-8"))
    special = [row for row in report["rows"] if "waits per tile" in row]
    return (
        f"{tables.facts(special, 'kernel', 'github')}\n\nCounted in the compiled library, CUDA {report['cuda']} "
        f"(`tools/reports/{NATIVE_REPORT.name}`)."
    )


def _int8_kernels() -> str:
    """What a thread of the portable kernel does for a tile of int8 pages, on Hopper."""
    report = json.loads(NATIVE_REPORT.read_text(encoding="utf-8"))
    found = [row for row in report["rows"] if "bytes to widen" in row and row["arch"] == "90a"]
    first = list(found[0]).index("instructions per tile, at most")
    shown = [
        {"kernel": re.sub(r"attn<(.*), \d+ rows.*", r"\1", row["kernel"])} | dict(list(row.items())[first:])
        for row in found
    ]
    return (
        f"{tables.facts(shown, 'kernel', 'github')}\n\nCounted in the compiled library, CUDA {report['cuda']} "
        f"(`tools/reports/{NATIVE_REPORT.name}`)."
    )


def _compatibility() -> str:
    """Torch releases by Pythons: where the wheel was run, what built it, and what else it builds against."""
    if not COMPATIBILITY.exists():
        return NONE_YET
    report = json.loads(COMPATIBILITY.read_text(encoding="utf-8"))
    kinds = {kind: [row for row in report["rows"] if row["kind"] == kind] for kind in ("build", "wheel", "suite")}
    pythons = sorted({row["asked"]["python"] for row in kinds["wheel"]}, key=lambda version: int(version.split(".")[1]))
    cells: dict[str, dict[str, str]] = {}
    for row in kinds["wheel"]:
        torch = row.get("torch", row["asked"]["torch"])
        cells.setdefault(torch, {})[row["asked"]["python"]] = "failed" if "failed" in row else "runs"
    built = {
        row.get("torch", row["asked"]["torch"]): "failed" if "failed" in row else f"on Python {row['asked']['python']}"
        for row in kinds["build"]
    }
    lines = [
        f"| torch {torch} | {built.get(torch, '')} | "
        + " | ".join(cells[torch].get(each, "") for each in pythons)
        + " |"
        for torch in sorted(cells, key=lambda version: [int(part) for part in re.findall(r"\d+", version)[:3]])
    ]
    head = ["| | built | " + " | ".join(f"Python {each}" for each in pythons) + " |", "|---" * (len(pythons) + 2) + "|"]
    note = (
        f"*Runs*: one wheel, `{report['wheel']['file']}`, built with torch {report['wheel']['torch']} and CUDA "
        f"{report['nvcc']}, installed beside that torch; without a GPU, so its CPU op computes and its CUDA ops are "
        f"called as far as their checks. *Built*: the library also compiles against that torch, and runs there. An "
        f"empty field was not tried (`tools/reports/{COMPATIBILITY.name}`)."
    )
    return "\n".join([*head, *lines, "", " ".join([note, *_suite_run(kinds["suite"])])])


def _suite_run(groups: list[Result]) -> list[str]:
    """A sentence on the tests run in another environment, if they were."""
    run = [row for row in groups if "suite" in row]
    if not run:
        return []
    tests, left_out = (sum(row["suite"][name] for row in run) for name in ("tests", "skipped"))
    failed = sum(len(row["suite"]["broken"]) for row in run)
    unfinished = f"; {len(groups) - len(run)} of {len(groups)} groups did not end" if len(run) < len(groups) else ""
    first = run[0]
    return [
        f"The tests on Python {first['python']}, torch {first['torch']}, Triton {first['triton']} and NumPy "
        f"{first['numpy']}: {tests - left_out - failed} passed, {failed} failed, {left_out} left out, most of them for "
        f"want of a GPU{unfinished}."
    ]


def _pictures() -> str:
    lines = [f"![{Path(name).stem.replace('-', ' ')}](images/{name})" for name in plots.wanted(committed())]
    return "\n\n".join(lines) if lines else NONE_YET


def _fuzz() -> str:
    if not FUZZ.exists():
        return "*Not run yet: no result is committed.*"
    result = json.loads(FUZZ.read_text(encoding="utf-8"))
    lines = [f"| {name} | {row['done']:,} | {len(row['wrong'])} |" for name, row in result["found"].items()]
    table = "\n".join(["| backend | drawn | wrong |", "|---|---|---|", *lines])
    where = f"torch {result['torch']}, {result['machine']}, seed {result['seed']}"
    return f"{table}\n\nVersion {result['version']}, {where} (`tools/reports/fuzz.json`)."


BLOCKS: dict[str, Callable[[], str]] = {
    "api": _api,
    "families": families.checked,
    "infinitystar": families.videos,
    "shootout": lambda: shipped.shootout_of("digits"),
    "shootout-avatars": lambda: shipped.shootout_of("avatars"),
    "precision": lambda: shipped.precision_of("digits"),
    "eight-bits": shipped.eight_bits,
    "digits": lambda: shipped.demo_of("digits"),
    "avatars": lambda: shipped.demo_of("avatars"),
    "avatars-judged": shipped.judged,
    "fuzz": _fuzz,
    "digits-evaluation": shipped.evaluation,
    "lossless": _lossless,
    "plans": lambda: _planned(HEADLINE),
    "all-plans": lambda: _planned(None),
    "settings": _settings,
    "targets": lambda: targets.render(committed(), "github"),
    "cpu-sums": lambda: _newest("cpu", "cpu", _captioned(lambda r, s: tables.sums(r, "cpu", s), PEERS_NOTE + " ")),
    "cpu-one-thread": _one_thread,
    "cpu-steps": lambda: _newest("cpu", "cpu", _steps("cpu")),
    "cpu-module": lambda: _newest("module", "cpu", _captioned(tables.modules)),
    "host": lambda: _newest("host", None, _captioned(tables.hosts)),
    "cpu-digits": lambda: _newest("image", "cpu", _captioned(tables.digits)),
    "gpu-sums": lambda: _newest(
        "kernel", "cuda", _captioned(lambda r, s: tables.sums(r, "kernel", s), PEERS_NOTE + " ")
    ),
    "gpu-steps": lambda: _newest("kernel", "cuda", _steps("kernel")),
    "gpu-module": lambda: _newest("module", "cuda", _captioned(tables.modules)),
    "gpu-images": lambda: _newest("image", "cuda", _captioned(tables.images)),
    "gpu-capacity": lambda: _newest("capacity", "cuda", _captioned(tables.capacity)),
    "last-calls": lambda: _newest("roof", None, _last_calls),
    "hopper-kernels": _hopper_kernels,
    "int8-kernels": _int8_kernels,
    "compatibility": _compatibility,
    "roofs": lambda: _newest("roof", None, _roofs),
    "serving": lambda: _newest("serving", "cpu", _captioned(tables.serving)),
    "staggering": staggering.table,
    "pictures": _pictures,
    "not-measured": lambda: "\n\n".join(f"`{r['file']}`\n\n{tables.missing(r)}" for r in committed() if r["missing"]),
}


def fill(page: str) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: a block of unknown name, or without its end.
    """

    def block(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise ValueError(f"table {match['name']!r} is not known; known: {', '.join(BLOCKS)}")
        return f"<!-- table: {match['name']} -->\n{BLOCKS[match['name']]()}\n<!-- end -->"

    starts = page.count("<!-- table: ")
    filled, count = re.subn(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)
    if count != starts:
        raise ValueError("a table block has no <!-- end -->")
    return filled


def main(argv: list[str]) -> int:
    """Rewrite, or with --check compare."""
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        filled = fill(page)
        if filled != page:
            stale.append(path.name)
            if "--check" not in argv:
                write_text(path, filled)
    if stale:
        print(f"{'stale' if '--check' in argv else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(console.run(lambda: main(sys.argv[1:])))
