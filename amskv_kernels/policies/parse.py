"""Policies by name, for command lines and configuration files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from amskv_kernels.arguments import instance_of
from amskv_kernels.policies.base import Policy
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.heads import HeadOrders, HeatKV
from amskv_kernels.policies.tokens import H2O, Drafters, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.whole_scale import AMSKV, Full, Sink, SlidingWindow
from amskv_kernels.schedule import ScaleSchedule

# Savings AMS-KV (arXiv 2511.16047) reports, in percent of all tokens; `AMSKV.for_saving` finds our settings.
PUBLISHED_SAVINGS = {
    "var-d30": (71.29, 75.0, 78.72, 84.83),
    "var-d36": (71.29, 75.0, 78.72, 84.83),
    "infinity-2b": (35.6, 71.29, 75.0, 78.72, 84.83),
}


class _Form(NamedTuple):
    """How a policy is written.

    Attributes:
        shown: for people.
        make: the policy of (arguments, path, schedule, num_layers).
        readers: one per argument: from its text to its value.
        optional: how many of the last arguments may be left out.
        takes_file: whether @ and a file may follow.
    """

    shown: str
    make: Callable[[list[Any], str | None, ScaleSchedule, int], Policy]
    readers: tuple[Callable[[str], Any], ...] = ()
    optional: int = 0
    takes_file: bool = False

    def read(self, arguments: str | None, path: str | None) -> list[Any]:
        """The values of what stands between the colon and @; None stands for no colon, or no @.

        Raises:
            ValueError: too many or too few arguments, one that cannot be read, or a file that is not wanted or named.
        """
        texts = [] if arguments is None else arguments.split(",")
        counts = range(len(self.readers) - self.optional, len(self.readers) + 1)
        if "" in texts:
            raise ValueError("an argument is empty")
        if len(texts) not in counts:
            raise ValueError(f"the number of arguments is {len(texts)}; it must be {' or '.join(map(str, counts))}")
        if path is not None and not self.takes_file:
            raise ValueError("this policy takes no file")
        if path == "":
            raise ValueError("no file is named after @")
        return [read(text) for read, text in zip(self.readers, texts, strict=False)]


def parse_policy(text: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    """The policy that `text` names, for a model of `num_layers` on `schedule`.

    Raises:
        TypeError: `text` is no string.
        ValueError: an unknown name, a bad argument or file, or a setting that the model cannot have. The message quotes
            `text`; where that is malformed, it shows the form to write.
    """
    instance_of("policy", text, str)
    before, at, file = text.partition("@")
    name, colon, arguments = before.partition(":")
    form = _FORMS.get(name)
    if form is None:
        raise ValueError(f"policy {text!r} is not known; known: {SYNTAX}")
    path = file if at else None
    try:
        values = form.read(arguments if colon else None, path)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}; write {form.shown}") from error
    try:
        return form.make(values, path, schedule, num_layers)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error


def _percent(name: str, text: str) -> float:
    """The share that a percentage means."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not 0 < float(text) <= 100:
        raise ValueError(f"{name} is {text!r}; it must be a percentage above 0 and at most 100")
    return float(text) / 100


def _count(name: str, least: int, text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < least:
        raise ValueError(f"{name} is {text!r}; it must be a whole number ≥ {least}")
    return int(text)


def _mode(text: str) -> str:
    if text not in ("released", "paper"):
        raise ValueError(f"the mode is {text!r}; it must be 'released' or 'paper'")
    return text


def _amskv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    [saved] = values
    if path is None:
        return AMSKV.for_saving(schedule, num_layers, saved)
    calibration = Calibration.load(path)
    calibration.check_fits(schedule, num_layers)
    return AMSKV.for_saving(schedule, num_layers, saved, ranking=calibration.ranking)


def _scalekv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    policy = ScaleKV(*values)
    if path is None:
        return policy
    measured = Drafters.load(path)
    measured.check_fits(schedule, num_layers)
    return replace(policy, drafters=measured.layers)


def _heatkv(values: list[Any], path: str | None, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if path is None:
        raise ValueError("HeatKV needs a head order: heatkv:KEPT@ORDERS.json (amskv calibrate --method scas)")
    [kept] = values
    return HeatKV(kept, HeadOrders.load(path))


_KEPT = partial(_percent, "KEPT")
_FORMS = {
    "full": _Form("full", lambda values, *_: Full()),
    "ams-kv": _Form(
        "ams-kv:SAVED | ams-kv:SAVED@CALIBRATION.json", _amskv, (partial(_percent, "SAVED"),), takes_file=True
    ),
    "sliding": _Form("sliding:LOCAL", lambda values, *_: SlidingWindow(*values), (partial(_count, "LOCAL", 1),)),
    "sink": _Form(
        "sink:CONDENSED,LOCAL", lambda values, *_: Sink(*values),
        (partial(_count, "CONDENSED", 1), partial(_count, "LOCAL", 1)),
    ),
    "scalekv": _Form(
        "scalekv:KEPT | scalekv:KEPT,paper | scalekv:KEPT@ASI.json", _scalekv, (_KEPT, _mode), 1, takes_file=True
    ),
    "snapkv": _Form("snapkv:KEPT", lambda values, *_: SnapKV(*values), (_KEPT,)),
    "pyramidkv": _Form("pyramidkv:KEPT", lambda values, *_: PyramidKV(*values), (_KEPT,)),
    "h2o": _Form("h2o:KEPT", lambda values, *_: H2O(*values), (_KEPT,)),
    "recent": _Form(
        "recent:KEPT | recent:KEPT,FIRST", lambda values, *_: Recent(*values), (_KEPT, partial(_count, "FIRST", 0)), 1
    ),
    "heatkv": _Form("heatkv:KEPT@ORDERS.json", _heatkv, (_KEPT,), takes_file=True),
}  # fmt: skip

SYNTAX = (
    " | ".join(form.shown for form in _FORMS.values())
    + " (SAVED = percent of all tokens saved, e.g. ams-kv:75; KEPT = percent of the tokens before the last scale kept, "
    "e.g. scalekv:10)"
)
