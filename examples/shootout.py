"""Every cache policy at equal bytes: the same images from the same seeds, with half to a tenth of stock's cache.

    python -m examples.shootout avatars
    python -m examples.shootout digits

What LeastLoss, AMS-KV, ScaleKV and HeatKV want to know of the model is measured first, on images of other seeds.
Quality is what independent classifiers recognise, and how close an image stays to the one that the same seed
gives with the full cache. Attention error tells why: how far a layer's attention over what is kept lies from attention
over everything, for the same queries, keys and values. What is drawn is written row by row; a run that was cut off goes
on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from amskv_kernels import CachePlan, Full, Policy, ScaleSchedule
from amskv_kernels.cli import console, plots
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, Generation
from amskv_kernels.planning.memory import MIB
from amskv_kernels.policies import LeastLoss, Losses
from examples.contestants import ABLATION, SHARES, TokenForm, contestants, measure
from examples.demo import PAIR_BYTES, Timed, machine
from examples.subjects import NAMES, Subject, cache_for, subject
from examples.tables import margins, ordered, render, verdicts, worth

ROUNDING = 1 / (12 * 255**2)  # squared error of rounding to 8 bits: no image is closer than that, 58.9 dB
COMPARED = 10  # images to measure the attention error with
TIMED = 10  # images to time attention on
SHOWN = 14  # images a row of the picture
SAME = 1e-3  # of what is measured of a model: machines differ by less, other weights by more


class Clocked(Timed):
    """Time inside another attention, with what it does before each call."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        super().__init__(inner)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def prepare(self, layer: int, x: Tensor, weight: Tensor) -> None:
        """What the inner attention makes of it."""
        if hasattr(self.inner, "prepare"):
            self._wait()
            start = time.perf_counter()
            self.inner.prepare(layer, x, weight)
            self._wait()
            self.seconds += time.perf_counter() - start

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """What the inner attention gives."""
        self._wait()
        start = time.perf_counter()
        out = self.inner.attend(layer, q, k, v, softmax_scale)
        self._wait()
        self.seconds += time.perf_counter() - start
        return out


class Compared:
    """Attends through a cache, and beside it over everything; averages the relative distance of the two."""

    def __init__(self, inner: Any) -> None:
        self.inner, self._full = inner, ConcatKVCache()
        self.errors: list[float] = []

    def prepare(self, layer: int, x: Tensor, weight: Tensor) -> None:
        """What the inner attention makes of it."""
        self.inner.prepare(layer, x, weight)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """What the inner attention gives."""
        everything = self._full.attend(layer, q, k, v, softmax_scale)
        out = self.inner.attend(layer, q, k, v, softmax_scale)
        # Weighted by its tokens, a map counts as much as it shows.
        self.errors += [float((out - everything).norm() / everything.norm())] * q.shape[1]
        return out


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes are those of one batch, in MiB, shares are of stock's."""

    policy: str
    share: float
    tokens_per_layer: float
    retained_mib: float
    retained_share: float
    peak_mib: float
    accuracy: float
    same_tokens: float
    psnr_db: float | None  # None: identical
    psnr_each: list[float]  # of every image
    attention_error: float
    settings: str
    attention_share: float | None = None  # of stock's time; None: not measured
    gap: float | None = None  # of a fitted plan: how far above the least possible its expected loss may lie
    judged: dict[str, float] = field(default_factory=dict)  # what else the judge finds, by name


def attention_error(sub: Subject, var: VAR, vae: VQVAE, plan: CachePlan, device: torch.device) -> float:
    """Mean relative distance of a layer's attention over what it keeps from that over everything."""
    labels = sub.labels(COMPARED).to(device)
    compared = Compared(cache_for(var, plan, labels))
    var.generate(vae, labels, compared, generator=torch.Generator(device).manual_seed(1000), **sub.sampling)
    return sum(compared.errors) / len(compared.errors)


def draw(
    sub: Subject, var: VAR, vae: VQVAE, plan: CachePlan | None, labels: Tensor, batch: int
) -> tuple[Generation, float]:  # fmt: skip
    """The images under one plan, None for stock's cache, and the seconds that attention took."""
    return draw_with(
        sub, var, vae, lambda part: ConcatKVCache() if plan is None else cache_for(var, plan, part), labels, batch
    )


def draw_with(
    sub: Subject, var: VAR, vae: VQVAE, attention: Callable[[Tensor], Any], labels: Tensor, batch: int
) -> tuple[Generation, float]:  # fmt: skip
    """The images, and the seconds that attention took; `attention` makes what each batch's labels attend with."""
    seconds, parts = 0.0, []
    for i, part in enumerate(labels.split(batch)):
        clocked = Clocked(attention(part), labels.device)
        rng = torch.Generator(labels.device).manual_seed(1000 + i)
        parts.append(var.generate(vae, part, clocked, generator=rng, **sub.sampling))
        seconds += clocked.seconds
    images, tokens = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Generation(images, tokens), seconds


def decibels(images: Tensor, full: Tensor) -> list[float]:
    """PSNR of every image beside the full cache's."""
    error = (images - full).square().flatten(1).mean(1).clamp_min(ROUNDING)
    return [round(10 * -math.log10(each), 3) for each in error.tolist()]


class Bench:
    """A model at work, and the images that everything is compared with."""

    def __init__(self, name: str, images: int, batch: int, device: str) -> None:
        torch.set_num_threads(1)
        self.subject, self.device, self.batch = subject(name), torch.device(device), batch
        self.var, self.vae = self.subject.load(self.device)
        self.labels = self.subject.labels(images).to(self.device)
        self.full = self.draw(self.plan(Full()), self.labels, batch)[0]

    def draw(self, plan: CachePlan | None, labels: Tensor, batch: int) -> tuple[Generation, float]:
        """As the function of that name."""
        return draw(self.subject, self.var, self.vae, plan, labels, batch)

    def plan(self, policy: Policy) -> CachePlan:
        """The policy's plan."""
        config = self.var.config
        return CachePlan.build(config.schedule, policy, config.depth, kv_heads=config.num_heads)

    def row(self, name: str, share: float, policy: Policy) -> Row:
        """One policy's quality, beside the full cache."""
        config, full, plan = self.var.config, self.full, self.plan(policy)
        layers, total = config.depth, config.schedule.total
        token_mib = 2 * self.batch * config.num_heads * config.head_dim * PAIR_BYTES / MIB
        drawn = full if name == "full" else self.draw(plan, self.labels, self.batch)[0]
        psnr = decibels(drawn.images, full.images)
        held = plan.retained_tokens / plan.heads
        recognised, judged = self.subject.judge(drawn.images, self.labels.cpu(), full.images)
        return Row(
            policy=name,
            share=share,
            tokens_per_layer=held / layers,
            retained_mib=held * token_mib,
            retained_share=held / layers / total,
            peak_mib=plan.peak_tokens / plan.heads * token_mib,
            accuracy=recognised,
            judged=judged,
            same_tokens=float((drawn.tokens == full.tokens).float().mean()),
            psnr_db=None if drawn is full else sum(psnr) / len(psnr),
            psnr_each=psnr,
            attention_error=attention_error(self.subject, self.var, self.vae, plan, self.device),
            settings=settings(policy),
            gap=policy.fit.gap if isinstance(policy, LeastLoss) else None,
        )

    def attention_share(self, policy: Policy) -> float:
        """Its attention's time over stock's, the one right after the other on the same images."""
        labels = self.labels[:TIMED]
        own, stock = (self.draw(plan, labels, TIMED)[1] for plan in (self.plan(policy), None))
        return own / stock


def settings(policy: Policy) -> str:
    """All that a row depends on: of a fitted policy, beside its arguments, what the fit came to."""
    fitted = policy.fitted if isinstance(policy, TokenForm) else policy
    return f"{policy!r}" + (f", expected loss {fitted.fit.loss:.6g}" if isinstance(fitted, LeastLoss) else "")


_bench: Bench | None = None  # of a worker process


def _start(name: str, images: int, batch: int, device: str) -> None:
    global _bench
    _bench = Bench(name, images, batch, device)


def _row(name: str, share: float, policy: Policy) -> Row:
    assert _bench is not None
    return _bench.row(name, share, policy)


def run(
    args: argparse.Namespace, policies: Mapping[tuple[str, float], Policy], known: Sequence[dict]
) -> Iterator[dict]:  # fmt: skip
    """The full cache and every contestant; a row that is known already, of the same settings, is not drawn again."""
    policies = {("full", 1.0): Full(), **policies}
    done = {(row["policy"], row["share"], row["settings"]): row for row in known}
    setup = (args.model, args.images, args.batch, args.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=_start, initargs=setup) as pool:
        found = {}
        for (name, share), policy in policies.items():
            row = done.get((name, share, settings(policy)))
            found[name, share] = row or pool.submit(_row, name, share, policy)
        for row in tqdm(found.values(), unit="row", desc="drawing", disable=None):
            yield row if isinstance(row, dict) else asdict(row.result())


def time_rows(
    args: argparse.Namespace, policies: Mapping[tuple[str, float], Policy], rows: Sequence[dict]
) -> None:  # fmt: skip
    """Attention times, one process alone: for every row that the table shows, whatever was known of it."""
    bench = Bench(args.model, TIMED, TIMED, args.device)
    shown = [row for row in rows if row["policy"] not in ABLATION]
    for row in tqdm(shown, unit="row", desc="timing", disable=None):
        row["attention_share"] = bench.attention_share(policies.get((row["policy"], row["share"]), Full()))


def sheet(args: argparse.Namespace, policies: Mapping[tuple[str, float], Policy], rows: Sequence[dict]) -> None:
    """The first images under the full cache, and under the best and the worst policies of the smallest share."""
    bench = Bench(args.model, SHOWN, SHOWN, args.device)
    smallest = [row for row in ordered(rows) if row["share"] == min(SHARES)]
    pictures = {"full": bench.full.images}
    for row in (smallest[0], smallest[len(smallest) // 2], smallest[-1]):
        plan = bench.plan(policies[row["policy"], row["share"]])
        pictures[f"{row['policy']}, {row['share']:.0%}"] = bench.draw(plan, bench.labels, SHOWN)[0].images
    plots.strips(
        {name: torch.cat(list(images), dim=2).permute(1, 2, 0).numpy() for name, images in pictures.items()},
        args.out / "equal-bytes.png",
    )


def settled(path: Path, setup: dict[str, Any], measured: Sequence[dict[str, float]]) -> list[dict]:
    """The rows of an earlier run of the same setup, of a model of which the same was measured."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    pairs = list(itertools.zip_longest(before.get("scales", []), measured, fillvalue={"attention": math.nan}))
    same = all(math.isclose(old["attention"], new["attention"], rel_tol=SAME) for old, new in pairs)
    return before.get("rows", []) if same and all(before.get(key) == value for key, value in setup.items()) else []


def shoot(args: argparse.Namespace) -> None:
    """Measure, draw, time, write and show."""
    path, device, sub = args.out / "shootout.json", torch.device(args.device), subject(args.model)
    setup: dict[str, Any] = {"images": args.images, "batch": args.batch, "sampling": sub.sampling}
    ran = machine() if device.type == "cpu" else {**machine(), "gpu": torch.cuda.get_device_name(device)}
    torch.set_num_threads(1)
    var, vae = sub.load(device)
    measured = measure(sub, var, vae, device)
    policies = contestants(var.config.schedule, var.config.depth, measured)
    result: dict[str, Any] = {"machine": ran, **setup, "rows": [], "scales": scales(measured.losses)}
    known = settled(path, setup, result["scales"])
    for row in run(args, policies, known):
        result["rows"].append(row)
        # What an interrupted run has drawn is there for the next one.
        drawn = {(each["policy"], each["share"]) for each in result["rows"]}
        left = [each for each in known if (each["policy"], each["share"]) not in drawn]
        write_json(path, {**result, "rows": [*result["rows"], *left]})
    rows = result["rows"]
    if not args.no_times:
        time_rows(args, policies, rows)
    write_json(path, result)
    plots.quality(ordered(rows), f"{args.images} {sub.name} from the same seeds, fp32", args.out / "shootout.png")
    sheet(args, policies, rows)
    print(f"\n{args.images} {sub.name}, cfg {sub.sampling['cfg']}, on {ran.get('gpu', ran['cpu'])}\n\n{render(rows)}\n")
    if rows[0].get("judged"):
        print(f"{verdicts(rows)}\n")
    print(f"PSNR ahead, dB\n\n{margins(rows)}\n\n{worth(result['scales'])}\n")
    print(f"pictures  {args.out / 'shootout.png'}  {args.out / 'equal-bytes.png'}")
    print(f"figures   {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--images", type=int, default=100, help="per policy and share (default 100)")
    parser.add_argument("--batch", type=int, default=20, help="images at once (default 20)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw (default 2)")
    parser.add_argument("--no-times", action="store_true", help="quality alone, for a machine that is not idle")
    parser.add_argument("--out", type=Path, help="folder to write to (default demo-out and the model's name)")
    args = parser.parse_args(argv)
    if not 2 <= args.batch <= args.images or args.jobs < 1:
        parser.error("--batch must be between 2 and --images, and --jobs at least 1")
    args.out = args.out or Path("demo-out") / args.model
    shoot(args)


def scales(losses: Losses) -> list[dict[str, float]]:
    """What each scale of the model is worth: its tokens, and the mean attention that later scales pay to it."""
    mass = losses.mass.mean((0, 1))  # (step, scale)
    tokens = ScaleSchedule(losses.schedule).tokens[:-1]
    return [{"tokens": n, "attention": float(mass[scale + 1 :, scale].mean())} for scale, n in enumerate(tokens)]


if __name__ == "__main__":
    sys.exit(console.run(main))
