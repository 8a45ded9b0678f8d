"""Policies by name, for command lines and configuration files."""

from __future__ import annotations

from collections.abc import Callable

from amskv_kernels.policies.base import Policy
from amskv_kernels.policies.calibration import Calibration
from amskv_kernels.policies.heads import HeadOrders, HeatKV
from amskv_kernels.policies.tokens import H2O, Drafters, PyramidKV, Recent, ScaleKV, SnapKV
from amskv_kernels.policies.whole_scale import AMSKV, Full, Sink, SlidingWindow
from amskv_kernels.schedule import ScaleSchedule

SYNTAX = (
    "full | ams-kv:SAVED | ams-kv:SAVED@CALIBRATION.json | sliding:LOCAL | sink:CONDENSED,LOCAL | scalekv:KEPT | "
    "scalekv:KEPT,paper | scalekv:KEPT@ASI.json | snapkv:KEPT | pyramidkv:KEPT | h2o:KEPT | recent:KEPT | "
    "recent:KEPT,FIRST | heatkv:KEPT@ORDERS.json (SAVED = percent of all tokens saved, e.g. ams-kv:75; KEPT = percent "
    "of the tokens before the last scale kept, e.g. scalekv:10)"
)

# Savings AMS-KV (arXiv 2511.16047) reports, in percent of all tokens; `AMSKV.for_saving` finds our settings.
PUBLISHED_SAVINGS = {
    "var-d30": (71.29, 75.0, 78.72, 84.83),
    "var-d36": (71.29, 75.0, 78.72, 84.83),
    "infinity-2b": (35.6, 71.29, 75.0, 78.72, 84.83),
}

Make = Callable[[str, str, ScaleSchedule, int], Policy]


def parse_policy(text: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    """The policy that `text` names, for a model of `num_layers` on `schedule`.

    Raises:
        ValueError: an unknown name or a bad argument; the message gives the syntax.
    """
    name, _, rest = text.partition(":")
    argument, _, path = rest.partition("@")
    make = _MAKERS.get(name)
    # `full` alone has no argument, `heatkv` alone cannot do without a file, and most take none.
    takes_file = name in _WITH_FILE
    if make is None or bool(argument) == (name == "full") or (path and not takes_file):
        raise ValueError(f"policy {text!r} is not known; known: {SYNTAX}")
    try:
        return make(argument, path, schedule, num_layers)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from error


def _amskv(argument: str, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    saved = float(argument) / 100
    if not path:
        return AMSKV.for_saving(schedule, num_layers, saved)
    calibration = Calibration.load(path)
    calibration.check_fits(schedule, num_layers)
    return AMSKV.for_saving(schedule, num_layers, saved, ranking=calibration.ranking)


def _sink(argument: str, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    condensed, _, local = argument.partition(",")
    return Sink(int(condensed), int(local))


def _scalekv(argument: str, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    percent, _, mode = argument.partition(",")
    drafters = None
    if path:
        measured = Drafters.load(path)
        measured.check_fits(schedule, num_layers)
        drafters = measured.layers
    # The dataclass refuses any other mode by name.
    return ScaleKV(_share(percent), mode or "released", drafters)  # type: ignore[arg-type]


def _recent(argument: str, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    percent, _, first = argument.partition(",")
    return Recent(_share(percent), int(first or 0))


def _heatkv(argument: str, path: str, schedule: ScaleSchedule, num_layers: int) -> Policy:
    if not path:
        raise ValueError("HeatKV needs a head order: heatkv:KEPT@ORDERS.json (amskv calibrate --method scas)")
    return HeatKV(_share(argument), HeadOrders.load(path))


def _share(percent: str) -> float:
    share = float(percent) / 100
    if not 0 < share <= 1:
        raise ValueError(f"KEPT is {percent}; it must be above 0 and at most 100 percent")
    return share


_MAKERS: dict[str, Make] = {
    "full": lambda *_: Full(),
    "ams-kv": _amskv,
    "sliding": lambda argument, *_: SlidingWindow(int(argument)),
    "sink": _sink,
    "scalekv": _scalekv,
    "snapkv": lambda argument, *_: SnapKV(_share(argument)),
    "pyramidkv": lambda argument, *_: PyramidKV(_share(argument)),
    "h2o": lambda argument, *_: H2O(_share(argument)),
    "recent": _recent,
    "heatkv": _heatkv,
}
_WITH_FILE = ("ams-kv", "scalekv", "heatkv")
