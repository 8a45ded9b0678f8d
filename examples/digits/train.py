"""Train the digits model from nothing: the VQ-VAE, then the VAR, then measure it.

    python -m examples.digits.train                    # about an hour on two CPU cores
    python -m examples.digits.train --device cuda
    python -m examples.digits.train --quick --out DIR  # a few steps of everything, for tests

An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.cli import arguments, console
from amskv_kernels.files import write_json
from amskv_kernels.models import VQVAE, checkpoint
from examples.digits.data import SEED, Digits, accuracy, augment, digits
from examples.digits.evaluate import evaluate
from examples.digits.model import SCHEDULE, VAR_SIZES, VQVAE_SIZES, WEIGHTS, build
from examples.training import Plan, Run, Stream, command_line, initialise, shuffled, train_var, train_vqvae

QUICK = Plan(
    vae_steps=6, vae_batch=8, var_steps=4, var_turns=((8, 2), (10, 2)), warmup=2, log_every=2, save_every=2
)  # fmt: skip
REBUILT_IMAGES, EVAL_IMAGES = 2000, 500  # at most
QUICK_IMAGES = 32, 10


def batches(data: Digits, size: int, run: Run, device: str) -> Stream:
    """Endless shuffled, augmented batches."""
    for chosen in shuffled(len(data.labels), size, run):
        yield augment(data.images[chosen].to(device), run.generator), data.labels[chosen].to(device)


def token_batches(vae: VQVAE, data: Digits, size: int, run: Run, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same as tokens (B, schedule.total)."""
    for images, labels in batches(data, size, run, device):
        with torch.no_grad():
            tokens = vae.tokens(images)
        yield tokens, labels


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_line(__doc__, WEIGHTS)
    parser.add_argument("--vae-steps", type=arguments.whole(1))
    parser.add_argument("--var-steps", type=arguments.whole(1))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    plan = QUICK if args.quick else Plan()
    rebuilt_images, eval_images = QUICK_IMAGES if args.quick else (REBUILT_IMAGES, EVAL_IMAGES)
    changes = {name: getattr(args, name) for name in ("vae_steps", "var_steps") if getattr(args, name) is not None}
    plan = replace(plan, **changes)
    var, vae = build()
    initialise(var)
    var, vae = var.to(args.device), vae.to(args.device)
    ours, held = digits()
    vae_run = train_vqvae(
        vae, plan, args.out, args.device, lambda size, run: batches(ours, size, run, args.device)
    )  # fmt: skip
    checkpoint.save(args.out / "vqvae.safetensors", vae, VQVAE_SIZES, SCHEDULE)
    shown, wanted = ours.images[:rebuilt_images], ours.labels[:rebuilt_images]
    with torch.no_grad():
        rebuilt = torch.cat(
            [vae.decode(vae.latent(vae.tokens(part.to(args.device)))).cpu() for part in shown.split(64)]
        )
    seen = {
        "judge_on_training_images": accuracy(shown, wanted),
        "judge_on_reconstructions": accuracy(rebuilt, wanted),
        "reconstruction_mse": float(F.mse_loss(rebuilt, shown)),
    }
    print(json.dumps(seen), flush=True)
    var_run = train_var(
        var, vae, plan, args.out, args.device, lambda size, run: token_batches(vae, ours, size, run, args.device),
        args.minutes * 60, args.compile,
    )  # fmt: skip
    checkpoint.save(args.out / "var.safetensors", var, VAR_SIZES, SCHEDULE)
    result = {
        "device": args.device, "threads": args.threads, "seed": SEED, "plan": asdict(plan),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "schedule": SCHEDULE.name, "vqvae": VQVAE_SIZES, "var": VAR_SIZES, "images": len(ours.labels),
        "held_out_images": len(held.labels), **seen,
        "seconds": {"vqvae": round(vae_run.seconds), "var": round(var_run.seconds)},
        "generated": evaluate(var.eval(), vae, eval_images, args.device),
        "vqvae_log": vae_run.log, "var_log": var_run.log,
    }  # fmt: skip
    write_json(args.out / "training.json", result)
    print(json.dumps(result["generated"], indent=1))


if __name__ == "__main__":
    sys.exit(console.run(main))
