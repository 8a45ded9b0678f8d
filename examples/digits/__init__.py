"""A small class-conditional VAR of handwritten digits: trained here, shipped with its weights."""

from examples.digits.data import classifier
from examples.digits.model import SAMPLING, load

__all__ = ["SAMPLING", "classifier", "load"]
