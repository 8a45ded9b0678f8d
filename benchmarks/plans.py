"""What planned caches take, and how long planning does: `python -m benchmarks.plans` writes results/plans.json.

Exact arithmetic but for the planner's own time, which is the median on this machine, one core.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from amskv_kernels import CachePlan, parse_policy
from amskv_kernels.memory import report
from amskv_kernels.models.shapes import ModelShape
from amskv_kernels.policies import PUBLISHED_SAVINGS

RESULT = Path(__file__).parent / "results" / "plans.json"
REPETITIONS = 15


def measure() -> dict:
    """Every known model under `full`, and under AMS-KV at each published saving."""
    cases = [
        (name, policy)
        for name in ModelShape.names()
        for policy in ("full", *(f"ams-kv:{percent:g}" for percent in PUBLISHED_SAVINGS.get(name, (75.0, 84.83))))
    ]
    rows = []
    for name, text in tqdm(cases, unit="plan"):
        shape = ModelShape.named(name)
        seconds = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            plan = CachePlan.build(shape.schedule, parse_policy(text, shape.schedule, shape.layers), shape.layers)
            seconds.append(time.perf_counter() - start)
        row = report(plan, shape, text, images=1).as_dict()
        row["settings"] = repr(parse_policy(text, shape.schedule, shape.layers))
        row["plan_ms"] = round(1e3 * statistics.median(seconds), 2)
        rows.append(row)
    return {"machine": {"cpu": cpu_name(), "python": platform.python_version()}, "rows": rows}


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def render(rows: list[dict], style: str = "simple") -> str:
    """The rows as a table for people."""
    lines = [
        (
            row["model"],
            row["policy"],
            f"{row['retained_tokens_per_layer']:.1f} of {row['total_tokens']}",
            f"{row['stock_mib']:,.1f}",
            f"{row['retained_mib']:,.1f}",
            f"{row['allocated_mib']:,.1f}",
            f"{row['saved_of_all']:.1%}",
            f"{row['saved_of_prefix']:.1%}",
            f"{row['saved_bytes']:.1%}",
            row["page_size"],
            f"{row['plan_ms']:.1f}",
        )
        for row in rows
    ]
    headers = (
        "model", "policy", "tokens / layer", "stock MiB", "retained MiB", "allocated MiB", "tokens saved, of all",
        "of prefix", "bytes saved", "page", "plan ms",
    )  # fmt: skip
    return tabulate(
        lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=("left", "left", *["right"] * 9)
    )


def main() -> None:
    """Measure, write, print."""
    result = measure()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"one image with guidance, bf16 pages; planned on {result['machine']['cpu']}\n\n{render(result['rows'])}\n")
    print(f"written {RESULT}")


if __name__ == "__main__":
    main()
