"""What every cache policy is: a pure function of (schedule, layer, head, step) that says what is still held.

Three kinds: a `Policy` keeps whole scales, the same for every head of a layer; a `HeadPolicy` whole scales, head by
head; a `TokenPolicy` a number of tokens, which it says how to choose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from amskv_kernels.arguments import real_number, shown, whole_number
from amskv_kernels.files import check_fits
from amskv_kernels.schedule import MOST_TOKENS, ScaleSchedule

Observers = Literal["grid", "last", "all", "none"]
Layers = tuple[int, ...]

MOST_LAYERS = 2**16  # beyond every model, and few enough to list
MOST_KERNEL = 2**20 - 1  # keys that a score may be pooled over


@dataclass(frozen=True)
class MadeFor:
    """The model that a policy's settings were found for."""

    schedule: ScaleSchedule
    num_layers: int

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError where the depth is another one."""
        if num_layers != self.num_layers:
            raise ValueError(f"the policy was made for {self.num_layers} layers; this model has {num_layers}")

    def check(self, schedule: ScaleSchedule, num_layers: int) -> None:
        """Raise ValueError where it is another one."""
        self.check_layers(num_layers)
        if schedule != self.schedule:
            check_fits("the policy", self.schedule.sizes, self.num_layers, schedule, num_layers)
            raise ValueError(f"the policy was made for schedule {self.schedule.name}, with frames; this one has none")


class Policy(ABC):
    """Decides which earlier scales a layer reads at each step.

    A policy knows nothing of pages, tensors or devices. A scale that a layer has once dropped never
    returns: `CachePlan` refuses a policy that asks for one back.
    """

    @abstractmethod
    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        """Earlier scales (0-based, ascending, all < step) that `layer` reads at `step`."""

    def check_layers(self, num_layers: int) -> None:  # noqa: B027 - most policies treat all layers alike
        """Raise ValueError when the policy was made for another depth, or names a layer that a model of `num_layers`
        does not have."""

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        """Raise ValueError when the policy was made for another schedule or depth; called before it is planned."""
        self.check_layers(num_layers)


class HeadPolicy(Policy):
    """Decides which earlier scales each KV head of a layer reads."""

    @property
    def alike(self) -> bool:
        """Whether all heads of a layer read the same; they are then planned as one."""
        return False

    @abstractmethod
    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        """Earlier scales (0-based, ascending, all < step) that KV head `head` of `layer` reads at `step`."""

    @abstractmethod
    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        """Raise ValueError when the policy was made for other heads, layers or scales."""

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        """Every earlier scale: some head may read it."""
        return tuple(range(step))


def check_ranks(policy: Policy, ranks: int) -> None:
    """Raise ValueError where a policy tells heads apart that are dealt to several processes."""
    if ranks > 1 and isinstance(policy, HeadPolicy):
        raise ValueError(
            f"policy is a {type(policy).__name__}, which tells heads apart; the model's are on {ranks} processes, "
            "which plan alike: a policy of whole scales or of tokens can be used"
        )


@dataclass(frozen=True)
class Selection:
    """How tokens are chosen among those held and the current map's: by whose attention, and which always stay.

    The keys of a layer stand in one row: tokens held, oldest first, then the current map's. A key's score is the
    attention that the observers, queries of the current map, pay to it.

    Attributes:
        observers: "grid": the centre token of each patch of a 4 × 4 grid over the map; "last": the map's last `window`
            tokens; "all": every token; "none": nothing is scored.
        window: how many observers "last" has.
        score: "softmax" adds up attention probabilities, "sum_logits" the logits before the softmax.
        raw_queries: observe with the query projection alone, without bias, norm, scale and rotation.
        pool: smooths the scores along the row of keys with a window of `kernel`.
        kernel: odd.
        accumulate: a key's scores of all steps are added up, not only the current one's.
        recent: share of the kept tokens that are the most recent ones, whatever their score; of "none" all are.
        first: this many of the first tokens always stay.

    The observers of "grid" and "last" always stay themselves, and are not scored.

    Raises:
        TypeError: `recent` is no number.
        ValueError: a field out of range, or `accumulate` where not every query observes.
    """

    observers: Observers
    window: int = 16
    score: Literal["softmax", "sum_logits"] = "softmax"
    raw_queries: bool = False
    pool: Literal["max", "mean"] | None = None
    kernel: int = 5
    accumulate: bool = False
    recent: float = 0.0
    first: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("observers", ("grid", "last", "all", "none")), ("score", ("softmax", "sum_logits")),
            ("pool", (None, "max", "mean")), ("raw_queries", (False, True)), ("accumulate", (False, True)),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, str | bool | None) or value not in choices:
                raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}")
        whole_number("window", self.window, 1, MOST_TOKENS)
        if whole_number("kernel", self.kernel, 1, MOST_KERNEL) % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; it must be odd, so that a window has a middle")
        if not 0 <= real_number("recent", self.recent) <= 1:
            raise ValueError(f"recent is {shown(self.recent)}; it must be within 0 … 1, a share of the kept tokens")
        whole_number("first", self.first, 0, MOST_TOKENS)
        if self.accumulate and (self.observers != "all" or self.raw_queries):
            raise ValueError("accumulate adds up what every query pays: observers must be 'all', raw_queries False")
        if self.observers == "none" and self.recent:
            raise ValueError(
                "recent is not 0 where nothing is scored: all that is kept beside the first tokens is recent"
            )

    def observing(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Positions of the observers in a map of `size` (h, w); a map with fewer tokens observes with all of them."""
        h, w = size
        if self.observers == "last":
            return tuple(range(max(0, h * w - self.window), h * w))
        if self.observers == "grid":
            rows, columns = _centres(h), _centres(w)
            return tuple(row * w + column for row in rows for column in columns)
        return tuple(range(h * w)) if self.observers == "all" else ()

    def always_kept(self, size: tuple[int, int], held: int, kept: int) -> tuple[int, ...]:
        """Keys that stay whatever their score, ascending, where `held` + h·w keys shrink to `kept`.

        Raises:
            ValueError: `kept` has no room for them.
        """
        total = held + size[0] * size[1]
        recent = max(0, kept - self.first) if self.observers == "none" else round(self.recent * kept)
        observing = self.observing(size) if self.observers in ("grid", "last") else ()
        if max(self.first, len(observing)) <= kept:
            last = range(total - recent, total)
            always = tuple(sorted({*range(min(self.first, total)), *last, *(held + i for i in observing)}))
            if len(always) <= kept:
                return always
        raise ValueError(f"a budget of {kept} tokens cannot hold the tokens that are always kept")


class TokenPolicy(Policy):
    """Decides how many tokens each layer's heads hold at each step, and how they are chosen."""

    @property
    @abstractmethod
    def selection(self) -> Selection:
        """How the tokens are chosen."""

    @abstractmethod
    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """(K, L) tokens that every head of a layer reads at each step, the current map's not counted.

        From one step to the next a layer gains at most the step's own tokens; whatever it does not gain, it drops.

        Raises:
            ValueError: a budget without room for what must be kept.
        """

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        """Every earlier scale: some of its tokens may be held."""
        return tuple(range(step))


def _centres(side: int, patches: int = 4) -> tuple[int, ...]:
    """The middle of each of `patches` equal parts of a side; of every token where there are fewer."""
    count = min(patches, side)
    part = side // count
    return tuple(i * part + (part - 1) // 2 for i in range(count))


def set_fields(frozen: object, **fields: object) -> None:
    """Give a frozen dataclass its checked fields, from its own `__post_init__`."""
    for name, value in fields.items():
        object.__setattr__(frozen, name, value)


def layer_numbers(name: str, layers: object) -> Layers:
    """`layers` as a tuple of layer numbers, in their order, or a ValueError naming the argument."""
    if not isinstance(layers, Iterable) or isinstance(layers, str | bytes):
        raise ValueError(f"{name} is {shown(layers)}; it must be a sequence of layer numbers")
    return tuple(whole_number(f"each of {name}", number, 0) for number in islice(layers, MOST_LAYERS))


def layer_set(name: str, layers: object) -> Layers:
    """`layers` as an ascending tuple of distinct layer numbers, or a ValueError naming the argument."""
    numbers = layer_numbers(name, layers)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} is {shown(numbers)}; no layer may stand in it twice")
    return tuple(sorted(numbers))


def check_layers_exist(name: str, layers: Layers, num_layers: int) -> None:
    """ValueError when one of `layers` is not below `num_layers`."""
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise ValueError(f"{name} names layer {shown(beyond[0])}; this model has layers 0 … {num_layers - 1}")
