"""Policies by name, for command lines and configuration files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from amskv_kernels.arguments import instance_of, shown
from amskv_kernels.policies.base import Policy
from amskv_kernels.policies.budgets import Share, Tokens
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.drafters import Drafters
from amskv_kernels.policies.fitted import LeastLoss, Lifetimes
from amskv_kernels.policies.heads import HeadOrders, HeatKV
from amskv_kernels.policies.losses import Losses, check_by, is_losses
from amskv_kernels.policies.tokens import H2O, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.whole_scale import AMSKV, Full, Sink, SlidingWindow
from amskv_kernels.schedule import ScaleSchedule

# Savings AMS-KV (arXiv 2511.16047) reports, in percent of all tokens; `AMSKV.for_saving` finds our settings.
PUBLISHED_SAVINGS = {
    "var-d30": (71.29, 75.0, 78.72, 84.83),
    "var-d36": (71.29, 75.0, 78.72, 84.83),
    "infinity-2b": (35.6, 71.29, 75.0, 78.72, 84.83),
}

# What may stand after @ in place of SAVED or KEPT, followed by = and how much; anything else there is a file.
BUDGETS = ("kept", "saved", "tokens")
MOST_QUOTED = 200  # letters of a policy in an error message


class _Form(NamedTuple):
    """How a policy is written.

    Attributes:
        shown: for people.
        make: the policy of (arguments, path, schedule, num_layers).
        readers: one per argument: from its text to its value.
        optional: how many of the last arguments may be left out.
        takes_file: whether @ and a file may follow.
        takes_budget: whether a budget may stand in place of the first argument.
    """

    shown: str
    make: Callable[[list[Any], str | None, ScaleSchedule, int], Policy]
    readers: tuple[Callable[[str], Any], ...] = ()
    optional: int = 0
    takes_file: bool = False
    takes_budget: bool = False

    def read(self, arguments: str | None, budget: str | None, path: str | None) -> list[Any]:
        """The values of what stands after the colon, of a budget, and of a file; None stands for none of these.

        Raises:
            ValueError: too many or too few arguments, one that cannot be read, a budget beside an argument or where
                none is taken, or a file that is not wanted or named.
        """
        texts = [] if arguments is None else arguments.split(",")
        readers = self.readers
        if budget is not None:
            if not self.takes_budget:
                raise ValueError("this policy takes no budget")
            if texts:
                raise ValueError("the budget is given twice, after the colon and after @")
            texts, readers = budget.split(","), (_budget, *readers[1:])
        counts = range(len(self.readers) - self.optional, len(self.readers) + 1)
        if "" in texts:
            raise ValueError("an argument is empty")
        if len(texts) not in counts:
            raise ValueError(f"the number of arguments is {len(texts)}; it must be {' or '.join(map(str, counts))}")
        if path is not None and not self.takes_file:
            raise ValueError("this policy takes no file")
        if path == "":
            raise ValueError("no file is named after @")
        return [read(text) for read, text in zip(readers, texts, strict=False)]


def parse_policy(text: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    """The policy that `text` names, for a model of `num_layers` on `schedule`.

    Raises:
        TypeError: `text` is no string.
        ValueError: an unknown name, a bad argument or file, or a setting that the model cannot have. The message quotes
            `text`; where that is malformed, it shows the form to write.
    """
    return read_policy(text)(schedule, num_layers)


def read_policy(text: str) -> Callable[[ScaleSchedule, int], Policy]:
    """What makes the policy that `text` names, for a schedule and a number of layers that are not known yet.

    Raises:
        TypeError: `text` is no string.
        ValueError: an unknown name or a bad argument. What else `parse_policy` raises, the result does when called.
    """
    instance_of("policy", text, str)
    before, at, after = text.partition("@")
    name, colon, arguments = before.partition(":")
    quoted = repr(text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}…")
    form = _FORMS.get(name)
    if form is None:
        raise ValueError(f"policy {quoted} is not known; known: {SYNTAX}")
    budget = None
    if at and after.partition("=")[0] in BUDGETS:
        budget, at, after = after.partition("@")
    path = after if at else None
    try:
        values = form.read(arguments if colon else None, budget, path)
    except ValueError as error:
        raise ValueError(f"policy {quoted}: {error}; write {form.shown}") from error

    def make(schedule: ScaleSchedule, num_layers: int) -> Policy:
        try:
            return form.make(values, path, schedule, num_layers)
        except ValueError as error:
            raise ValueError(f"policy {quoted}: {error}") from error

    return make


def _budget(text: str) -> Tokens | Share:
    """What kept=25%, saved=75% or tokens=128 means."""
    key, equals, amount = text.partition("=")
    if not equals or key not in BUDGETS:
        raise ValueError(f"the budget is {shown(text)}; it must be kept=PERCENT%, saved=PERCENT% or tokens=NUMBER")
    if key == "tokens":
        return Tokens(_count(key, 1, amount))
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?%", amount):
        raise ValueError(f"{key} is {shown(amount)}; it must be a percentage with its sign, such as 25%")
    share = float(amount[:-1]) / 100
    return Share(share) if key == "kept" else Share.saving(share)


def _percent(name: str, text: str) -> float:
    """The share that a percentage means."""
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,15})?", text) or not 0 < float(text) <= 100:
        raise ValueError(f"{name} is {shown(text)}; it must be a percentage above 0 and at most 100")
    return float(text) / 100


def _count(name: str, least: int, text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or (len(text) <= 10 and int(text) < least):
        raise ValueError(f"{name} is {shown(text)}; it must be a whole number ≥ {least}")
    if len(text) > 10:  # Python reads no more than 4300
        raise ValueError(f"{name} is {shown(text)}; it must have at most 10 digits")
    return int(text)


def _mode(text: str) -> str:
    if text not in ("released", "paper"):
        raise ValueError(f"the mode is {shown(text)}; it must be 'released' or 'paper'")
    return text


def _amskv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    measured: dict[str, Any] = {}
    if path is not None and is_losses(path):
        measured["losses"] = Losses.load(path)
    elif path is not None:
        calibration = Calibration.load(path)
        calibration.check_fits(schedule, num_layers)
        measured["ranking"] = calibration.ranking
    [saved] = values
    if isinstance(saved, Tokens | Share):
        return AMSKV.for_budget(schedule, num_layers, saved, **measured)
    return AMSKV.for_saving(schedule, num_layers, saved, **measured)


def _scalekv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    policy = ScaleKV(*values)
    if path is None:
        return policy
    measured = Drafters.load(path)
    measured.check_fits(schedule, num_layers)
    return replace(policy, drafters=measured)


def _heatkv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if path is None:
        raise ValueError("HeatKV needs a head order: heatkv:KEPT@ORDERS.json (amskv calibrate --method scas)")
    [kept] = values
    return HeatKV(kept, HeadOrders.load(path))


def _least_loss(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if path is None:
        raise ValueError("LeastLoss needs losses: least-loss:KEPT@LOSSES.json (amskv calibrate --method loss)")
    losses = Losses.load(path)
    losses.check_fits(schedule, num_layers)
    return LeastLoss(values[0], losses, *values[1:])


def _lifetimes(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if path is None:
        raise ValueError("lifetimes stand in a file: lifetimes@POLICY.json (amskv fit)")
    policy = Lifetimes.load(path)
    policy.check_fits(schedule, num_layers)
    return policy


def _by(text: str) -> str:
    check_by(text)
    return text


_KEPT = partial(_percent, "KEPT")
_FORMS = {
    "full": _Form("full", lambda values, *_: Full()),
    "ams-kv": _Form(
        "ams-kv:SAVED | ams-kv:SAVED@CALIBRATION.json", _amskv, (partial(_percent, "SAVED"),), 0, True, True
    ),
    "sliding": _Form("sliding:LOCAL", lambda values, *_: SlidingWindow(*values), (partial(_count, "LOCAL", 1),)),
    "sink": _Form(
        "sink:CONDENSED,LOCAL", lambda values, *_: Sink(*values),
        (partial(_count, "CONDENSED", 1), partial(_count, "LOCAL", 1)),
    ),
    "scalekv": _Form(
        "scalekv:KEPT | scalekv:KEPT,paper | scalekv:KEPT@ASI.json", _scalekv, (_KEPT, _mode), 1, True, True
    ),
    "snapkv": _Form("snapkv:KEPT", lambda values, *_: SnapKV(*values), (_KEPT,), takes_budget=True),
    "pyramidkv": _Form("pyramidkv:KEPT", lambda values, *_: PyramidKV(*values), (_KEPT,), takes_budget=True),
    "h2o": _Form("h2o:KEPT", lambda values, *_: H2O(*values), (_KEPT,), takes_budget=True),
    "recent": _Form(
        "recent:KEPT | recent:KEPT,FIRST", lambda values, *_: Recent(*values), (_KEPT, partial(_count, "FIRST", 0)), 1,
        takes_budget=True,
    ),
    "heatkv": _Form("heatkv:KEPT@ORDERS.json", _heatkv, (_KEPT,), 0, True, True),
    "least-loss": _Form(
        "least-loss:KEPT@LOSSES.json | least-loss:KEPT,head@LOSSES.json", _least_loss, (_KEPT, _by), 1, True, True
    ),
    "lifetimes": _Form("lifetimes@POLICY.json", _lifetimes, takes_file=True),
}  # fmt: skip

SYNTAX = (
    " | ".join(form.shown for form in _FORMS.values())
    + " (SAVED = percent of all tokens saved, e.g. ams-kv:75; KEPT = percent of the tokens before the last scale kept, "
    "e.g. scalekv:10; in place of either, with one meaning for every policy: POLICY@kept=25%, @saved=75%, both of all "
    "tokens, or @tokens=128 per layer and head, e.g. scalekv@kept=25%,paper or ams-kv@saved=75%@calibration.json)"
)
