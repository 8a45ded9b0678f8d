"""The same images from the same seeds under every cache policy: a table and two pictures of each model that ships.

    python -m examples.demo
    python -m examples.demo digits --images 100 --batch 20

Stock-style concatenation and `full` give the same images. The others keep a quarter of the tokens or less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from amskv_kernels import CachePlan
from amskv_kernels.cli import arguments, console, plots
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, ConcatKVCache
from amskv_kernels.models.var import Attention
from amskv_kernels.planning.memory import MIB, counted
from examples.subjects import NAMES, POLICIES, Subject, cache_for, plan_for, shown, subject

PAIR_BYTES = 8  # the demo runs in fp32, stock cache and pages alike
SHOWN = 14  # images on the contact sheet, at most


@dataclass
class Contestant:
    """One cache and what came of it."""

    name: str
    plan: CachePlan | None  # None is stock's concatenation
    seconds: list[float] = field(default_factory=list)  # of self-attention, a batch each
    images: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


class Timed:
    """Measures the time spent inside another attention."""

    def __init__(self, inner: Attention) -> None:
        self.inner, self.seconds = inner, 0.0
        self.keeps_fp32_keys = getattr(inner, "keeps_fp32_keys", False)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """What the inner attention gives."""
        start = time.perf_counter()
        out = self.inner.attend(layer, q, k, v, softmax_scale)
        self.seconds += time.perf_counter() - start
        return out


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes are those of one batch, in MiB."""

    policy: str
    tokens_per_layer: float
    needed_mib: float  # for keys and values: pool and scale in flight; stock's, while its last layer concatenates
    retained_mib: float
    peak_mib: float
    retained_share: float
    attention_seconds: float
    attention_share: float  # of stock's in the same batch, the median over batches
    accuracy: float
    same_tokens: float
    psnr_db: float | None  # None: identical
    judged: dict[str, float] = field(default_factory=dict)  # what else the judge finds, by name


def contestants(var: VAR, calibration: Path) -> list[Contestant]:
    """Stock first, then every policy with its plan."""
    return [Contestant("stock", None), *(Contestant(name, plan_for(var, name, calibration)) for name in POLICIES)]


def run(sub: Subject, images: int, batch: int) -> tuple[list[Contestant], Tensor, VAR]:
    """Draw the same images under every policy, batch by batch; order reversed on every other batch."""
    var, vae = sub.load("cpu")
    config, runners = var.config, contestants(var, sub.calibration)
    labels = sub.labels(images)
    parts = labels.split(batch)
    with tqdm(total=len(parts) * len(runners) * len(config.schedule), unit="step", desc=sub.name, disable=None) as bar:
        for i, part in enumerate(parts):
            for runner in runners[:: -1 if i % 2 else 1]:
                cache = ConcatKVCache() if runner.plan is None else cache_for(var, runner.plan, part)
                timed, rng = Timed(cache), torch.Generator().manual_seed(1000 + i)
                drawn = var.generate(
                    vae, part, timed, generator=rng, progress=lambda *_: bar.update() and None, **sub.sampling
                )
                runner.seconds.append(timed.seconds)
                runner.images.append(drawn.images)
                runner.tokens.append(drawn.tokens)
    return runners, labels, var


def table(sub: Subject, runners: Sequence[Contestant], labels: Tensor, batch: int, var: VAR) -> list[Row]:
    """The rows, everything relative to stock (bytes, time) and to the full cache (tokens, pictures)."""
    config = var.config
    schedule, layers = config.schedule, config.depth
    token_mib = 2 * batch * config.num_heads * config.head_dim * PAIR_BYTES / MIB
    # While stock concatenates its last layer's last scale, that layer's old copy is still there, and the scale itself.
    stock_tokens, stock_peak = schedule.total * layers, schedule.total * layers + schedule.prefix
    stock_needed = stock_peak + schedule.tokens[-1]
    full = next(runner for runner in runners if runner.name == "full")
    images, tokens = torch.cat(full.images), torch.cat(full.tokens)
    rows = []
    for runner in runners:
        held = stock_tokens if runner.plan is None else runner.plan.retained_tokens
        peak = stock_peak if runner.plan is None else runner.plan.peak_tokens
        needed = stock_needed if runner.plan is None else runner.plan.needed_tokens
        ratios = [own / stock for own, stock in zip(runner.seconds, runners[0].seconds, strict=True)]
        own = torch.cat(runner.images)
        error = (own - images).square().flatten(1).mean(1)
        recognised, judged = sub.judge(own, labels, images)
        psnr = None if float(error.max()) < 1e-9 else float((-10 * error.clamp_min(1e-9).log10()).mean())
        rows.append(
            Row(
                policy=runner.name,
                tokens_per_layer=held / layers,
                needed_mib=needed * token_mib,
                retained_mib=held * token_mib,
                peak_mib=peak * token_mib,
                retained_share=held / stock_tokens,
                attention_seconds=sum(runner.seconds),
                attention_share=statistics.median(ratios),
                accuracy=recognised,
                judged=judged,
                same_tokens=float((torch.cat(runner.tokens) == tokens).float().mean()),
                psnr_db=psnr,
            )
        )
    return rows


def render(rows: Sequence[dict], style: str = "simple") -> str:
    """Rows, as `asdict` gives them, as a table for people; rows of older runs tell the peak, not what is needed."""
    most = "needed" if all("needed_mib" in row for row in rows) else "peak"
    lines = [
        (
            row["policy"],
            f"{row['tokens_per_layer']:.1f}",
            f"{row[f'{most}_mib']:.1f}",
            f"{row['retained_mib']:.1f} ({row['retained_share']:.0%})",
            f"{row['attention_share']:.2f}×",
            f"{row['accuracy']:.1%}",
            f"{row['same_tokens']:.1%}",
            "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB",
            *(shown(name, value) for name, value in row.get("judged", {}).items()),
        )
        for row in rows
    ]
    headers = (
        "policy", "tokens / layer", f"{most} MiB", "retained MiB (of stock)", "attention time", "recognised",
        "same tokens", "PSNR", *rows[0].get("judged", {}),
    )  # fmt: skip
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)


def contact_sheet(runners: Sequence[Contestant], grey: bool, path: Path) -> None:
    """The first images, one row a policy."""
    count = min(SHOWN, sum(len(part) for part in runners[0].images))
    strips = {r.name: torch.cat(list(torch.cat(r.images)[:count]), dim=2).permute(1, 2, 0) for r in runners}
    # Digits are scanned light on dark; paper is the other way round.
    plots.strips({name: (1 - strip if grey else strip).numpy() for name, strip in strips.items()}, path)


def machine() -> dict[str, str]:
    """What ran the demo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": f"{model}, {counted(torch.get_num_threads(), 'thread')}",
        "torch": torch.__version__,
        "dtype": "fp32",
    }


def show(sub: Subject, images: int, batch: int, out: Path) -> None:
    """One model's table and pictures."""
    runners, labels, var = run(sub, images, batch)
    rows = [asdict(row) for row in table(sub, runners, labels, batch, var)]
    timing = f"attention time over stock's in the same batch, the median of {counted(len(runners[0].seconds), 'run')}"
    result = {
        "machine": machine(), "images": images, "batch": batch, "sampling": sub.sampling, "timing": timing,
        "rows": rows,
    }  # fmt: skip
    write_json(out / "demo.json", result)
    contact_sheet(runners, sub.grey, out / "contact-sheet.png")
    token_bytes = 2 * batch * var.config.num_heads * var.config.head_dim * PAIR_BYTES
    plots.timeline(
        {runner.name: runner.plan for runner in runners if runner.plan is not None},
        {"ours": token_bytes, "stock": token_bytes},
        f"Cache of {batch} {sub.name} with guidance, fp32",
        out / "timeline.png",
    )
    print(f"\n{images} {sub.name}, cfg {sub.sampling['cfg']}, on {machine()['cpu']}\n\n{render(rows)}\n\n{timing}\n")
    print(f"pictures  {out / 'contact-sheet.png'}  {out / 'timeline.png'}")
    print(f"figures   {out / 'demo.json'}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[], help=f"of {' and '.join(NAMES)} (default: all)")
    parser.add_argument("--images", type=arguments.whole(1), default=40, help="images per policy (default 40)")
    parser.add_argument("--batch", type=arguments.whole(1), default=20, help="images at once (default 20)")
    parser.add_argument(
        "--out", type=arguments.output_folder, default=Path("demo-out"), help="folder to write to (default demo-out)"
    )
    args = parser.parse_args(argv)
    if args.batch > args.images:
        parser.error("--batch must be between 1 and --images")
    if unknown := set(args.models) - set(NAMES):
        parser.error(f"no model is called {', '.join(sorted(unknown))}; there are {' and '.join(NAMES)}")
    for name in args.models or NAMES:
        show(subject(name), args.images, args.batch, args.out / name)
    print("next      .venv/bin/amskv plan --model var-d30 --policy ams-kv:75 --images 64")


if __name__ == "__main__":
    sys.exit(console.run(main))
