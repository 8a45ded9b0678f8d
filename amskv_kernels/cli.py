"""The command line: `amskv`, or `python -m amskv_kernels`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from amskv_kernels.version import __version__

DESCRIPTION = """\
Attention over a planned, paged KV cache for next-scale (VAR) image models.

start here:
  amskv doctor                                                what this machine can run, and why
  amskv plan --model var-d30 --policy ams-kv:75 --images 64   exact cache memory, before running anything
  amskv calibrate --help                                      find the cache-demanding layers of your checkpoint
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, no usage block."""
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def _complain(message: str) -> int:
    print(f"amskv: {message}", file=sys.stderr)
    return 2


def _plan(arguments: argparse.Namespace) -> int:
    from amskv_kernels.memory import STOCK_PAIR_BYTES, report, token_mib
    from amskv_kernels.models.shapes import ModelShape
    from amskv_kernels.plan import CachePlan
    from amskv_kernels.policies import parse_policy

    shape = ModelShape.named(arguments.model, arguments.schedule)
    policy = parse_policy(arguments.policy, shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, policy, shape.layers, arguments.page_size)
    memory = report(plan, shape, arguments.policy, arguments.images, arguments.dtype, not arguments.no_cfg)
    if arguments.plot:
        from amskv_kernels import plots
        from amskv_kernels.memory import MIB, PAIR_BYTES

        pairs = {"ours": PAIR_BYTES[arguments.dtype], "stock": STOCK_PAIR_BYTES}
        token_bytes = {name: round(token_mib(shape, memory.sequences, pair) * MIB) for name, pair in pairs.items()}
        title = f"{shape.name}, {arguments.images} images, {arguments.dtype}"
        plots.timeline({arguments.policy: plan}, token_bytes, title, arguments.plot)
    if arguments.json:
        print(json.dumps({**memory.as_dict(), "settings": repr(policy)}, indent=2))
        return 0
    share = f"{memory.retained_tokens_per_layer:.1f} of {memory.total_tokens} tokens per layer"
    kept = "lossless" if memory.lossless else "approximate: some earlier scales are dropped"
    print(f"{shape.name} ({memory.schedule}), {memory.images} images = {memory.sequences} sequences, {memory.dtype}")
    print(f"policy     {memory.policy}: {policy!r}")
    print(f"stock      {memory.stock_mib:12,.1f} MiB  every token, fp32 K and 16-bit V")
    print(f"retained   {memory.retained_mib:12,.1f} MiB  {share}: {memory.saved_of_all:.1%} fewer, {kept}")
    print(f"allocated  {memory.allocated_mib:12,.1f} MiB  in pages of {memory.page_size} tokens, known before step 1")
    print(f"peak       {memory.peak_mib:12,.1f} MiB  with the current scale's own K, V")
    print(f"saved      {memory.saved_bytes:12.1%} of stock's bytes; tokens: {memory.saved_of_all:.1%} of all, "
          f"{memory.saved_of_prefix:.1%} of the prefix")  # fmt: skip
    if arguments.plot:
        print(f"plot       {arguments.plot}")
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from amskv_kernels import plots
    from amskv_kernels.calibrate import SimilarityRecorder, calibrate
    from amskv_kernels.models import ConcatKVCache
    from amskv_kernels.models.checkpoint import load

    if arguments.theta is None and arguments.count is None:
        raise ValueError("give --theta or --count: how to choose the demanding layers")
    if arguments.images < 1:
        raise ValueError(f"--images is {arguments.images}; it must be at least 1")
    var, vae = load(arguments.var, arguments.vae, arguments.model, arguments.device)
    config, device = var.config, var.lvl_1L.device
    labels = torch.arange(arguments.images, device=device) % config.num_classes
    cache = ConcatKVCache()
    recorder = SimilarityRecorder(config.schedule, config.depth, cache)
    batches = labels.split(arguments.batch)
    bar = tqdm(total=len(batches) * len(config.schedule), unit="step", disable=not sys.stderr.isatty())

    def generate(attention: SimilarityRecorder) -> None:
        rng = torch.Generator(device).manual_seed(arguments.seed)
        for part in batches:
            cache.reset()
            top_k = min(900, config.vocab_size)
            var.generate(vae, part, attention, top_k=top_k, generator=rng, progress=lambda *_: bar.update() and None)

    name = arguments.model or Path(arguments.var).stem
    found = calibrate(generate, recorder, theta=arguments.theta, count=arguments.count, model=name)
    bar.close()
    found.save(arguments.out)
    layers = ", ".join(map(str, found.demanding_layers)) or "none"
    print(f"demanding layers  {layers} (similarity below {found.theta:.4f})")
    print(f"written           {arguments.out}")
    if arguments.plot:
        plots.similarity(found, arguments.plot)
        print(f"plot              {arguments.plot}")
    print(f"next              amskv plan --model … --policy ams-kv:75@{arguments.out}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from amskv_kernels.doctor import diagnose

    facts = diagnose()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:<14} {value}")
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
    plan.add_argument("--plot", metavar="PNG", help="draw the bytes over the steps")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=_plan)

    calibrate = commands.add_parser("calibrate", help="measure key similarity and choose the demanding layers")
    calibrate.add_argument("--var", required=True, metavar="FILE", help="var_d*.pth or safetensors")
    calibrate.add_argument("--vae", required=True, metavar="FILE", help="vae_ch160v4096z32.pth or safetensors")
    calibrate.add_argument("--model", help="var-d16 … var-d36; needed for .pth files")
    calibrate.add_argument("--theta", type=float, help="layers of mean similarity below this are demanding")
    calibrate.add_argument("--count", type=int, help="this many layers are demanding")
    calibrate.add_argument("--images", type=int, default=32, help="images to measure (default 32)")
    calibrate.add_argument("--batch", type=int, default=16, help="images at once (default 16)")
    calibrate.add_argument("--seed", type=int, default=0)
    calibrate.add_argument("--device", default="cpu")
    calibrate.add_argument("--out", default="calibration.json", help="default calibration.json")
    calibrate.add_argument("--plot", metavar="PNG", help="draw similarity, layers × scales")
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
