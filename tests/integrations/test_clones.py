"""The same checks on clones of the public code: `pytest tests/integrations/test_clones.py --repo STAR=DIR …`.

With `--families-report FILE` what is found goes there, for the table in docs/patching.md.
"""

import json
import subprocess
from pathlib import Path

import checks
import clones
import pytest
import torch

from amskv_kernels.models.infinitystar import references
from amskv_kernels.ops import choose
from benchmarks.report.families import stock_tokens

NOTE = (
    "Small models of blocks out of each clone, random weights, on a CPU with backend "
    f"`{choose('attn', 'cpu', torch.float32).backend}`: the largest difference over what is drawn, relative to its "
    "largest value, in fp32. InfinityStar's public class attends in bf16 whatever it is given, and runs under "
    "autocast. FastVAR picks tokens by rank, and rounding swaps two of them. Policies: the last map, the "
    "first and the last, two in one layer. Graphs: of three compiled blocks, drawing twice. STAR's class is that of a "
    "fork (hunnieej/CamVAR); VAR-CLIP's attention is VAR's own; HART's GPT-2 attention cannot run in its own public "
    "block and is checked on a stand-in alone."
)
# Whose code it is, and where a fork holds it in a folder of its own.
REPOSITORIES, FOLDERS = {"Infinity, heads of 104": "Infinity"}, {"FastVAR": "Infinity"}


@pytest.fixture(params=clones.FAMILIES)
def found(request, clone):
    root = clone(REPOSITORIES.get(request.param, request.param))
    return request.param, root, clones.case(request.param, root / FOLDERS.get(request.param, ""))


def commit_of(root: Path) -> str:
    words = ["git", "-C", str(root), "log", "-1", "--format=%h"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.mark.filterwarnings("ignore")
def test_a_clones_blocks_are_patched_as_any(found, request):
    name, root, case = found
    full, policies = checks.full_is_stock(case), checks.policies_are_masks(case)
    assert max(full, policies) < case.close
    checks.undo_leaves_nothing(case)
    checks.copies_are_their_own(case, pickles=False)  # a file under a name of its own cannot be imported again
    graphs = checks.compiled_graphs(case)
    assert graphs <= 40
    report = request.config.getoption("--families-report")
    if report is not None:
        path = Path(report)
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"families": {}}
        kind = "within bf16" if case.close > 1e-3 else "yes"
        row = {"full": kind, "policies": kind, "undo": "bit for bit", "copies": "their own", "graphs": graphs}
        result["families"][name] = {**row, "largest_difference": max(full, policies), "commit": commit_of(root)}
        path.write_text(
            json.dumps({"note": NOTE, "families": result["families"]}, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def test_infinitystars_own_cache_holds_what_the_docs_say(clone):
    model = clones.case("InfinityStar", clone("InfinityStar")).make()
    model.draw()
    expected = stock_tokens(model.maps, references(model.maps), model.text)
    assert model.held == [held for held, _ in expected]
