"""How the models that ship are trained: a VQ-VAE, then a VAR on its tokens; checkpoints, averages, schedules.

What an example adds is its pictures: streams of batches.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from amskv_kernels.cli import arguments
from amskv_kernels.files import replacing
from amskv_kernels.models import VAR, VQVAE
from amskv_kernels.models.vqvae import Double, Halve, ResBlock, SpatialAttention
from amskv_kernels.schedule import ScaleSchedule

SEED = 0


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn."""

    vae_steps: int = 1500
    vae_batch: int = 32
    vae_lr: float = 2e-3
    code_pace: float = 1.0  # the codebook's learning rate over the others'
    vae_sharp: float = 0.0  # weight of the absolute error beside the squared one: edges
    var_steps: int = 5000
    # Steps take turns at (scales, images): fewer scales cost little, decide the shape and leave room for more images.
    var_turns: tuple[tuple[int, int], ...] = ((8, 48), (10, 16))
    var_lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 200
    ema: float = 0.998
    no_label: float = 0.1  # share of labels replaced by "no class", which guidance needs
    log_every: int = 51  # prime to the number of turns, so that the log shows every kind of step
    save_every: int = 250


def minutes(text: str) -> float:
    """A time to train for; argparse says this name where the text is none."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time to train for; it must be above 0")
    return float(text)


def command_line(what: str | None, weights: Path) -> argparse.ArgumentParser:
    """The options that every training has."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--out", type=arguments.output_folder, default=weights,
        help="where weights and log go (default: beside this file)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--threads", type=arguments.whole(1), default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--minutes", type=minutes, default=math.inf, help="let the VAR train for at most this long")
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer; needs a C++ compiler")
    return parser


class BlockCausal:
    """Attention in training: every token sees its own and earlier scales. Three products, fast in bf16 on a CPU.

    The coarse scales go through one masked product; each larger scale sees a whole prefix and needs no mask.
    """

    def __init__(self, schedule: ScaleSchedule, device: str, masked_tokens: int = 96) -> None:
        ends = [offset + n for offset, n in zip(schedule.offsets, schedule.tokens, strict=True)]
        first = max((end for end in ends if end <= masked_tokens), default=ends[0])
        scale = torch.arange(len(schedule)).repeat_interleave(torch.tensor(schedule.tokens))[:first]
        self.hidden = (scale[:, None] < scale[None, :]).to(device)
        self.spans = [(0, first), *((a, b) for a, b in zip(schedule.offsets, ends, strict=True) if a >= first)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """All scales at once: (B, n, H, D) each -> (B, n, H, D); n ends with a scale."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        parts = []
        for start, end in self.spans:
            if start >= q.shape[2]:
                break
            weights = (q[:, :, start:end] * softmax_scale) @ k[:, :, :end].transpose(2, 3)
            if start == 0:
                weights = weights.masked_fill(self.hidden, -torch.inf)
            parts.append(weights.softmax(-1) @ v[:, :, :end])
        return torch.cat(parts, dim=2).transpose(1, 2)


def learning_rate(step: int, done: float, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, and half a cosine from the peak to 1 % of it; done runs from 0 to 1."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


class Average:
    """Exponential moving average of a model's parameters; starts fast so that an early stop is usable too."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - keep)


class Run:
    """One model's training state: steps done, log, checkpoint file."""

    def __init__(self, name: str, model: nn.Module, groups: list[dict[str, Any]], plan: Plan, out: Path) -> None:
        self.name, self.model, self.plan = name, model, plan
        self.average = Average(model, plan.ema)
        groups = [{"pace": 1.0, **group} for group in groups]  # its learning rate over the plan's
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.file = out / "checkpoints" / f"{name}.pt"
        self.step, self.seconds, self.log = 0, 0.0, list[dict[str, float]]()
        self.done = 0.0  # share of the training
        self.generator = torch.Generator().manual_seed(SEED)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.file.exists():
            try:
                held = torch.load(self.file, weights_only=True)
            except Exception as error:  # as many kinds as there are ways to break a pickle
                what = f"{self.file} is no checkpoint of this script ({type(error).__name__}); remove it"
                raise SystemExit(what) from error
            self.model.load_state_dict(held["model"])
            self.average.model.load_state_dict(held["average"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.generator.set_state(held["generator"])
            self.step, self.seconds, self.log = held["step"], held["seconds"], held["log"]

    def keep(self) -> None:
        """Write the checkpoint; a crash while writing leaves the old one."""
        state = {
            "model": self.model.state_dict(), "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
            "step": self.step, "seconds": self.seconds, "log": self.log,
        }  # fmt: skip
        with replacing(self.file) as beside:
            torch.save(state, beside)

    def steps(self, total: int, peak: float, seconds: float = math.inf) -> Iterator[int]:
        """Step numbers with the learning rate set, timed, shown and kept; yields before each update.

        Ends after `total` steps or `seconds` of training, whichever comes first, the learning rate at its lowest then.
        """
        with tqdm(total=total, initial=self.step, desc=self.name, file=sys.stdout, mininterval=5) as bar:
            while (done := max(self.step / total, self.seconds / seconds)) < 1:
                self.done = done
                began = time.perf_counter()
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, done, peak, self.plan.warmup) * group["pace"]
                self.optimizer.zero_grad(set_to_none=True)
                yield self.step
                self.average.update(self.model, self.step)
                self.step += 1
                self.seconds += time.perf_counter() - began
                bar.update()
                if self.log and self.log[-1]["step"] == self.step:
                    bar.set_postfix(self.log[-1])
                if self.step % self.plan.save_every == 0:
                    self.keep()
            self.keep()

    def update(self, loss: Tensor, **shown: Tensor) -> None:
        """One optimiser step, logged now and then."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        if (self.step + 1) % self.plan.log_every == 0:
            values = {"step": self.step + 1, "loss": float(loss.detach()), "grad_norm": float(norm)}
            values |= {name: float(value.detach()) for name, value in shown.items()}
            values["seconds"] = round(self.seconds, 1)
            self.log.append({name: round(value, 5) for name, value in values.items()})


Stream = Iterator[tuple[Tensor, Tensor]]
Streams = Callable[[int, Run], Stream]  # of batches of a size


def shuffled(count: int, size: int, run: Run) -> Iterator[Tensor]:
    """Endless batches of indices below `count`, each once before any comes again."""
    while True:
        order = torch.randperm(count, generator=run.generator)
        yield from order[: count // size * size].split(size)


def _quantised(vae: VQVAE, features: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(latent with a straight-through gradient, quantisation loss, tokens per scale, residuals before each scale)."""
    loss = features.new_zeros(())
    tokens, rests, fhat = [], [features.detach()], torch.zeros_like(features)
    for part, fhat in vae.quantize.walk(features):
        loss = loss + 0.25 * F.mse_loss(features, fhat.detach()) + F.mse_loss(fhat, features.detach())
        tokens.append(part)
        rests.append((features - fhat).detach())
    return features + (fhat - features).detach(), loss / len(tokens), tokens, rests


@torch.no_grad()
def _revive(vae: VQVAE, hits: Tensor, rests: list[Tensor], run: Run) -> int:
    """Give codes that nothing uses the residual of a random place and scale; returns how many."""
    dead = (hits.sum(0) < 0.05).nonzero().flatten()
    schedule = vae.config.schedule
    pool = [
        F.interpolate(rest, size=schedule.sizes[k], mode="area").permute(0, 2, 3, 1).flatten(0, 2)
        for k, rest in enumerate(rests[:-1])
    ]
    for code in dead.tolist():
        rows = pool[int(torch.randint(len(pool), (1,), generator=run.generator))]
        row = rows[int(torch.randint(len(rows), (1,), generator=run.generator))]
        vae.quantize.embedding.weight[code] = row
        hits[:, code] = 1.0
        run.average.model.get_parameter("quantize.embedding.weight")[code] = row
    return len(dead)


def _pass_on(conv: nn.Conv2d, weight: Tensor) -> None:
    """Make a convolution the matrix (out, in) at each place, with no bias."""
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = weight
    if conv.bias is not None:
        conv.bias.zero_()


@torch.no_grad()
def near_identity(vae: VQVAE, offset: float = 2.0) -> None:
    """Starting weights with which a VQ-VAE draws its images small and large again, colours and all, untrained.

    Residual blocks start as nothing, changes of resolution as averaging and repeating. A group norm takes away what an
    even surface is painted with, its mean; before the last one two channels of each group get opposite constants, which
    are what it divides by then, and the others pass. Needs three channels a group or more.
    """
    for module in vae.modules():
        if isinstance(module, ResBlock | SpatialAttention):
            last = module.conv2 if isinstance(module, ResBlock) else module.proj_out
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        elif isinstance(module, Halve):
            nn.init.zeros_(module.conv.weight)
            module.conv.weight[:, :, :2, :2] = torch.eye(len(module.conv.weight))[:, :, None, None] / 4
        elif isinstance(module, Double):
            _pass_on(module.conv, torch.eye(len(module.conv.weight)))
    for conv in (vae.quant_conv, vae.post_quant_conv, *vae.quantize.quant_resi.qresi_ls):
        _pass_on(conv, torch.eye(len(conv.weight)))
    vae.quantize.embedding.weight.mul_(0.1)
    colours = vae.config.image_channels
    for coder, block in ((vae.encoder, vae.encoder.mid.block_2), (vae.decoder, vae.decoder.up[0].block[-1])):
        norm, members = coder.norm_out, coder.norm_out.num_channels // coder.norm_out.num_groups
        carries = torch.arange(norm.num_channels) % members >= 2
        block.conv2.bias[0::members], block.conv2.bias[1::members] = offset, -offset
        norm.weight[~carries] = 0.0
        norm.bias[carries] = 1.0  # where SiLU is all but straight
        mixes = nn.init.orthogonal_(torch.empty(int(carries.sum()), colours))
        weight = torch.zeros(coder.conv_in.weight.shape[:2])
        weight[carries, :colours] = mixes
        _pass_on(coder.conv_in, weight)
        coder.conv_out.weight[:colours] = 0.0
        coder.conv_out.weight[:colours, carries, 1, 1] = mixes.T * (offset * math.sqrt(2 / members))
        coder.conv_out.bias[:colours] = -(coder.conv_out.weight[:colours, :, 1, 1] @ F.silu(norm.bias))


def train_vqvae(
    vae: VQVAE, plan: Plan, out: Path, device: str, images: Streams, seconds: float = math.inf, bf16: bool = False
) -> Run:  # fmt: skip
    """Learn to reconstruct the images of a stream; the average's weights end up in `vae`."""
    codes = vae.quantize.embedding.weight
    others = [parameter for parameter in vae.parameters() if parameter is not codes]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": [codes], "weight_decay": 0.0, "pace": plan.code_pace}]
    run = Run("vqvae", vae.train(), groups, plan, out)
    run.resume()
    stream = images(plan.vae_batch, run)
    for step in run.steps(plan.vae_steps, plan.vae_lr, seconds):
        shown, _ = next(stream)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            features = vae.features(shown)
        latent, quantisation, tokens, rests = _quantised(vae, features)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            drawn = vae.decoder(vae.post_quant_conv(latent)).float()
        reconstruction = F.mse_loss(drawn, shown * 2 - 1)
        edges = plan.vae_sharp * F.l1_loss(drawn, shown * 2 - 1)
        hits = vae.quantize.ema_vocab_hit_SV
        for scale, part in enumerate(tokens):
            hits[scale].lerp_(torch.bincount(part.flatten(), minlength=hits.shape[1]).to(hits), 0.02)
        used = (hits.sum(0) >= 0.5).float().mean()
        run.update(reconstruction + edges + 0.1 * quantisation, reconstruction=reconstruction, codes_used=used)
        if step % 20 == 0 and run.done < 0.7:
            _revive(vae, hits, rests, run)
    vae.load_state_dict({**run.average.model.state_dict(), **dict(vae.named_buffers())})
    return run


def initialise(var: VAR) -> None:
    """Starting weights that keep every block near the identity, so that depth does not slow the start."""
    width, depth = var.config.embed_dim, var.config.depth
    for module in var.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02)
    for table in (var.pos_start, var.pos_1LC):
        nn.init.trunc_normal_(table, std=math.sqrt(1 / width / 3))
    with torch.no_grad():
        var.head.weight.mul_(0.02)
        for name, weight in var.named_parameters():
            if name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
                weight.div_(math.sqrt(2 * depth))
            elif name.endswith("ada_gss"):
                weight[:, :, 2:].mul_(0.5)
                weight[:, :, :2].fill_(0.1)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of the linear layers decay; biases, gates and embeddings do not."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    matrices = [p for p in model.parameters() if id(p) in decayed]
    others = [p for p in model.parameters() if id(p) not in decayed]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train_var(
    var: VAR, vae: VQVAE, plan: Plan, out: Path, device: str, tokens: Streams, seconds: float = math.inf,
    compiled: bool = False,
) -> Run:  # fmt: skip
    """Learn to predict each scale from the coarser ones; the average's weights end up in `var`.

    Streams give (tokens (B, schedule.total), labels (B,)); `Plan.var_turns` says how many scales of them a step learns.
    """
    schedule = var.config.schedule
    run = Run("var", var.train(), _decay_groups(var, plan.weight_decay), plan, out)
    run.resume()
    streams = [tokens(size, run) for _, size in plan.var_turns]
    attention = BlockCausal(schedule, device)
    predict = torch.compile(var.logits, dynamic=False) if compiled else var.logits
    counts = torch.tensor(schedule.tokens, dtype=torch.float32)
    # between the mean over tokens, which would be all about the finest scales, and the mean over scales
    weights = counts.rsqrt().repeat_interleave(counts.long()).to(device)
    vae.eval().requires_grad_(False)
    for step in run.steps(plan.var_steps, plan.var_lr, seconds):
        turn = step % len(streams)
        wanted, labels = next(streams[turn])
        end = sum(schedule.tokens[: plan.var_turns[turn][0]])
        with torch.no_grad():
            inputs, wanted, weight = vae.inputs(wanted)[:, : end - 1], wanted[:, :end], weights[:end]
        free = torch.rand(len(labels), generator=run.generator) < plan.no_label
        labels = labels.masked_fill(free.to(device), var.config.num_classes)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = predict(labels, inputs, attention)
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(0) @ weight / weight.sum()
        run.update(loss, scales=torch.tensor(float(plan.var_turns[turn][0])))
    var.load_state_dict(run.average.model.state_dict())
    return run
