"""Train the avatar model from nothing: draw the avatars, then the VQ-VAE, then the VAR.

    pip install dicebear-core dicebear-styles resvg-py  # the extra `avatars`
    python -m examples.avatars.train                    # two hours on one CPU core
    python -m examples.avatars.train --device cuda
    python -m examples.avatars.train --quick --out DIR  # a few steps of everything, for tests

An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.cli import console
from amskv_kernels.files import write_json
from amskv_kernels.models import VAR, VQVAE, checkpoint
from examples.avatars.attributes import ASKED, class_of
from examples.avatars.data import Avatars, avatars
from examples.avatars.model import SCHEDULE, VAR_SIZES, VQVAE_SIZES, WEIGHTS, SummedEmbedding, build
from examples.training import (
    SEED,
    Plan,
    Run,
    Stream,
    command_line,
    initialise,
    minutes,
    near_identity,
    shuffled,
    train_var,
    train_vqvae,
)

PLAN = Plan(
    vae_steps=4000, vae_batch=4, vae_lr=5e-4, code_pace=6.0, vae_sharp=0.2, var_steps=6900,
    var_turns=((6, 24), (8, 10), (10, 4)), var_lr=2e-3, warmup=50, ema=0.99, log_every=10, save_every=50,
)  # fmt: skip
QUICK = replace(
    PLAN, vae_steps=3, vae_batch=4, var_steps=5, var_turns=((6, 2), (10, 2)), warmup=2, log_every=2, save_every=2
)  # fmt: skip
IMAGES = 3000
ENCODED = 50  # images at once


def all_tokens(vae: VQVAE, data: Avatars, device: str) -> Tensor:
    """Every image's tokens (N, 680) int64."""
    vae.eval()
    with torch.no_grad():
        return torch.cat(
            [vae.tokens(data.pixels(part).to(device)) for part in torch.arange(len(data.images)).split(ENCODED)]
        )


def summed(var: VAR) -> VAR:
    """The same VAR with its class embedding a sum while it learns."""
    var.class_emb = SummedEmbedding(var.config.embed_dim)  # type: ignore[assignment]
    return var


def tabled(var: VAR) -> VAR:
    """Back to VAR's own keys."""
    assert isinstance(var.class_emb, SummedEmbedding)
    var.class_emb = var.class_emb.table()
    return var


def learn(plan: Plan, images: int, args: argparse.Namespace) -> dict[str, object]:
    """Both models' training; what a result file says of it."""
    out, device = args.out, args.device
    var, vae = build()
    initialise(var)
    near_identity(vae)
    var, vae = summed(var).to(device), vae.to(device)
    data = avatars("generator", images, out / "checkpoints", args.threads)
    labels = class_of(data.values[:, : len(ASKED)]).to(device)

    def pictures(size: int, run: Run) -> Stream:
        for chosen in shuffled(images, size, run):
            yield data.pixels(chosen).to(device), labels[chosen]

    vae_run = train_vqvae(vae, plan, out, device, pictures, args.vae_minutes * 60, bf16=True)
    checkpoint.save(out / "vqvae.safetensors", vae.half(), VQVAE_SIZES, SCHEDULE)
    vae = vae.float()  # rounded to what the file says
    tokens = all_tokens(vae, data, device)
    with torch.no_grad():
        some = slice(0, 10 * ENCODED)
        rebuilt = vae.decode(vae.latent(tokens[some]))
        error = float(F.mse_loss(rebuilt.cpu(), data.pixels(some)))

    def token_batches(size: int, run: Run) -> Stream:
        for chosen in shuffled(images, size, run):
            yield tokens[chosen], labels[chosen]

    var_run = train_var(var, vae, plan, out, device, token_batches, args.minutes * 60, args.compile)
    checkpoint.save(out / "var.safetensors", tabled(var).half(), VAR_SIZES, SCHEDULE)
    return {
        "images": images, "reconstruction_mse": error,
        "seconds": {"vqvae": round(vae_run.seconds), "var": round(var_run.seconds)},
        "steps": {"vqvae": vae_run.step, "var": var_run.step}, "vqvae_log": vae_run.log, "var_log": var_run.log,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = command_line(__doc__, WEIGHTS)
    parser.add_argument(
        "--vae-minutes", type=minutes, default=math.inf, help="let the VQ-VAE train for at most this long"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    plan = QUICK if args.quick else PLAN
    learnt = learn(plan, 40 if args.quick else IMAGES, args)
    result = {
        "device": args.device, "threads": args.threads, "seed": SEED, "plan": asdict(plan),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "schedule": SCHEDULE.name, "vqvae": VQVAE_SIZES, "var": VAR_SIZES, **learnt,
    }  # fmt: skip
    write_json(args.out / "training.json", result)


if __name__ == "__main__":
    sys.exit(console.run(main))
