"""The command line: `amskv`, or `python -m amskv_kernels`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.version import __version__

if TYPE_CHECKING:
    from amskv_kernels.models import VAR

DESCRIPTION = """\
Attention over a planned, paged KV cache for next-scale (VAR) image models.

start here:
  amskv doctor                                                what this machine can run, and why
  amskv plan --model var-d30 --policy ams-kv:75 --images 64   exact cache memory, before running anything
  amskv calibrate --help                                      measure your checkpoint for AMS-KV, ScaleKV or HeatKV
"""


TOP, PROTECTED = 16, 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, no usage block."""
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def _complain(message: str) -> int:
    print(f"amskv: {message}", file=sys.stderr)
    return 2


def _picture(text: str) -> Path:
    from amskv_kernels.plots import picture_path

    try:
        return picture_path(text)
    except (ValueError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file(text: str) -> Path:
    if not Path(text).name or text.endswith("/") or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a directory' if text else 'empty'}; it must name a file")
    return Path(text)


def number(text: str) -> float:
    """A finite one; argparse says this name where the text is none."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite; it must be a similarity to compare with")
    return float(text)


def seed(text: str) -> int:
    """One that torch takes."""
    if not -(2**63) <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is out of range; a seed has 64 bits")
    return int(text)


def _device(text: str) -> str:
    import torch

    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one to measure on; it must be cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there; torch sees {torch.cuda.device_count()} such devices")
    return text


def _plan(arguments: argparse.Namespace) -> int:
    from amskv_kernels.memory import STOCK_PAIR_BYTES, counted, report, token_mib
    from amskv_kernels.models.shapes import ModelShape
    from amskv_kernels.plan import CachePlan
    from amskv_kernels.policies import parse_policy

    shape = ModelShape.named(arguments.model, arguments.schedule)
    policy = parse_policy(arguments.policy, shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, policy, shape.layers, arguments.page_size, shape.kv_heads)
    memory = report(plan, shape, arguments.policy, arguments.images, arguments.dtype, not arguments.no_cfg)
    if arguments.plot:
        from amskv_kernels import plots
        from amskv_kernels.memory import MIB, PAIR_BYTES

        pairs = {"ours": PAIR_BYTES[arguments.dtype], "stock": STOCK_PAIR_BYTES}
        token_bytes = {name: round(token_mib(shape, memory.sequences, pair) * MIB) for name, pair in pairs.items()}
        title = f"{shape.name}, {counted(arguments.images, 'image')}, {arguments.dtype}"
        plots.timeline({arguments.policy: plan}, token_bytes, title, arguments.plot)
    if arguments.json:
        print(json.dumps({**memory.as_dict(), "settings": repr(policy)}, indent=2))
        return 0
    share = f"{memory.retained_tokens_per_layer:.1f} of {memory.total_tokens} tokens per layer"
    dropped = "scales" if plan.selection is None else "tokens"
    kept = "lossless" if memory.lossless else f"approximate: some earlier {dropped} are dropped"
    drawn = f"{counted(memory.images, 'image')} = {counted(memory.sequences, 'sequence')}"
    print(f"{shape.name} ({memory.schedule}), {drawn}, {memory.dtype}")
    print(f"policy     {memory.policy}: {policy!r}")
    print(f"stock      {memory.stock_mib:12,.1f} MiB  every token, fp32 K and 16-bit V")
    print(f"retained   {memory.retained_mib:12,.1f} MiB  {share}: {memory.saved_of_all:.1%} fewer, {kept}")
    print(
        f"           {memory.retained_at_stock_dtype_mib:12,.1f} MiB  the same tokens with stock's fp32 K and 16-bit V"
    )
    print(f"allocated  {memory.allocated_mib:12,.1f} MiB  in pages of {memory.page_size} tokens, known before step 1")
    print(f"peak       {memory.peak_mib:12,.1f} MiB  with the current scale's own K, V")
    print(f"saved      {memory.saved_bytes:12.1%} of stock's bytes; tokens: {memory.saved_of_all:.1%} of all, "
          f"{memory.saved_of_prefix:.1%} of the prefix")  # fmt: skip
    if arguments.plot:
        print(f"plot       {arguments.plot}")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    for name in ("theta", "count", "top", "protected", "plot"):
        if name not in _OPTIONS[arguments.method] and getattr(arguments, name) is not None:
            own = ", ".join(f"--{option}" for option in _OPTIONS[arguments.method])
            raise ValueError(f"--{name} means nothing to --method {arguments.method}, whose own options are {own}")
    if arguments.method == "similarity" and arguments.theta is None and arguments.count is None:
        raise ValueError("give --theta or --count: how to choose the demanding layers")
    if arguments.method == "similarity" and arguments.theta is not None and arguments.count is not None:
        raise ValueError("give --theta or --count, not both")
    for name, value in (("--images", arguments.images), ("--batch", arguments.batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    policy: str = _METHODS[arguments.method](arguments)
    print(f"written           {arguments.out}")
    print(f"next              amskv plan --model … --policy {policy}@{arguments.out}")
    return 0


def _similarity(arguments: argparse.Namespace) -> str:
    from amskv_kernels import plots
    from amskv_kernels.calibrate import SimilarityRecorder, calibrate

    var, generate, name = _load(arguments)
    if arguments.count is not None and not 0 <= arguments.count <= var.config.depth:
        raise ValueError(f"--count is {arguments.count}; it must be within 0 … {var.config.depth}, the model's layers")
    recorder = SimilarityRecorder(var.config.schedule, var.config.depth)
    found = calibrate(generate, recorder, theta=arguments.theta, count=arguments.count, model=name)
    found.save(arguments.out)
    layers = ", ".join(map(str, found.demanding_layers)) or "none"
    print(f"demanding layers  {layers} (similarity below {found.theta:.4f})")
    if arguments.plot:
        plots.similarity(found, arguments.plot)
        print(f"plot              {arguments.plot}")
    return "ams-kv:75"


def _asi(arguments: argparse.Namespace) -> str:
    from amskv_kernels.calibrate import AttentionRecorder

    var, generate, name = _load(arguments)
    top = TOP if arguments.top is None else arguments.top
    recorder = AttentionRecorder(var.config.schedule, var.config.depth, top=top)
    recorder.check_count(arguments.count)
    generate(recorder)
    found = recorder.drafters(arguments.count, name)
    found.save(arguments.out)
    layers = " ".join(",".join(map(str, each)) or "–" for each in found.layers)
    print(f"drafters          {layers} (by scale)")
    return "scalekv:10"


def _scas(arguments: argparse.Namespace) -> str:
    from amskv_kernels.calibrate import AttentionRecorder

    var, generate, name = _load(arguments)
    most = len(var.config.schedule) - 2
    protected = min(PROTECTED, most) if arguments.protected is None else arguments.protected
    if not 0 <= protected <= most:
        raise ValueError(f"--protected is {protected}; it must be within 0 … {most}, of the scales that are read later")
    recorder = AttentionRecorder(var.config.schedule, var.config.depth)
    generate(recorder)
    found = recorder.orders(protected, name)
    found.save(arguments.out)
    weakest = ", ".join(f"head {head} of layer {layer}" for head, layer in found.orders[-1][:3])
    print(f"head orders       {len(found.orders)} source scales; least needed of the last: {weakest}")
    return "heatkv:10"


_METHODS = {"similarity": _similarity, "asi": _asi, "scas": _scas}
_OPTIONS = {"similarity": ("theta", "count", "plot"), "asi": ("count", "top"), "scas": ("protected",)}


def _load(arguments: argparse.Namespace) -> tuple[VAR, Callable[[Any], None], str]:
    """The model, what draws the images with a recorder in between, and a name."""
    import torch
    from tqdm import tqdm

    from amskv_kernels.models import ConcatKVCache
    from amskv_kernels.models.checkpoint import load

    var, vae = load(arguments.var, arguments.vae, arguments.model, arguments.device)
    config, device = var.config, var.lvl_1L.device
    labels = torch.arange(arguments.images, device=device) % config.num_classes

    def generate(recorder: Any) -> None:
        batches = labels.split(arguments.batch)
        recorder.inner = cache = ConcatKVCache()
        rng = torch.Generator(device).manual_seed(arguments.seed)
        with tqdm(total=len(batches) * len(config.schedule), unit="step", disable=not sys.stderr.isatty()) as bar:
            for part in batches:
                cache.reset()
                top_k = min(900, config.vocab_size)
                var.generate(vae, part, recorder, top_k=top_k, generator=rng, progress=lambda *_: bar.update() and None)

    return var, generate, arguments.model or Path(arguments.var).stem


def _doctor(arguments: argparse.Namespace) -> int:
    from amskv_kernels.doctor import diagnose, render

    facts = diagnose()
    print(json.dumps(facts, indent=2) if arguments.json else render(facts))
    return 0


def _parser() -> argparse.ArgumentParser:
    from amskv_kernels.policies.parse import SYNTAX

    parser = _Parser(
        prog="amskv", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"amskv_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    plan = commands.add_parser("plan", help="exact cache memory of a model under a policy")
    plan.add_argument("--model", required=True, help="var-d16 … var-d36, infinity-2b, infinity-8b")
    plan.add_argument("--policy", required=True, help=SYNTAX.replace("%", "%%"))
    plan.add_argument("--images", type=int, default=1, help="images generated at once (default 1)")
    plan.add_argument("--dtype", default="bf16", help="of the pages: bf16 (default), fp16, fp32")
    plan.add_argument("--schedule", help="another published schedule than the model's own")
    plan.add_argument("--page-size", type=int, help="16, 32, 64 or 128 (default: what suits the schedule)")
    plan.add_argument("--no-cfg", action="store_true", help="one sequence an image instead of two")
    plan.add_argument("--plot", type=_picture, metavar="PNG", help="draw the bytes over the steps")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=_plan)

    calibrate = commands.add_parser("calibrate", help="measure a model for AMS-KV, ScaleKV or HeatKV")
    calibrate.add_argument("--var", required=True, metavar="FILE", help="var_d*.pth or safetensors")
    calibrate.add_argument("--vae", required=True, metavar="FILE", help="vae_ch160v4096z32.pth or safetensors")
    calibrate.add_argument("--model", help="var-d16 … var-d36; needed for .pth files, checked for others")
    calibrate.add_argument(
        "--method", choices=sorted(_METHODS), default="similarity",
        help="similarity of keys for AMS-KV (default), attention selectivity (ASI) for ScaleKV, S-CAS for HeatKV",
    )  # fmt: skip
    calibrate.add_argument("--theta", type=number, help="similarity: layers of a mean below this are demanding")
    calibrate.add_argument(
        "--count", type=int,
        help="similarity: this many layers are demanding; asi: this many (layer, scale) pairs are drafters",
    )  # fmt: skip
    calibrate.add_argument("--top", type=int, help=f"asi: strongest history keys that count (default {TOP})")
    calibrate.add_argument("--protected", type=int, help=f"scas: scales that no head drops (default {PROTECTED})")
    calibrate.add_argument("--images", type=int, default=32, help="images to measure (default 32)")
    calibrate.add_argument("--batch", type=int, default=16, help="images at once (default 16)")
    calibrate.add_argument("--seed", type=seed, default=0)
    calibrate.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda or cuda:N")
    calibrate.add_argument("--out", type=_file, default="calibration.json", help="default calibration.json")
    calibrate.add_argument("--plot", type=_picture, metavar="PNG", help="similarity: draw it, layers × scales")
    calibrate.set_defaults(run=_calibrate)

    doctor = commands.add_parser("doctor", help="versions, devices, and which backend serves which op")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for anything the user can mend."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        return _complain(str(error).splitlines()[0])
