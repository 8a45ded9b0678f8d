"""Who takes part in the shoot-out: what is measured of the model, and every policy at every share of stock's bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from amskv_kernels import AMSKV, Policy, ScaleSchedule
from amskv_kernels.calibrate import AttentionRecorder, LossRecorder
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache
from amskv_kernels.policies import (
    H2O,
    Drafters,
    HeadOrders,
    HeatKV,
    LeastLoss,
    Losses,
    PyramidKV,
    Recent,
    ScaleKV,
    Selection,
    SnapKV,
    TokenPolicy,
)
from examples.subjects import Subject

SHARES = (0.50, 0.25, 0.15, 0.10)  # of the tokens, and here of the bytes too, that stock keeps
SINKS = 5  # tokens of the first two scales, as many as AMS-KV condenses
MEASURED = 20  # images to calibrate with, of seeds that nothing is compared on
FITTED = ("LeastLoss", "LeastLoss, heads")
WINDOWS = ("window of scales", "sliding window", "sink")
RIVALS = (*WINDOWS, "H2O", "HeatKV", "ScaleKV", "ScaleKV, paper", "SnapKV", "PyramidKV")
ABLATION = ("AMS-KV by layer order", "AMS-KV at random")  # how demanding layers are chosen; calibrated: by similarity


@dataclass(frozen=True)
class TokenForm(TokenPolicy):
    """As many tokens a layer as LeastLoss gives it in whole scales, chosen among all it holds as H2O chooses."""

    fitted: LeastLoss

    @property
    def selection(self) -> Selection:
        return H2O().selection

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        fitted, layers = self.fitted, range(num_layers)
        kept = [[fitted.visible(schedule, layer, step) for layer in layers] for step in range(len(schedule))]
        return tuple(tuple(sum(schedule.tokens[s] for s in seen) for seen in row) for row in kept)


class Measured(NamedTuple):
    """What policies want to know of the model."""

    losses: Losses
    orders: HeadOrders
    drafters: Drafters


def measure(subject: Subject, var: VAR, vae: VQVAE, device: torch.device) -> Measured:
    """All of it from one batch of images."""
    schedule, layers = var.config.schedule, var.config.depth
    losses = LossRecorder(schedule, layers, ConcatKVCache())
    attention = AttentionRecorder(schedule, layers, losses, half="both")  # as the committed figures were measured
    labels = subject.labels(MEASURED).to(device)
    var.generate(vae, labels, attention, generator=torch.Generator(device).manual_seed(7), **subject.sampling)
    return Measured(losses.losses(subject.name), attention.orders(), attention.drafters())


def contestants(schedule: ScaleSchedule, layers: int, measured: Measured) -> dict[tuple[str, float], Policy]:
    """Every policy at every share."""
    found: dict[tuple[str, float], Policy] = {}
    losses = measured.losses
    for share in SHARES:
        tokens = round(share * schedule.total)
        calibrated = AMSKV.for_budget(schedule, layers, tokens, losses=losses)
        fitted = LeastLoss(tokens, losses)
        found |= {
            ("LeastLoss", share): fitted,
            ("LeastLoss, heads", share): LeastLoss(tokens, losses, "head"),
            ("LeastLoss, tokens", share): TokenForm(fitted),
            ("AMS-KV", share): AMSKV.for_budget(schedule, layers, tokens),
            ("AMS-KV, calibrated", share): calibrated,
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
        # The same capacities, with as many demanding layers chosen otherwise.
        orders = (range(layers), random.Random(0).sample(range(layers), layers))
        for name, order in zip(ABLATION, orders, strict=True):
            demanding = tuple(sorted(order[: len(calibrated.demanding_layers)]))
            found[name, share] = replace(calibrated, demanding_layers=demanding)
    return found
