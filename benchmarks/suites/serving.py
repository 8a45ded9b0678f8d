"""Poisson arrivals served three ways in the same memory: the engine, lockstep dynamic batching, and one by one.

Compute is measured, waiting is not: a clock of its own moves by what every tick or batch took, and jumps to the next
arrival where there is nothing to do. So a row takes as long as its images take to draw, at any load. Latency runs from
an image's arrival until it is decoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from amskv_kernels.serving import Engine
from amskv_kernels.serving.admission import PAIR
from amskv_kernels.serving.units import PlanUnits
from benchmarks.harness.results import Row
from benchmarks.harness.tasks import Context, Task
from benchmarks.suites.image import DIGITS, Painter, digits_painter, random_painter

ENGINE, LOCKSTEP, SINGLE = "engine", "lockstep", "one by one"
LOADS = (0.5, 1.0, 1.5, 2.0)  # of what lockstep draws in a second while many wait
ROUNDS = 3  # of lockstep alone, that its capacity is the best of


@dataclass(frozen=True)
class Setting:
    """What is served: a model under a policy in memory for so many images in lockstep."""

    model: str
    policy: str
    together: int
    images: int
    loads: tuple[float, ...]


DIGITS_SETTINGS = tuple(
    Setting("digits", policy, together, 48, LOADS) for policy, together in (("full", 2), ("full", 8), ("ams-kv:75", 2))
)
SETTINGS = (*DIGITS_SETTINGS, Setting("var-d16", "full", 2, 8, (1.5,)))


@dataclass
class Clock:
    """Seconds of compute, and of waiting for somebody to come."""

    arrivals: list[float]
    now: float = 0.0
    come: int = 0  # of the arrivals
    finished: list[float] = field(default_factory=list)  # in order of arrival
    calls: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, images, share of the pool in use

    def newcomers(self) -> int:
        """How many have come since the last call; where nobody is there, time passes until somebody is."""
        before = self.come
        if len(self.finished) == self.come < len(self.arrivals):
            self.now = max(self.now, self.arrivals[self.come])
        while self.come < len(self.arrivals) and self.arrivals[self.come] <= self.now:
            self.come += 1
        return self.come - before

    def run(self, call: Callable[[], object]) -> None:
        """Do some work, which notes what it is on."""
        self._since = start = time.perf_counter()
        call()
        self.now += time.perf_counter() - start

    def note(self, images: int, share: float) -> None:
        """What the work since it began, or since the last note, was on."""
        now = time.perf_counter()
        self.calls.append((now - self._since, images, share))
        self._since = now

    def finish(self, images: int) -> None:
        """They are done; nobody passes another."""
        self.finished += [self.now] * images

    def row(self) -> Row:
        """What came of it."""
        latency = np.array(self.finished) - np.array(self.arrivals)
        seconds, images, shares = np.array(self.calls).T
        return {
            "images_s": len(self.finished) / (self.finished[-1] - self.arrivals[0]),
            "p50_s": float(np.percentile(latency, 50)),
            "p99_s": float(np.percentile(latency, 99)),
            "inside": float((seconds * images).sum() / seconds.sum()),
            "pool_share": float((seconds * shares).sum() / seconds.sum()),
        }


def serve_with_engine(engine: Engine, painter: Painter, clock: Clock) -> None:
    """Tick by tick."""
    limits = sampling(painter)
    while len(clock.finished) < len(clock.arrivals):
        for _ in range(clock.newcomers()):
            engine.submit(clock.come % painter.var.config.num_classes, seed=clock.come, **limits)
        before = engine.load.drawn
        clock.run(engine.tick)
        clock.note(engine.load.active, engine.load.used / engine.load.units)
        clock.finish(engine.load.drawn - before)


def serve_in_batches(policy: str, most: int, units: int, painter: Painter, clock: Clock) -> None:
    """Whoever waits, `most` at once, from the first scale to the last, in a pool of so many units."""
    waiting, caches, curve = 0, {}, PlanUnits(painter.plan(policy)).curve
    while len(clock.finished) < len(clock.arrivals):
        waiting += clock.newcomers()
        images = min(waiting, most)
        if images not in caches:
            caches[images] = painter.attention(policy, images)

        def note(steps: int, _: int, images: int = images) -> None:
            clock.note(images, PAIR * images * int(curve[steps - 1]) / units)

        clock.run(partial(painter.draw, caches[images], painter.labels(images), note))
        note(len(curve), 0)  # decoding
        clock.finish(images)
        waiting -= images


def sampling(painter: Painter) -> dict[str, Any]:
    """The painter's, as the engine calls it."""
    limits = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, **painter.sampling}
    limits["guidance"] = limits.pop("cfg")
    limits["top_k"] = min(limits["top_k"], painter.var.config.vocab_size)
    return limits


def pool_bytes(painter: Painter, policy: str, together: int) -> int:
    """Of so many images with guidance in lockstep."""
    plan, config = painter.plan(policy), painter.var.config
    heads = config.num_heads if plan.heads == 1 else 1
    unit = heads * 2 * plan.page_size * config.head_dim * painter.dtype.itemsize
    return PAIR * together * int(PlanUnits(plan).curve.max()) * unit


def capacity(painter: Painter, policy: str, together: int) -> float:
    """Images a second that lockstep draws while many wait; the best of a few rounds, since others can only disturb."""
    cache, labels = painter.attention(policy, together), painter.labels(together)
    painter.draw(cache, labels)
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        painter.draw(cache, labels)
        took.append(time.perf_counter() - start)
    return together / min(took)


def serving_row(painter: Painter, setting: Setting, load: float, rate: float) -> Row:
    """The same arrivals served in every way; the pool must be empty afterwards."""
    rng = np.random.default_rng(round(100 * load))
    arrivals = np.cumsum(rng.exponential(1 / (load * rate), setting.images)).tolist()
    engine = Engine(
        painter.var, painter.vae, setting.policy, memory=pool_bytes(painter, setting.policy, setting.together)
    )
    ways = {
        ENGINE: partial(serve_with_engine, engine),
        LOCKSTEP: partial(serve_in_batches, setting.policy, setting.together, engine.pool.units),
        SINGLE: partial(serve_in_batches, setting.policy, 1, engine.pool.units),
    }
    servers = {}
    for name, serve in ways.items():
        clock = Clock(arrivals)
        serve(painter, clock)
        servers[name] = clock.row()
    assert engine.pool.used == 0 and engine.load.drawn == setting.images
    return {
        "suite": "serving", "model": setting.model, "policy": setting.policy, "together": setting.together,
        "images": setting.images, "dtype": str(painter.dtype).removeprefix("torch."), "load": load,
        "capacity_images_s": rate, "pool_mib": engine.pool.nbytes / 2**20, "servers": servers,
    }  # fmt: skip


def tasks(context: Context) -> Iterator[Task]:
    """Every setting at every load; digits need the example's weights."""
    if not DIGITS.exists():
        context.absent["digits"] = "the example's weights are not there"
        return
    painters: dict[str, Callable[[], Painter]] = {
        "digits": digits_painter,
        # several at once in its decoder take longer each, as their maps leave the caches
        "var-d16": partial(random_painter, "var-d16", "cpu", torch.bfloat16, decoded_at_once=1),
    }
    for setting in DIGITS_SETTINGS[:1] if context.quick else SETTINGS:
        rates: dict[str, float] = {}
        for load in setting.loads[2:3] if context.quick else setting.loads:

            def make(setting: Setting = setting, load: float = load, rates: dict[str, float] = rates) -> Row:
                painter = context.slot.get(setting.model, painters[setting.model])
                if not rates:
                    rates[setting.policy] = capacity(painter, setting.policy, setting.together)
                return serving_row(painter, setting, load, rates[setting.policy])

            key = f"serving/{setting.model}/{setting.policy}/{setting.together}/{load:g}"
            yield Task(key, 8.0 if setting.model == "digits" else 60.0, make)
