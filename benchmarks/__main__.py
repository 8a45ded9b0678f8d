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
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from amskv_kernels.cli import console
from amskv_kernels.cli.arguments import output_file
from benchmarks.harness import machine, measure, peers
from benchmarks.harness.cases import (
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
from benchmarks.harness.results import FOLDER, Run, UnreadableResultError, committed
from benchmarks.harness.roofs import GPUS, measure_ceilings
from benchmarks.harness.tasks import BROKEN_DEVICE, BrokenDeviceError, Context, Task, run_tasks
from benchmarks.report import compare
from benchmarks.report.tables import show
from benchmarks.suites import host, image, module, plans, roof, serving, steps

GPU_SUITES = ("kernel", "module", "image", "host", "plan")
CPU_SUITES = ("cpu", "host", "plan", "roof")
RUNS_ON = {
    "cpu": ("cpu",), "host": ("cuda", "cpu"), "image": ("cuda", "cpu"), "kernel": ("cuda",), "module": ("cuda", "cpu"),
    "plan": ("cuda", "cpu"), "roof": ("cuda", "cpu"), "serving": ("cpu",),
}  # fmt: skip


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
                context.absent[policy] = str(error)
                continue
            cases.append(Case(model, policy, images, dtype))
    return cases


def module_cases(context: Context) -> list[Case]:
    """The kernel suite's cases; on a CPU those of one image."""
    if context.device == "cuda":
        return kernel_suite(context)
    return [case for case in cpu_cases(context) if case.images == 1]


def plan_tasks(suites: Sequence[str], context: Context, gpu: str) -> list[Task]:
    """Every row of these suites, once."""
    tasks: list[Task] = []
    for suite in suites:
        if suite == "cpu":
            tasks += steps.tasks("cpu", cpu_cases(context), context)
            tasks += module.tasks("module", module_cases(context), context)
            tasks += image.tasks(context)
        elif suite == "kernel":
            tasks += steps.tasks("kernel", kernel_suite(context), context)
        elif suite == "module":
            tasks += module.tasks("module", module_cases(context), context)
        elif suite == "image":
            tasks += image.tasks(context)
        elif suite == "host":
            tasks += host.tasks(context)
        elif suite == "plan":
            tasks += plans.tasks(context)
        elif suite == "serving":
            tasks += serving.tasks(context)
        else:
            tasks += roof.tasks(gpu, context)
    return list({task.key: task for task in tasks}.values())


def seconds(text: str) -> float:
    """A positive time; argparse says this name where the text is none."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return float(text)


def threads(text: str) -> int:
    """At least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of threads; it must be at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(RUNS_ON))
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: at most four minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--roof", choices=tuple(GPUS), default="h200", help="GPU to predict for (default h200)")
    parser.add_argument("--out", type=output_file, help="result file (default benchmarks/results/MACHINE.json)")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="begin no further row after this long")
    parser.add_argument("--threads", type=threads, help="of the processor (default: what torch takes)")
    parser.add_argument("--fresh", action="store_true", help="do not continue an unfinished file")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=FILE.py:FUNCTION", help="one more peer: see peers.add"
    )
    parser.add_argument("--no-docs", action="store_true", help="leave README.md and docs/ as they are")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the device and the suites that were not named; exits where this machine cannot run them."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.device = device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda; this torch sees no GPU")
    for text in arguments.peer:
        try:
            peers.add(text)
        except ValueError as error:
            parser.error(str(error))
    runnable = ", ".join(suite for suite, devices in RUNS_ON.items() if device in devices)
    for suite in arguments.suites:
        if suite not in RUNS_ON:
            parser.error(f"suite {suite!r} is not known; known: {', '.join(RUNS_ON)}")
        if device not in RUNS_ON[suite]:
            where = "needs a GPU" if device == "cpu" else "needs --device cpu"
            parser.error(f"suite {suite!r} {where}; what runs on {device}: {runnable}")
    arguments.suites = arguments.suites or list(GPU_SUITES if device == "cuda" else CPU_SUITES)
    return arguments


def run_suites(argv: Sequence[str]) -> int:
    """Measure; 1 if any of our results was wrong."""
    arguments = _parse(argv)
    device, suites = arguments.device, arguments.suites
    deadline = None if arguments.budget is None else time.monotonic() + arguments.budget
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
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
        print(f"{key}: {run.missing[key]}", file=sys.stderr)
    if complete and not arguments.no_docs and path.resolve().parent == FOLDER.resolve() and not arguments.quick:
        write_docs()
    return 1 if wrong else 0


def write_docs() -> None:
    """Draw docs' plots and fill the tables of README.md and docs/, from all committed results."""
    from benchmarks.report import plots, readme

    for path in plots.draw(committed()):
        print(f"drawn {path}")
    readme.main([])


def main(argv: Sequence[str]) -> int:
    """One command; 2 where a file given is no result, BROKEN_DEVICE where a new process can go on."""
    try:
        return _run(argv)
    except UnreadableResultError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except BrokenDeviceError as error:
        print(f"benchmarks: {error}; the same command goes on after it", file=sys.stderr)
        return BROKEN_DEVICE


def _run(argv: Sequence[str]) -> int:
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
    sys.exit(console.run(lambda: main(sys.argv[1:])))
