"""Arguments named when they are wrong: what it was, and what it must be."""

from __future__ import annotations

import math
import operator
import reprlib
from numbers import Real
from typing import SupportsIndex

import torch


def shown(value: object) -> str:
    """`value` as an error message shows it: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes out no integer of over 4300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int, NumPy's too, or a ValueError naming the argument."""
    number = _integer(value)
    if number is None or number < least:
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number ≥ {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {shown(value)}; it must be at most {most}")
    return number


def real_number(name: str, value: object) -> float:
    """`value` as a float, NumPy's too, or an error naming the argument.

    Raises:
        TypeError: it is no number.
        ValueError: it is beyond what a float can be.
    """
    if type(value) is float:  # the usual one; an abstract class asks around
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}; it must be a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is {shown(value)}; it must be a number that a float can hold") from error


def threshold(name: str, value: object) -> float:
    """`value` as a float to compare similarities with.

    Raises:
        TypeError: it is no number.
        ValueError: it is nan, or beyond what a float can be.
    """
    number = real_number(name, value)
    if math.isnan(number):
        raise ValueError(f"{name} is nan; it must be a similarity to compare with")
    return number


def one_of(name: str, value: object, choices: tuple[int, ...]) -> None:
    """Raise ValueError where `value` is not one of the whole numbers `choices`."""
    if _integer(value) not in choices:
        raise ValueError(f"{name} is {shown(value)}; it must be one of {choices}")


def _integer(value: object) -> int | None:
    """None for what is no integer; True is none either."""
    return None if isinstance(value, bool) or not isinstance(value, SupportsIndex) else operator.index(value)


def instance_of(name: str, value: object, kind: type) -> None:
    """Raise TypeError where `value` is of another type than `kind`."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} is {shown(value)}; it must be {article} {kind.__name__}")


def check_device(name: str, device: torch.device | str) -> None:
    """Raise ValueError where this torch cannot make tensors on a device that it knows by name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} is {shown(str(device))}; this torch cannot use it: {reason}") from error


def check_index(name: str, value: object, count: int) -> None:
    """Raise IndexError where `value` is not within 0 … count − 1: Python would count −1 from the end.

    Raises:
        TypeError: it is no whole number.
        IndexError: it is out of range.
    """
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name} is {shown(value)}; it must be a whole number")
    if not 0 <= number < count:
        raise IndexError(f"{name} is {shown(value)}; it must be within 0 … {count - 1}")
