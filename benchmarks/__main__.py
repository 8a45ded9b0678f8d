"""`python -m benchmarks`: measure this machine, write one JSON, and make tables and plots of it.

python -m benchmarks                          every suite that this machine can run
python -m benchmarks kernel module --quick    some of them, briefly
python -m benchmarks --budget 540             stop in nine minutes; the same command goes on where it stopped
python -m benchmarks roof --roof h100         the least times of a GPU that is not here (predictions)
python -m benchmarks show [FILES]             tables of results on the terminal
python -m benchmarks compare A.json B.json    what became faster or slower from A to B
python -m benchmarks docs                     fill README.md and docs/ and draw their plots, from committed results
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import compare, machine, measure, plans, suite_image, suite_module, suite_roof, suite_steps
from benchmarks.cases import (
    CPU_CASES,
    IMAGES,
    MODELS,
    POLICIES,
    QUICK_CPU_CASES,
    QUICK_MODELS,
    QUICK_POLICIES,
    Case,
    groups,
    kernel_cases,
)
from benchmarks.results import FOLDER, Run, committed
from benchmarks.roofs import GPUS, measure_ceilings
from benchmarks.suites import Context, Task, run_tasks
from benchmarks.tables import show

GPU_SUITES = ("kernel", "module", "image", "plan")
CPU_SUITES = ("cpu", "plan", "roof")


def kernel_suite(context: Context) -> list[Case]:
    """The cases that this GPU's memory holds."""
    free = 1 << 30
    if context.device == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    models, policies = (QUICK_MODELS, QUICK_POLICIES) if context.quick else (MODELS, POLICIES)
    cases = []
    for found in kernel_cases(models, policies, IMAGES[:1] if context.quick else IMAGES, free):
        if isinstance(found, Case):
            cases.append(found)
        else:
            context.absent[found[0]] = found[1]
    return cases


def cpu_cases(context: Context) -> list[Case]:
    """The CPU's cases whose policies there are."""
    cases = []
    for model, policies, images, dtype in QUICK_CPU_CASES if context.quick else CPU_CASES:
        for policy in policies:
            try:
                groups((model, policy))
            except ValueError as error:
                context.absent[policy] = f"not available yet: {error}"
                continue
            cases.append(Case(model, policy, images, dtype))
    return cases


def plan_tasks(suites: Sequence[str], context: Context, gpu: str) -> list[Task]:
    """Every row of these suites."""
    tasks: list[Task] = []
    for suite in suites:
        if suite == "cpu":
            cases = cpu_cases(context)
            tasks += suite_steps.tasks("cpu", cases, context)
            tasks += suite_module.tasks("module", [case for case in cases if case.images == 1], context)
            tasks += suite_image.tasks(context)
        elif suite == "kernel":
            tasks += suite_steps.tasks("kernel", kernel_suite(context), context)
        elif suite == "module":
            tasks += suite_module.tasks("module", kernel_suite(context), context)
        elif suite == "image":
            tasks += suite_image.tasks(context)
        elif suite == "plan":
            tasks += plans.tasks(context)
        else:
            tasks += suite_roof.tasks(gpu, context)
    return tasks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted({*GPU_SUITES, *CPU_SUITES})
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: at most four minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--roof", choices=tuple(GPUS), default="h200", help="GPU to predict for (default h200)")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/MACHINE.json)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further row after this long")
    parser.add_argument("--threads", type=int, help="of the processor (default: what torch takes)")
    parser.add_argument("--fresh", action="store_true", help="do not continue an unfinished file")
    parser.add_argument("--no-docs", action="store_true", help="leave README.md and docs/ as they are")
    return parser


def run_suites(argv: Sequence[str]) -> int:
    """Measure; 1 if any of our results was wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    unknown = set(arguments.suites) - {*GPU_SUITES, *CPU_SUITES}
    if unknown:
        parser.error(f"suite {unknown.pop()!r} is not known; known: {', '.join(sorted({*GPU_SUITES, *CPU_SUITES}))}")
    deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    suites = arguments.suites or list(GPU_SUITES if device == "cuda" else CPU_SUITES)
    facts = machine.describe(device)
    commit, dirty = machine.commit()
    path = arguments.out or FOLDER / f"{machine.slug(facts)}{'-quick' if arguments.quick else ''}.json"
    header = {
        "commit": commit,
        "dirty": dirty,
        "sources": machine.sources(),
        "machine": facts,
        "quick": arguments.quick,
    }
    with Run(path, header, arguments.fresh) as run:
        run.header.setdefault("clocks_before", machine.clocks(device))
        if "ceilings" not in run.header:
            run.header["ceilings"] = measure_ceilings(device, arguments.quick)
        context = Context(device, arguments.quick, run.header["ceilings"], measure.timer_for(device))
        tasks = plan_tasks(suites, context, arguments.roof)
        run.begin(suites, [task.key for task in tasks])
        if run.rows:
            print(f"going on with {path}: {len(run.rows)} rows are there")
        for what, why in context.absent.items():
            run.miss(what, why)
        complete, wrong = run_tasks(tasks, run, deadline)
        run.header["clocks_after"] = machine.clocks(device)
        if complete:
            run.finish(suites)
    print(show(committed([path])))
    print(f"\nwritten {path}" + ("" if complete else ": not all of it yet; the same command goes on"))
    for key in wrong:
        print(f"wrong result: {key}: {run.missing[key]}", file=sys.stderr)
    if complete and not arguments.no_docs and path.resolve().parent == FOLDER.resolve() and not arguments.quick:
        write_docs()
    return 1 if wrong else 0


def write_docs() -> None:
    """Draw docs' plots and fill the tables of README.md and docs/, from all committed results."""
    from benchmarks import plots, readme

    for path in plots.draw(committed()):
        print(f"drawn {path}")
    readme.main([])


def main(argv: Sequence[str]) -> int:
    """One command."""
    command, rest = (argv[0] if argv else ""), list(argv[1:])
    if command == "compare":
        return compare.main(rest)
    if command == "show":
        print(show(committed([Path(name) for name in rest] or None)))
        return 0
    if command == "docs":
        write_docs()
        return 0
    return run_suites(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
