"""README and docs: tables as the committed results give them, links that lead somewhere, examples that run."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.report import readme

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("path", readme.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path):
    page = path.read_text(encoding="utf-8")
    assert readme.fill(page) == page, "run make readme"


def test_unknown_and_open_blocks_are_refused():
    with pytest.raises(ValueError, match="table 'speed-of-light' is not known; known: "):
        readme.fill("<!-- table: speed-of-light -->\n<!-- end -->")
    with pytest.raises(ValueError, match="a table block has no"):
        readme.fill("<!-- table: digits -->\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_worked_call_runs():
    page = (ROOT / "docs/op.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/op.md", "exec"), {})


def test_the_ops_page_has_every_argument():
    from amskv_kernels import ops

    page = (ROOT / "docs/op.md").read_text(encoding="utf-8")
    for name in ops.SCHEMAS:
        arguments = [argument.name for argument in getattr(torch.ops.amskv, name).default._schema.arguments]
        signature = re.search(rf"^    {name}\((.*)\) -> ", page, re.M)
        assert [part.split("=")[0].strip() for part in signature[1].split(",")] == arguments


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(" ".join(re.findall(r"^\.PHONY:(.*)$", makefile, re.M)).split())
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))
    assert phony == described


def test_versions_agree():
    from amskv_kernels import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
