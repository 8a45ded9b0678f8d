"""`amskv calibrate`: measure a checkpoint for AMS-KV, ScaleKV, HeatKV or LeastLoss."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import command, default_device, device, number, output_file, picture, seed, whole

if TYPE_CHECKING:
    from torch import Tensor

    from amskv_kernels.models import VAR

TOP, PROTECTED = 16, 3
EPILOG = """\
next: amskv plan --checkpoint FILE --policy ams-kv:75@calibration.json, and the same policy in your code:
  parse_policy("ams-kv:75@calibration.json", schedule, num_layers)
Infinity: pass a recorder of amskv_kernels.calibrate as patch(infinity, Full(), observe=recorder.observe) and generate.
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    calibrate = command(commands, "calibrate", "measure a model for AMS-KV, ScaleKV, HeatKV or LeastLoss", EPILOG)
    calibrate.add_argument(
        "--var", required=True, metavar="FILE", help="var_d*.pth, a checkpoint of the public trainer, or safetensors"
    )
    calibrate.add_argument(
        "--vae", required=True, metavar="FILE", help="vae_ch160v4096z32.pth, a trainer's checkpoint, or safetensors"
    )
    calibrate.add_argument("--model", help="var-d16 … var-d36, where the file must be of that model")
    calibrate.add_argument(
        "--method", choices=sorted(_METHODS), default="similarity",
        help="similarity of keys for AMS-KV (default), attention selectivity (ASI) for ScaleKV, S-CAS for HeatKV, loss "
        "of forgetting scales for LeastLoss and AMS-KV",
    )  # fmt: skip
    calibrate.add_argument("--theta", type=number, help="similarity: layers of a mean below this are demanding")
    calibrate.add_argument(
        "--count", type=whole(0),
        help="similarity: this many layers are demanding; asi: this many (layer, scale) pairs are drafters",
    )  # fmt: skip
    calibrate.add_argument("--top", type=whole(1), help=f"asi: strongest history keys that count (default {TOP})")
    calibrate.add_argument("--protected", type=whole(0), help=f"scas: scales that no head drops (default {PROTECTED})")
    calibrate.add_argument(
        "--half", choices=("conditional", "both"),
        help="scas: whose attention, the sequences' with a class (default, as HeatKV measures) or all sequences'",
    )  # fmt: skip
    calibrate.add_argument(
        "--images", type=whole(1), default=32, help="images to measure, of classes spread over all (default 32)"
    )
    calibrate.add_argument("--batch", type=whole(1), default=16, help="images at once (default 16)")
    calibrate.add_argument("--seed", type=seed, default=0, help="of classes and sampling (default 0)")
    calibrate.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    calibrate.add_argument("--out", type=output_file, default="calibration.json", help="default calibration.json")
    calibrate.add_argument("--plot", type=picture, metavar="PNG", help="similarity, loss: draw it, layers × scales")
    calibrate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and write the file."""
    for name in ("theta", "count", "top", "protected", "half", "plot"):
        if name not in _OPTIONS[arguments.method] and getattr(arguments, name) is not None:
            own = ", ".join(f"--{option}" for option in _OPTIONS[arguments.method])
            raise ValueError(f"--{name} means nothing to --method {arguments.method}, whose own options are {own}")
    if arguments.method == "similarity" and arguments.theta is None and arguments.count is None:
        raise ValueError("give --theta or --count: how to choose the demanding layers")
    if arguments.method == "similarity" and arguments.theta is not None and arguments.count is not None:
        raise ValueError("give --theta or --count, not both")
    policy: str = _METHODS[arguments.method](arguments)
    print(f"written           {arguments.out}")
    words = ["amskv", "plan", "--checkpoint", arguments.var, "--policy", f"{policy}@{arguments.out}"]
    print(f"next              {shlex.join(words)}")
    return 0


def _similarity(arguments: argparse.Namespace) -> str:
    from amskv_kernels.calibrate import SimilarityRecorder, calibrate
    from amskv_kernels.cli import plots

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
    recorder = AttentionRecorder(var.config.schedule, var.config.depth, half=arguments.half or "conditional")
    generate(recorder)
    found = recorder.orders(protected, name)
    found.save(arguments.out)
    weakest = ", ".join(f"head {head} of layer {layer}" for head, layer in found.orders[-1][:3])
    print(f"head orders       {len(found.orders)} source scales; least needed of the last: {weakest}")
    print(f"measured          {recorder.half} sequences of guided generations")
    return "heatkv:10"


def _loss(arguments: argparse.Namespace) -> str:
    from amskv_kernels.calibrate import LossRecorder
    from amskv_kernels.cli import plots

    var, generate, name = _load(arguments)
    recorder = LossRecorder(var.config.schedule, var.config.depth)
    generate(recorder)
    found = recorder.losses(name)
    found.save(arguments.out)
    worst = found.alone().sum(1)[:, -1, :-1]  # of the last step's queries
    layer, scale = divmod(int(worst.argmax()), worst.shape[1])
    h, w = found.schedule[scale]
    print(f"losses            the last map would miss scale {scale} ({h}×{w}) of layer {layer} most")
    if arguments.plot:
        plots.losses(found, arguments.plot)
        print(f"plot              {arguments.plot}")
    return "least-loss:25"


_METHODS = {"similarity": _similarity, "asi": _asi, "scas": _scas, "loss": _loss}
_OPTIONS = {
    "similarity": ("theta", "count", "plot"), "asi": ("count", "top"), "scas": ("protected", "half"), "loss": ("plot",),
}  # fmt: skip


def _load(arguments: argparse.Namespace) -> tuple[VAR, Callable[[Any], None], str]:
    """The model, what draws the images with a recorder in between, and a name."""
    import torch
    from tqdm import tqdm

    from amskv_kernels.models import ConcatKVCache
    from amskv_kernels.models.checkpoint import load

    var, vae = load(arguments.var, arguments.vae, arguments.model, arguments.device or default_device())
    config, device = var.config, var.lvl_1L.device
    classes = spread_classes(config.num_classes, arguments.images, arguments.seed)

    def generate(recorder: Any) -> None:
        batches = classes.to(device).split(arguments.batch)
        recorder.inner = cache = ConcatKVCache()
        rng = torch.Generator(device).manual_seed(arguments.seed)
        with tqdm(total=len(batches) * len(config.schedule), unit="step", disable=None) as bar:
            for part in batches:
                cache.reset()
                top_k = min(900, config.vocab_size)
                var.generate(vae, part, recorder, top_k=top_k, generator=rng, progress=lambda *_: bar.update() and None)

    return var, generate, arguments.model or Path(arguments.var).stem


def spread_classes(num_classes: int, images: int, seed: int) -> Tensor:
    """(images) int64: a class for each, drawn without repetition until all have been."""
    import torch

    rng = torch.Generator("cpu").manual_seed(seed)
    rounds = [torch.randperm(num_classes, generator=rng, device="cpu") for _ in range(-(-images // num_classes))]
    return torch.cat(rounds)[:images]
