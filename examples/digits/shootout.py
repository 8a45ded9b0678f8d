"""Every cache policy at equal bytes: the same digits from the same seeds, with half to a tenth of stock's cache.

    python -m examples.digits.shootout

ScaleKV's drafters, HeatKV's head orders and AMS-KV's demanding layers are measured first, on digits drawn from other
seeds. Quality is what an independent classifier recognises, and how close a digit stays to the one that the same seed
gives with the full cache. Attention error tells why: how far a layer's attention over what is kept lies from attention
over everything, for the same queries, keys and values.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from amskv_kernels import AMSKV, CachePlan, Full, PagedKVCache, Policy, ScaleSchedule
from amskv_kernels.calibrate import AttentionRecorder, SimilarityRecorder
from amskv_kernels.cli import arguments, console, plots
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, Generation
from amskv_kernels.planning.memory import MIB
from amskv_kernels.policies import H2O, HeadOrders, HeatKV, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.calibration import rank_layers
from examples.digits.data import accuracy
from examples.digits.demo import PAIR_BYTES, Timed, machine
from examples.digits.model import SAMPLING, load

SHARES = (0.50, 0.25, 0.15, 0.10)  # of the tokens, and here of the bytes too, that stock keeps
SINKS = 5  # tokens of the first two scales, as many as AMS-KV condenses
MEASURED = 20  # images to calibrate with
ROUNDING = 1 / (12 * 255**2)  # squared error of rounding to 8 bits: no image is closer than that, 58.9 dB
COMPARED = 10  # images to measure the attention error with


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
    attention_seconds: float
    attention_share: float
    accuracy: float
    same_tokens: float
    psnr_db: float | None  # None: identical
    psnr_each: list[float]  # of every image
    attention_error: float
    settings: str


class Measured(NamedTuple):
    """What policies want to know of the model."""

    ranking: tuple[int, ...]  # layers, most cache-demanding first
    orders: HeadOrders
    drafters: tuple[tuple[int, ...], ...]
    needs: list[list[float]]  # (L, K) mean attention that later scales pay to each scale


def measure(var: VAR, vae: VQVAE, device: torch.device) -> Measured:
    """All of it from one batch of digits."""
    schedule, layers = var.config.schedule, var.config.depth
    similarity = SimilarityRecorder(schedule, layers, ConcatKVCache())
    attention = AttentionRecorder(schedule, layers, similarity)
    labels = torch.arange(MEASURED, device=device) % var.config.num_classes
    var.generate(vae, labels, attention, generator=torch.Generator(device).manual_seed(7), **SAMPLING)
    needs = [[sum(each) / len(layer) for each in zip(*layer, strict=True)] for layer in attention.scores()]
    return Measured(rank_layers(similarity.similarity()), attention.orders(), attention.drafters().layers, needs)


def contestants(schedule: ScaleSchedule, layers: int, measured: Measured) -> dict[tuple[str, float], Policy]:
    """Every policy at every share."""
    found: dict[tuple[str, float], Policy] = {}
    for share in SHARES:
        tokens = round(share * schedule.total)
        found |= {
            ("AMS-KV", share): AMSKV.for_saving(schedule, layers, 1 - share, measured.ranking),
            ("AMS-KV, tuned", share): tuned(schedule, measured, tokens),
            ("ScaleKV", share): ScaleKV(tokens, drafters=measured.drafters),
            ("ScaleKV, paper", share): ScaleKV(tokens, "paper", measured.drafters),
            ("HeatKV", share): HeatKV(tokens / schedule.prefix, measured.orders),
            ("SnapKV", share): SnapKV(tokens),
            ("PyramidKV", share): PyramidKV(tokens),
            ("H2O", share): H2O(tokens),
            ("sink", share): Recent(tokens, SINKS),
            ("sliding window", share): Recent(tokens),
            # The last whole scales that fit, one too large skipped: Algorithm 1 of AMS-KV with nothing condensed.
            ("window of scales", share): AMSKV.with_capacity(tokens, tokens, condensed=0),
        }
    return found


def tuned(schedule: ScaleSchedule, measured: Measured, mean: int) -> Policy:
    """The AMS-KV setting within `mean` tokens a layer that keeps most of the measured attention.

    Its paper leaves capacities, condensed scales and the number of demanding layers open; all are tried.

    Args:
        schedule: the model's schedule.
        measured: what is known of the model.
        mean: tokens a layer.
    """
    ranking, needs = measured.ranking, measured.needs
    layers, tokens = len(needs), schedule.tokens
    best: tuple[float, Policy] = (-1.0, Full())
    for condensed in range(3):
        locked = sum(tokens[:condensed])
        sums = {locked + sum(tokens[i:j]) for j in range(condensed + 1, len(tokens)) for i in range(condensed, j)}
        kept = {}
        for size in sorted(sums):
            history = AMSKV.with_capacity(size, size, condensed=condensed).history(schedule, size, None)
            held = [sum(tokens[scale] for scale in seen) for seen in history]
            gain = [
                sum(n * need[scale] for n, seen in zip(tokens, history, strict=True) for scale in seen)
                for need in needs
            ]
            kept[size] = held, gain
        for small, large, count in product(kept, kept, range(layers)):
            (held, gain), (more, most) = kept[small], kept[large]
            total = max((layers - count) * a + count * b for a, b in zip(held, more, strict=True))
            if small > large or total > mean * layers:
                continue
            covered = sum(most[i] for i in ranking[:count]) + sum(gain[i] for i in ranking[count:])
            if covered > best[0]:
                policy = AMSKV.with_capacity(small, large, condensed=condensed, demanding_layers=ranking[:count])
                best = covered, policy
    return best[1]


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
    var: VAR, vae: VQVAE, plan: CachePlan | None, labels: Tensor, batch: int, tick: tqdm
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
        tick.update()
    images, tokens = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Generation(images, tokens), seconds


def run(
    var: VAR, vae: VQVAE, measured: Measured, images: int, batch: int, device: torch.device
) -> Iterator[Row]:  # fmt: skip
    """The full cache and every contestant, beside stock's cache."""
    config = var.config
    schedule, layers = config.schedule, config.depth
    labels = torch.arange(images, device=device) % config.num_classes
    policies = contestants(schedule, layers, measured)
    token_mib = 2 * batch * config.num_heads * config.head_dim * PAIR_BYTES / MIB
    with tqdm(total=len(labels.split(batch)) * (2 + len(policies)), unit="batch", disable=None) as tick:
        _, stock_seconds = draw(var, vae, None, labels, batch, tick)
        full: Generation | None = None
        for (name, share), policy in {("full", 1.0): Full(), **policies}.items():
            plan = CachePlan.build(schedule, policy, layers, kv_heads=config.num_heads)
            drawn, seconds = draw(var, vae, plan, labels, batch, tick)
            full = full or drawn
            error = (drawn.images - full.images).square().flatten(1).mean(1).clamp_min(ROUNDING)
            psnr = [round(10 * -math.log10(each), 3) for each in error.tolist()]
            held = plan.retained_tokens / plan.heads
            yield Row(
                policy=name,
                share=share,
                tokens_per_layer=held / layers,
                retained_mib=held * token_mib,
                retained_share=held / layers / schedule.total,
                peak_mib=plan.peak_tokens / plan.heads * token_mib,
                attention_seconds=seconds,
                attention_share=seconds / stock_seconds,
                accuracy=accuracy(drawn.images, labels.cpu()),
                same_tokens=float((drawn.tokens == full.tokens).float().mean()),
                psnr_db=None if drawn is full else sum(psnr) / len(psnr),
                psnr_each=psnr,
                attention_error=attention_error(var, vae, plan, device),
                settings=repr(policy),
            )


def render(rows: Sequence[dict], style: str = "simple") -> str:
    """Rows, as `asdict` gives them, as a table for people: the best PSNR first at each share."""
    ordered = sorted(rows, key=lambda row: (-row["share"], -(row["psnr_db"] or 99)))
    lines = [
        (
            f"{row['share']:.0%}",
            row["policy"],
            f"{row['tokens_per_layer']:.1f}",
            f"{row['retained_mib']:.1f} ({row['retained_share']:.1%})",
            f"{row['peak_mib']:.1f}",
            f"{row['attention_share']:.2f}×",
            f"{row['accuracy']:.1%}",
            f"{row['same_tokens']:.1%}",
            "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.2f} dB",
            f"{row['attention_error']:.1%}",
        )
        for row in ordered
    ]
    headers = (
        "allowed", "policy", "tokens / layer", "KV MiB (of stock)", "peak MiB", "attention time", "recognised",
        "same tokens", "PSNR", "attention error",
    )  # fmt: skip
    return tabulate(
        lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=("right", "left", *["right"] * 8)
    )


def margins(rows: Sequence[dict], style: str = "simple") -> str:
    """How much closer to the full cache's images AMS-KV and ScaleKV come than their rivals: dB ± standard error.

    The same seeds are compared image by image.
    """
    psnr = {(row["policy"], row["share"]): row["psnr_each"] for row in rows}

    def ahead(ours: str, rival: str, share: float) -> str:
        each = torch.tensor(psnr[ours, share]) - torch.tensor(psnr[rival, share])
        return f"{float(each.mean()):+.1f} ± {float(each.std() / len(each) ** 0.5):.1f}"

    rivals = ("window of scales", "sliding window", "H2O")
    lines = [
        (ours, f"against {rival}", *(ahead(ours, rival, share) for share in SHARES))
        for ours in ("AMS-KV", "AMS-KV, tuned", "ScaleKV", "ScaleKV, paper")
        for rival in rivals
    ]
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
    parser.add_argument(
        "--images", type=arguments.whole(1), default=30, help="digits per policy and share (default 30)"
    )
    parser.add_argument("--batch", type=arguments.whole(1), default=30, help="images at once (default 30)")
    parser.add_argument("--device", type=arguments.device, default="cpu")
    parser.add_argument(
        "--out", type=arguments.output_folder, default=Path("demo-out"), help="folder to write to (default demo-out)"
    )
    args = parser.parse_args(argv)
    if args.batch > args.images:
        parser.error("--batch must be between 1 and --images")
    device = torch.device(args.device)
    var, vae = load(device)
    measured = measure(var, vae, device)
    rows = [asdict(row) for row in run(var, vae, measured, args.images, args.batch, device)]
    ran = machine() if device.type == "cpu" else {**machine(), "gpu": torch.cuda.get_device_name(device)}
    result = {
        "machine": ran, "images": args.images, "batch": args.batch, "sampling": SAMPLING, "rows": rows,
        "scales": [
            {"tokens": n, "attention": sum(each) / len(measured.needs)}
            for n, each in zip(var.config.schedule.tokens[:-1], zip(*measured.needs, strict=True), strict=False)
        ],
    }  # fmt: skip
    write_json(args.out / "shootout.json", result)
    plots.quality(rows, f"{args.images} digits from the same seeds, fp32", args.out / "shootout.png")
    print(f"\n{args.images} digits, cfg {SAMPLING['cfg']}, on {ran.get('gpu', ran['cpu'])}\n\n{render(rows)}\n")
    print(f"PSNR ahead, dB\n\n{margins(rows)}\n\n{worth(result['scales'])}\n")
    print(f"picture   {args.out / 'shootout.png'}")
    print(f"figures   {args.out / 'shootout.json'}")


if __name__ == "__main__":
    sys.exit(console.run(main))
