"""What every cache policy is: a pure function from (schedule, layer, step) to the scales still held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from amskv_kernels.schedule import ScaleSchedule


class Policy(ABC):
    """Decides which earlier scales a layer reads at each step.

    A policy knows nothing of pages, tensors or devices. A scale that a layer has once dropped never
    returns: `CachePlan` refuses a policy that asks for one back.
    """

    @abstractmethod
    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        """Earlier scales (0-based, ascending, all < step) that `layer` reads at `step`."""

    def check_layers(self, num_layers: int) -> None:  # noqa: B027 - most policies treat all layers alike
        """Raise ValueError when the policy names a layer that a model of `num_layers` does not have."""


def whole_number(name: str, value: object, least: int) -> int:
    """`value` as an int, or a ValueError naming the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ {least}")
    return value


def layer_set(name: str, layers: object) -> tuple[int, ...]:
    """`layers` as an ascending tuple of distinct layer numbers, or a ValueError naming the argument."""
    if not isinstance(layers, Iterable):
        raise ValueError(f"{name} is {layers!r}; it must be a sequence of layer numbers")
    numbers = tuple(layers)
    for number in numbers:
        whole_number(f"each of {name}", number, 0)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} is {numbers!r}; no layer may stand in it twice")
    return tuple(sorted(numbers))


def check_layers_exist(name: str, layers: tuple[int, ...], num_layers: int) -> None:
    """ValueError when one of `layers` is not below `num_layers`."""
    beyond = [layer for layer in layers if layer >= num_layers]
    if beyond:
        raise ValueError(f"{name} names layer {beyond[0]}; this model has layers 0 … {num_layers - 1}")
