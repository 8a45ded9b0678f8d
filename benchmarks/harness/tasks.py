"""What suites have in common: tasks by key, the machine's ceilings, and the loop that runs what is not yet done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.harness import measure
from benchmarks.harness.gate import WrongResultError
from benchmarks.harness.inputs import UnavailableError
from benchmarks.harness.results import DIED, Row, Run
from benchmarks.harness.roofs import Ceilings, ceilings_of

BROKEN_DEVICE = 77  # exit code: a new process can go on


@dataclass(frozen=True)
class Task:
    """A row to make; `cost` in rough seconds is only for the bar's time left. Low `rank` comes first."""

    key: str
    cost: float
    make: Callable[[], Row]
    rank: int = 0


class Slot:
    """Keeps the last thing made, for the next task that wants the same; makes room before making another."""

    def __init__(self) -> None:
        self._key: object = None
        self._held: Any = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` gave for this key."""
        if key != self._key:
            self._key, self._held = None, None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._held, self._key = make(), key
        return self._held


@dataclass
class Context:
    """Where suites run: device, ceilings, how much time a contestant gets, and the one large thing held in memory."""

    device: str
    quick: bool
    measured: dict[str, Any]
    timer: measure.Timer
    absent: dict[str, str] = field(default_factory=dict)
    slot: Slot = field(default_factory=Slot)

    @property
    def seconds(self) -> float:
        """Of measuring for each contestant."""
        return (0.02 if self.quick else 0.04) if self.device == "cuda" else (0.05 if self.quick else 0.25)

    @property
    def rounds(self) -> tuple[int, int]:
        """Rounds at least and at most."""
        return (3, 7) if self.quick else (5, 21) if self.device == "cuda" else (4, 11)

    def ceilings(self, dtype: str, calls: int = 1) -> Ceilings:
        """For one element type; the launch is that of so many calls in one graph."""
        launch = self.measured.get("launch_us", {})
        return ceilings_of(self.measured, dtype, launch.get(str(calls), 0.0))

    def race(self, contestants: dict[str, Any], eager: Set[str] = measure.NONE) -> measure.Times:
        """Times of contestants' calls; `eager` names those that no graph can hold."""
        return self.timer.run(contestants, self.seconds, *self.rounds, eager)


class BrokenDeviceError(RuntimeError):
    """The device answers no call of this process any more; the message says whose call it was."""


def still_works(whose: str, error: BaseException) -> None:
    """After a failure: the device, if one is in use, must answer.

    Raises:
        BrokenDeviceError: it does not.
    """
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as broken:
            raise BrokenDeviceError(f"{whose} broke the device: {first_line(error)}") from broken


def run_tasks(tasks: Iterable[Task], run: Run, deadline: float | None, quiet: bool = False) -> tuple[bool, list[str]]:
    """Make every row that the run does not have yet, and that no process has died of.

    Returns:
        Whether all were tried before the deadline, and the keys whose result was wrong or failed.

    Raises:
        BrokenDeviceError: a row broke the device; the run names it.
    """
    left = (task for task in tasks if task.key not in run and not run.missing.get(task.key, "").startswith(DIED))
    todo = sorted(left, key=lambda task: task.rank)
    wrong: list[str] = []
    layout = "{desc}{percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left{postfix}"
    with tqdm(total=sum(task.cost for task in todo), bar_format=layout, disable=quiet) as bar, torch.no_grad():
        for task in todo:
            if deadline is not None and time.monotonic() > deadline:
                return False, wrong
            bar.set_postfix_str(task.key)
            run.start(task.key)
            try:
                run.add(task.key, task.make())
            except WrongResultError as error:
                run.miss(task.key, f"wrong result: {error}")
                wrong.append(task.key)
            except (UnavailableError, torch.OutOfMemoryError, MemoryError) as error:
                run.miss(task.key, first_line(error))
            except RuntimeError as error:
                run.miss(task.key, f"{DIED}: {first_line(error)}")
                if isinstance(error, BrokenDeviceError):
                    raise
                still_works(task.key, error)
                run.miss(task.key, f"failed: {first_line(error)}")
                wrong.append(task.key)
            bar.update(task.cost)
    return True, wrong


def first_line(error: BaseException) -> str:
    """The error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def timed(times: measure.Times, how: Callable[[str], str], extra: Callable[[str, float], Row]) -> dict[str, Row]:
    """Per contestant: median, quartiles, how it was timed, and what `extra` says of its median."""
    found = {}
    for name, series in times.items():
        stats = measure.summary(series)
        found[name] = {**stats, "timer": how(name), **extra(name, stats["median_us"])}
    return found


def rates(work: Any, ceilings: Ceilings, median_us: float) -> Row:
    """What a time means: rates attained, and the share of the roof."""
    return {
        "tb_s": work.bytes / median_us * 1e-6,
        "tflop_s": work.flops / median_us * 1e-6,
        "share_of_roof": ceilings.roof_us(work) / median_us,
    }


def ratios(times: measure.Times, ours: str) -> dict[str, float]:
    """Every other contestant's time over ours."""
    return {name: measure.ratio(series, times[ours]) for name, series in times.items() if name != ours}
