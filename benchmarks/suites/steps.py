"""Every step of a generation as a row: our op against every peer, on the step's own roof."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import peers
from benchmarks.harness.cases import QUICK_MODELS, Case, Group, groups
from benchmarks.harness.gate import Gate, WrongResultError
from benchmarks.harness.inputs import CallInputs, Pool, group_work
from benchmarks.harness.results import Row
from benchmarks.harness.tasks import Context, Task, first_line, rates, ratios, still_works, timed

WARMED_UP = 1.5  # rough seconds of compiling and warming up that a GPU row costs besides its rounds


def tasks(suite: str, cases: list[Case], context: Context) -> Iterator[Task]:
    """One task per case and group of like calls."""
    for case in cases:
        for group in groups((case.model, case.policy)):
            key = f"{suite}/{case.name}/step {group.step}/history {group.history}/stored {group.stored}"

            def make(case: Case = case, group: Group = group) -> Row:
                pool = context.slot.get(case, lambda: Pool(case, context.device))
                return {"suite": suite, **step_row(pool, group, context)}

            yield Task(key, _cost(case, group, context), make, rank_of(case))


def rank_of(case: Case) -> int:
    """0 for what targets speak of, 2 for the rest, which comes after whole images."""
    return 0 if case.model in QUICK_MODELS else 2


def _cost(case: Case, group: Group, context: Context) -> float:
    roof = context.ceilings(case.dtype).roof_us(group_work(case, group)) * 1e-6
    return 3 * max(context.seconds, 2 * context.rounds[0] * roof) + (WARMED_UP if context.device == "cuda" else 0.1)


def step_row(pool: Pool, group: Group, context: Context) -> Row:
    """Race over one group's call.

    Raises:
        WrongResultError: our own output, or what we stored, is wrong.
    """
    case = pool.case
    work = group_work(case, group)
    inputs = CallInputs(pool, group, context.ceilings(case.dtype).roof_us(work))
    ceilings = context.ceilings(case.dtype, inputs.sets)
    runners, errors, missing = _gated(inputs)
    times = context.race(
        {name: runner.calls for name, runner in runners.items()},
        {name for name, runner in runners.items() if runner.eager},
    )

    def extra(name: str, median_us: float) -> Row:
        return {**rates(work, ceilings, median_us), "error": errors[name]}

    return {
        **case.describe(),
        "step": group.step,
        "n": group.n,
        "history": group.history,
        "stored": group.stored,
        "layers": len(group.layers),
        "sets": inputs.sets,
        "backend": peers.backends(pool.device)[0],
        "bytes": work.bytes,
        "flops": work.flops,
        "roof_us": ceilings.roof_us(work),
        "launch_us": ceilings.launch_us,
        "bound": ceilings.bound(work),
        "times": timed(times, context.timer.how, extra),
        "ratios": ratios(times, peers.OURS),
        "missing": missing,
    }


def _gated(inputs: CallInputs) -> tuple[dict[str, peers.Contestant], dict[str, float], dict[str, str]]:
    """Contestants and errors of all contestants whose result is right, and the others with the reason."""
    gate = Gate(inputs)
    runners: dict[str, peers.Contestant] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, make in peers.line_up(inputs).items():
        try:
            contestant = make()
            errors[name] = gate.check(name, contestant.output(contestant.calls[0]()), contestant.rounded)
            if contestant.stores:
                gate.check_store()
            runners[name] = contestant
        except WrongResultError as error:
            if name == peers.OURS:
                raise
            missing[name] = f"wrong result: {error}"
        except Exception as error:  # a peer may fail in any way; ours may not
            if name == peers.OURS:
                raise
            missing[name] = first_line(error)
            still_works(name, error)
    return runners, errors, missing
