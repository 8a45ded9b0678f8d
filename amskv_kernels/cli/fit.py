"""`amskv fit`: which policy should I use? Measures a model, fits policies to a memory, draws with them, and says."""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import command, memory, output_folder, whole
from amskv_kernels.cli.comparing import compare, contact_sheet, table
from amskv_kernels.cli.subjects import add_model, add_pages, subject_of
from amskv_kernels.planning.memory import MIB

if TYPE_CHECKING:
    from amskv_kernels.cli.drawing import Subject
    from amskv_kernels.policies import Losses, Policy
    from amskv_kernels.policies.budgets import Budget

SHOWN_MEMORY = 8 * 2**30  # bytes that "images that fit" are counted in where no memory is given
TRIES = 12  # at a budget whose pool, in whole pages, fits the memory
EPILOG = """\
for example:
  amskv fit --kept 25    # of the digits that a clone has
  amskv fit --var var_d16.pth --vae vae_ch160v4096z32.pth --memory 8GiB --images 64

writes to --out: losses.json (what was measured), policy.json (what was fitted: --policy lifetimes@policy.json, which
needs neither the losses nor scipy), contact-sheet.png (the same images under every row of the table)

next: give the policy to your model, amskv_kernels.integrations.patch(model, "lifetimes@fit-out/policy.json")
"""


def percent(text: str) -> float:
    """The share that a percentage means."""
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%?", text) or not 0 < float(text.rstrip("%")) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; it must be above 0 and below 100")
    return float(text.rstrip("%")) / 100


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    fit = command(commands, "fit", "which policy should I use? measure, fit to a memory, draw, compare", EPILOG)
    add_model(fit)
    add_pages(fit)
    fit.add_argument("--memory", type=memory, help="for the caches of all images at once, such as 8GiB")
    fit.add_argument("--images", type=whole(1), help="images at once that --memory must hold")
    fit.add_argument("--saved", type=percent, help="in place of both: percent of all tokens saved, as AMS-KV counts")
    fit.add_argument("--kept", type=percent, help="in place of both: percent of all tokens kept")
    fit.add_argument("--protected", type=whole(0), default=0, help="first scales never dropped (default 0)")
    fit.add_argument("--measure", type=whole(1), default=16, help="images to measure (default 16)")
    fit.add_argument("--losses", metavar="FILE", help="measured before: a losses.json of this model")
    fit.add_argument("--draw", type=whole(1), default=8, help="images to compare (default 8)")
    fit.add_argument("--out", type=output_folder, default=Path("fit-out"), help="folder to write to (default fit-out)")
    fit.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, fit, draw, compare, write."""
    from amskv_kernels.policies import LeastLoss

    _check(arguments)
    subject = subject_of(arguments)
    losses = _losses(arguments, subject)
    budget = _budget(arguments, subject, losses)
    arguments.out.mkdir(parents=True, exist_ok=True)
    policies = _policies(arguments, subject, losses, budget)
    rows = list(compare(subject, policies, arguments.draw, arguments.seed))
    print(table(rows, arguments.memory or SHOWN_MEMORY))
    best = max((row for row in rows if isinstance(row.policy, LeastLoss)), key=lambda row: row.psnr)
    assert isinstance(best.policy, LeastLoss)
    best.policy.lifetimes().save(arguments.out / "policy.json")
    fit = best.policy.fit
    print(f"\nfitted    {best.name}: expected loss {fit.loss:.4g}, at most {fit.gap:.1%} above the least possible")
    print(f"written   {arguments.out / 'policy.json'}  --policy lifetimes@{arguments.out / 'policy.json'}")
    if contact_sheet({row.name: row.drawn.images for row in rows}, arguments.out / "contact-sheet.png"):
        print(f"pictures  {arguments.out / 'contact-sheet.png'}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for arguments that do not go together."""
    files = (arguments.var is not None, arguments.vae is not None)
    if any(files) and (not all(files) or arguments.stack is not None):
        raise ValueError("give --var and --vae, or --stack, or none of them for the digits of a clone")
    ways = (arguments.memory is not None and arguments.images is not None, arguments.saved, arguments.kept)
    if sum(bool(way) for way in ways) != 1 or (arguments.images is not None and not ways[0]):
        raise ValueError("give --memory with --images, or --saved, or --kept: what the caches may take")


def _losses(arguments: argparse.Namespace, subject: Subject) -> Losses:
    """Measured before, or now, a few images at a time."""
    from tqdm import tqdm

    from amskv_kernels.calibrate import LossRecorder
    from amskv_kernels.policies import Losses

    shape = subject.shape
    if arguments.losses is not None:
        losses = Losses.load(arguments.losses)
        losses.check_fits(shape.schedule, shape.layers, shape.kv_heads)
        return losses
    recorder = LossRecorder(shape.schedule, shape.layers)
    with tqdm(total=arguments.measure, unit="image", desc="measuring", disable=None) as bar:
        for first in range(0, arguments.measure, 4):
            count = min(4, arguments.measure - first)
            # Other seeds than those the comparison draws with.
            subject.watch(recorder, count, arguments.seed + 1 + first)
            bar.update(count)
    losses = recorder.losses(shape.name)
    losses.save(arguments.out / "losses.json")
    return losses


def _budget(arguments: argparse.Namespace, subject: Subject, losses: Losses) -> Budget:
    """What the user's memory or percentage means: the most tokens whose pool fits.

    Raises:
        ValueError: the memory holds no image.
    """
    from amskv_kernels.policies import Full, LeastLoss, Share, Tokens

    if arguments.images is None:
        return Share(1 - arguments.saved if arguments.saved is not None else arguments.kept)
    shape, allowed = subject.shape, arguments.memory / arguments.images
    if subject.image_bytes(subject.plan(Full())) <= allowed:
        return Tokens(shape.schedule.prefix)
    token = 2 * shape.layers * shape.kv_heads * 2 * subject.row_bytes
    least = token * max(1, sum(shape.schedule.tokens[: arguments.protected]))
    count = float(allowed / token)
    for _ in range(TRIES):
        if count < least / token:
            break
        taken = subject.image_bytes(subject.plan(LeastLoss(Tokens(int(count)), losses, "layer", arguments.protected)))
        if taken <= allowed:
            return Tokens(int(count))
        count = min(count - 1, count * allowed / taken)
    raise ValueError(
        f"--memory is {allowed / MIB:.2f} MiB for each of {arguments.images} images; one image needs at least "
        f"{least / MIB:.2f} MiB, and pages rounded up"
    )


def _policies(arguments: argparse.Namespace, subject: Subject, losses: Losses, budget: Budget) -> dict[str, Policy]:
    """The full cache and the policies that fit."""
    from amskv_kernels.policies import AMSKV, Full, LeastLoss

    shape = subject.shape
    policies: dict[str, Policy] = {"full": Full()}
    for by in ("layer", "head"):
        policies[f"least loss, by {by}"] = fitted = LeastLoss(budget, losses, by, arguments.protected)
        _ = fitted.fit  # a budget that is too small is told before anything is drawn
    with suppress(ValueError):  # too small for its condensed scales
        condensed = arguments.protected or None  # what loses least
        policies["AMS-KV"] = AMSKV.for_budget(shape.schedule, shape.layers, budget, None, condensed, losses)
    return policies
