"""Every cache policy at equal bytes: the same digits from the same seeds, with half to a tenth of stock's cache.

    python -m examples.digits.shootout

What LeastLoss, AMS-KV, ScaleKV and HeatKV want to know of the model is measured first, on digits of other seeds.
Quality is what an independent classifier recognises, and how close a digit stays to the one that the same seed
gives with the full cache. Attention error tells why: how far a layer's attention over what is kept lies from attention
over everything, for the same queries, keys and values. What is drawn is written row by row; a run that was cut off goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from amskv_kernels import CachePlan, Full, PagedKVCache, Policy, ScaleSchedule
from amskv_kernels.cli import console, plots
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, Generation
from amskv_kernels.planning.memory import MIB
from amskv_kernels.policies import LeastLoss, Losses
from examples.digits.contestants import ABLATION, FITTED, RIVALS, SHARES, WINDOWS, TokenForm, contestants, measure
from examples.digits.data import accuracy
from examples.digits.demo import PAIR_BYTES, Timed, machine
from examples.digits.model import SAMPLING, load

ROUNDING = 1 / (12 * 255**2)  # squared error of rounding to 8 bits: no image is closer than that, 58.9 dB
COMPARED = 10  # images to measure the attention error with
TIMED = 10  # images to time attention on


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


def attention_error(var: VAR, vae: VQVAE, plan: CachePlan, device: torch.device) -> float:
    """Mean relative distance of a layer's attention over what it keeps from that over everything."""
    config, labels = var.config, torch.arange(COMPARED, device=device) % var.config.num_classes
    cache = PagedKVCache(
        plan, batch=2 * COMPARED, kv_heads=config.num_heads, head_dim=config.head_dim, dtype=torch.float32,
        device=device,
    )  # fmt: skip
    compared = Compared(cache)
    var.generate(vae, labels, compared, generator=torch.Generator(device).manual_seed(1000), **SAMPLING)
    return sum(compared.errors) / len(compared.errors)


def draw(
    var: VAR, vae: VQVAE, plan: CachePlan | None, labels: Tensor, batch: int
) -> tuple[Generation, float]:  # fmt: skip
    """The digits under one plan, None for stock's cache, and the seconds that attention took."""
    config, seconds, parts = var.config, 0.0, []
    for i, part in enumerate(labels.split(batch)):
        cache: Any = ConcatKVCache()
        if plan is not None:
            cache = PagedKVCache(
                plan, batch=2 * len(part), kv_heads=config.num_heads, head_dim=config.head_dim, dtype=torch.float32,
                device=labels.device,
            )  # fmt: skip
        clocked = Clocked(cache, labels.device)
        rng = torch.Generator(labels.device).manual_seed(1000 + i)
        parts.append(var.generate(vae, part, clocked, generator=rng, **SAMPLING))
        seconds += clocked.seconds
    images, tokens = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Generation(images, tokens), seconds


class Bench:
    """A model at work, and the digits that everything is compared with."""

    def __init__(self, images: int, batch: int, device: str) -> None:
        torch.set_num_threads(1)
        self.device, self.batch = torch.device(device), batch
        self.var, self.vae = load(self.device)
        self.labels = torch.arange(images, device=self.device) % self.var.config.num_classes
        self.full = draw(self.var, self.vae, self.plan(Full()), self.labels, batch)[0]

    def plan(self, policy: Policy) -> CachePlan:
        """The policy's plan."""
        config = self.var.config
        return CachePlan.build(config.schedule, policy, config.depth, kv_heads=config.num_heads)

    def row(self, name: str, share: float, policy: Policy) -> Row:
        """One policy's quality, beside the full cache."""
        config, full, plan = self.var.config, self.full, self.plan(policy)
        layers, total = config.depth, config.schedule.total
        token_mib = 2 * self.batch * config.num_heads * config.head_dim * PAIR_BYTES / MIB
        drawn = full if name == "full" else draw(self.var, self.vae, plan, self.labels, self.batch)[0]
        error = (drawn.images - full.images).square().flatten(1).mean(1).clamp_min(ROUNDING)
        psnr = [round(10 * -math.log10(each), 3) for each in error.tolist()]
        held = plan.retained_tokens / plan.heads
        return Row(
            policy=name,
            share=share,
            tokens_per_layer=held / layers,
            retained_mib=held * token_mib,
            retained_share=held / layers / total,
            peak_mib=plan.peak_tokens / plan.heads * token_mib,
            accuracy=accuracy(drawn.images, self.labels.cpu()),
            same_tokens=float((drawn.tokens == full.tokens).float().mean()),
            psnr_db=None if drawn is full else sum(psnr) / len(psnr),
            psnr_each=psnr,
            attention_error=attention_error(self.var, self.vae, plan, self.device),
            settings=settings(policy),
            gap=policy.fit.gap if isinstance(policy, LeastLoss) else None,
        )

    def attention_share(self, policy: Policy) -> float:
        """Its attention's time over stock's, the one right after the other on the same digits."""
        labels = self.labels[:TIMED]
        own, stock = (draw(self.var, self.vae, plan, labels, TIMED)[1] for plan in (self.plan(policy), None))
        return own / stock


def settings(policy: Policy) -> str:
    """All that a row depends on: of a fitted policy, beside its arguments, what the fit came to."""
    fitted = policy.fitted if isinstance(policy, TokenForm) else policy
    return f"{policy!r}" + (f", expected loss {fitted.fit.loss:.6g}" if isinstance(fitted, LeastLoss) else "")


_bench: Bench | None = None  # of a worker process


def _start(images: int, batch: int, device: str) -> None:
    global _bench
    _bench = Bench(images, batch, device)


def _row(name: str, share: float, policy: Policy) -> Row:
    assert _bench is not None
    return _bench.row(name, share, policy)


def run(
    args: argparse.Namespace, policies: Mapping[tuple[str, float], Policy], known: Sequence[dict]
) -> Iterator[dict]:  # fmt: skip
    """The full cache and every contestant; a row that is known already, of the same settings, is not drawn again."""
    policies = {("full", 1.0): Full(), **policies}
    done = {(row["policy"], row["share"], row["settings"]): row for row in known}
    setup = (args.images, args.batch, args.device)
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
    bench = Bench(TIMED, TIMED, args.device)
    shown = [row for row in rows if row["policy"] not in ABLATION]
    for row in tqdm(shown, unit="row", desc="timing", disable=None):
        row["attention_share"] = bench.attention_share(policies.get((row["policy"], row["share"]), Full()))


def render(rows: Sequence[dict], style: str = "simple") -> str:
    """Rows, as `asdict` gives them, as a table for people: the best PSNR first at each share."""
    shown = [row for row in rows if row["policy"] not in ABLATION]
    ordered = sorted(shown, key=lambda row: (-row["share"], -(row["psnr_db"] or 99)))
    lines = [
        (
            f"{row['share']:.0%}",
            row["policy"],
            f"{row['tokens_per_layer']:.1f}",
            f"{row['retained_mib']:.1f} ({row['retained_share']:.1%})",
            f"{row['peak_mib']:.1f}",
            "" if row["attention_share"] is None else f"{row['attention_share']:.2f}×",
            f"{row['accuracy']:.1%}",
            f"{row['same_tokens']:.1%}",
            _psnr(row),
            f"{row['attention_error']:.1%}",
            "" if row["gap"] is None else f"{row['gap']:.1%}",
        )
        for row in ordered
    ]
    headers = (
        "allowed", "policy", "tokens / layer", "KV MiB (of stock)", "peak MiB", "attention time", "recognised",
        "same tokens", "PSNR, dB (95 %)", "attention error", "gap",
    )  # fmt: skip
    return tabulate(
        lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=("right", "left", *["right"] * 9)
    )


def _psnr(row: dict) -> str:
    """A row's mean and its 95 % confidence interval."""
    if row["psnr_db"] is None:
        return "identical"
    return f"{row['psnr_db']:.2f} ± {1.96 * scatter(row['psnr_each']):.2f}"


def scatter(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return float(torch.tensor(values).std() / len(values) ** 0.5)


def ahead(rows: Sequence[dict], ours: str, rival: str, share: float) -> tuple[float, float]:
    """How much closer to the full cache's digits `ours` comes, dB, and its standard error: paired, image by image."""
    psnr = {(row["policy"], row["share"]): row["psnr_each"] for row in rows}
    each = [own - other for own, other in zip(psnr[ours, share], psnr[rival, share], strict=True)]
    return sum(each) / len(each), scatter(each)


def margins(rows: Sequence[dict], style: str = "simple") -> str:
    """How far ahead of their rivals LeastLoss and AMS-KV are, and AMS-KV of itself with other demanding layers."""
    pairs = [(ours, rival) for ours in FITTED for rival in RIVALS]
    pairs += [(ours, rival) for ours in ("AMS-KV, calibrated", "AMS-KV") for rival in (*WINDOWS, "H2O")]
    pairs += [("AMS-KV, calibrated", rival) for rival in ABLATION]
    lines = []
    for ours, rival in pairs:
        found = [ahead(rows, ours, rival, share) for share in SHARES]
        lines.append((ours, f"against {rival}", *(f"{mean:+.2f} ± {error:.2f}" for mean, error in found)))
    headers = ("policy", "", *(f"{share:.0%}" for share in SHARES))
    align = ("left", "left", *["right"] * len(SHARES))
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def worth(scales: Sequence[dict], style: str = "simple") -> str:
    """What a scale is worth: the attention that later scales pay to it, as a whole and per token."""
    lines = [
        (f"{i + 1}", f"{scale['tokens']}", f"{scale['attention']:.1%}", f"{scale['attention'] / scale['tokens']:.2%}")
        for i, scale in enumerate(scales)
    ]
    headers = ("scale", "tokens", "attention from later scales", "per token")
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=["right"] * 4)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="digits per policy and share (default 100)")
    parser.add_argument("--batch", type=int, default=20, help="images at once (default 20)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes that draw (default 2)")
    parser.add_argument("--no-times", action="store_true", help="quality alone, for a machine that is not idle")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default demo-out)")
    args = parser.parse_args(argv)
    if not 2 <= args.batch <= args.images or args.jobs < 1:
        parser.error("--batch must be between 2 and --images, and --jobs at least 1")
    path, device = args.out / "shootout.json", torch.device(args.device)
    setup: dict[str, Any] = {"images": args.images, "batch": args.batch, "sampling": SAMPLING}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = before.get("rows", []) if all(before.get(key) == value for key, value in setup.items()) else []
    ran = machine() if device.type == "cpu" else {**machine(), "gpu": torch.cuda.get_device_name(device)}
    torch.set_num_threads(1)
    var, vae = load(device)
    measured = measure(var, vae, device)
    policies = contestants(var.config.schedule, var.config.depth, measured)
    result: dict[str, Any] = {"machine": ran, **setup, "rows": [], "scales": scales(measured.losses)}
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
    shown = [row for row in rows if row["policy"] not in ABLATION]
    plots.quality(shown, f"{args.images} digits from the same seeds, fp32", args.out / "shootout.png")
    print(f"\n{args.images} digits, cfg {SAMPLING['cfg']}, on {ran.get('gpu', ran['cpu'])}\n\n{render(rows)}\n")
    print(f"PSNR ahead, dB\n\n{margins(rows)}\n\n{worth(result['scales'])}\n")
    print(f"picture   {args.out / 'shootout.png'}")
    print(f"figures   {path}")


def scales(losses: Losses) -> list[dict[str, float]]:
    """What each scale of the model is worth: its tokens, and the mean attention that later scales pay to it."""
    mass = losses.mass.mean((0, 1))  # (step, scale)
    tokens = ScaleSchedule(losses.schedule).tokens[:-1]
    return [{"tokens": n, "attention": float(mass[scale + 1 :, scale].mean())} for scale, n in enumerate(tokens)]


if __name__ == "__main__":
    sys.exit(console.run(main))
