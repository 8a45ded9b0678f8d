"""Policies by name, for command lines and configuration files."""

from __future__ import annotations

from amskv_kernels.policies.base import Policy
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.whole_scale import AMSKV, Full, Sink, SlidingWindow
from amskv_kernels.schedule import ScaleSchedule

SYNTAX = (
    "full | ams-kv:PERCENT | ams-kv:PERCENT@CALIBRATION.json | sliding:LOCAL | sink:CONDENSED,LOCAL "
    "(PERCENT = share of all tokens saved, e.g. ams-kv:75)"
)

# Savings AMS-KV (arXiv 2511.16047) reports, in percent of all tokens; `AMSKV.for_saving` finds our settings.
PUBLISHED_SAVINGS = {
    "var-d30": (71.29, 75.0, 78.72, 84.83),
    "var-d36": (71.29, 75.0, 78.72, 84.83),
    "infinity-2b": (35.6, 71.29, 75.0, 78.72, 84.83),
}


def parse_policy(text: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    """The policy that `text` names, for a model of `num_layers` on `schedule`.

    Raises:
        ValueError: an unknown name or a bad argument; the message gives the syntax.
    """
    name, _, argument = text.partition(":")
    try:
        if name == "full" and not argument:
            return Full()
        if name == "ams-kv" and argument:
            percent, _, path = argument.partition("@")
            return _amskv(float(percent) / 100, path, schedule, num_layers)
        if name == "sliding" and argument:
            return SlidingWindow(int(argument))
        if name == "sink" and argument:
            condensed, _, local = argument.partition(",")
            return Sink(int(condensed), int(local))
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error
    raise ValueError(f"policy {text!r} is not known; known: {SYNTAX}")


def _amskv(saved: float, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if not path:
        return AMSKV.for_saving(schedule, num_layers, saved)
    calibration = Calibration.load(path)
    calibration.check_fits(schedule, num_layers)
    return AMSKV.for_saving(schedule, num_layers, saved, ranking=calibration.ranking)
