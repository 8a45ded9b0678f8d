"""Write the tables of README.md and docs/ from committed results: `python -m benchmarks.readme`.

A block between `<!-- table: NAME -->` and `<!-- end -->` is replaced by what `BLOCKS[NAME]` makes; with --check
nothing is written and the exit code tells whether something would be.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import plans
from examples.digits import demo

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
DEMO = ROOT / "examples" / "digits" / "results" / "demo.json"
EVALUATION = ROOT / "examples" / "digits" / "results" / "evaluation.json"
HEADLINE = (("var-d30", "full"), ("var-d30", "ams-kv:75"), ("var-d30", "ams-kv:84.83"), ("var-d36", "ams-kv:75"),
            ("infinity-2b", "ams-kv:75"), ("infinity-8b", "ams-kv:75"))  # fmt: skip


def _digits() -> str:
    result = json.loads(DEMO.read_text(encoding="utf-8"))
    machine = result["machine"]
    return (
        f"{demo.render(result['rows'], 'github')}\n\n{result['images']} digits in batches of {result['batch']} with "
        f"guidance, {machine['dtype']}; measured on {machine['cpu']}, torch {machine['torch']} "
        f"([demo.json](examples/digits/results/demo.json))."
    )


def _planned(cases: tuple[tuple[str, str], ...] | None) -> str:
    result = json.loads(plans.RESULT.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if cases is None or (row["model"], row["policy"]) in cases]
    return (
        f"{plans.render(rows, 'github')}\n\nOne image with guidance, bf16 pages. Memory is exact arithmetic; planned "
        f"on {result['machine']['cpu']}, one core (`benchmarks/results/plans.json`)."
    )


def _settings() -> str:
    result = json.loads(plans.RESULT.read_text(encoding="utf-8"))
    lines = [
        f"| {row['model']} | `{row['policy']}` | {row['saved_of_all']:.2%} | `{row['settings']}` |"
        for row in result["rows"]
        if row["policy"] != "full"
    ]
    return "\n".join(["| model | policy | tokens saved | settings |", "|---|---|---|---|", *lines])


def _evaluation() -> str:
    result = json.loads(EVALUATION.read_text(encoding="utf-8"))
    lines = [f"| {name} | {share:.1%} |" for name, share in result["recognised"].items()]
    judge = "; ".join(f"{share:.1%} {name}" for name, share in result["judge"].items())
    return "\n".join(
        ["| cache | digits recognised |", "|---|---|", *lines, "",
         f"{result['images']} digits each. The classifier itself recognises {judge}. Measured on {result['device']}, "
         f"torch {result['torch']}."]
    )  # fmt: skip


BLOCKS: dict[str, Callable[[], str]] = {
    "digits": _digits,
    "digits-evaluation": _evaluation,
    "plans": lambda: _planned(HEADLINE),
    "all-plans": lambda: _planned(None),
    "settings": _settings,
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
                path.write_text(filled, encoding="utf-8")
    if stale:
        print(f"{'stale' if '--check' in argv else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
