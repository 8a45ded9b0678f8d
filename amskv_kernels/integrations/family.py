"""What `patch` knows of a public class: how a model of it is told, and what its self-attention must look like."""

from __future__ import annotations

from typing import Any, NamedTuple

from amskv_kernels.integrations.common import Patch
from amskv_kernels.integrations.modules import (
    missing_of,
    parameters_of,
    require,
    require_signature,
    unwrapped,
)
from amskv_kernels.planning.layout import row_size


class Family(NamedTuple):
    """One public class.

    Attributes:
        name: of the family, as errors say it.
        needs: attributes of a model.
        layers: the one that holds its layers, in the order in which they are called.
        attention: attribute of a layer that is its self-attention.
        attributes: of that self-attention.
        takes: parameters of its forward, in their order.
        patch: takes it over.
    """

    name: str
    needs: tuple[str, ...]
    layers: str
    attention: str
    attributes: tuple[str, ...]
    takes: tuple[str, ...]
    patch: type[Patch]

    def like(self, model: Any) -> bool:
        """Whether the model itself, its attention aside, looks like one of the family."""
        return all(hasattr(model, name) for name in self.needs)

    def differences(self, model: Any) -> int:
        """In how many names the first self-attention differs from the public class's."""
        attentions = self._attentions(model)
        if not attentions:
            return 0
        first = attentions[0]
        lacks = missing_of(first, (*self.attributes, "kv_caching"))
        return len(lacks) + len(set(parameters_of(first, "forward")) ^ set(self.takes))

    def modules(self, model: Any) -> list[Any]:
        """The self-attention of every layer.

        Raises:
            TypeError: one is not laid out or called like the public class's, or there is none.
            ValueError: a head size that is not supported.
        """
        require(model, "model", self.needs, self.name)
        modules = self._attentions(model)
        for number, module in enumerate(modules):
            name = f"model.{self.layers}[{number}].{self.attention}"
            require(module, name, (*self.attributes, "kv_caching"), self.name)
            require_signature(module, name, "forward", self.takes, self.name)
            require_signature(module, name, "kv_caching", ("enable",), self.name)
            row_size(f"{name}.head_dim", module.head_dim)
        if not modules:
            raise TypeError(f"model.{self.layers} is empty; a model to patch has at least one layer")
        return modules

    def _attentions(self, model: Any) -> list[Any]:
        layers = (unwrapped(layer) for layer in getattr(model, self.layers))
        return [unwrapped(getattr(layer, self.attention, None)) for layer in layers]
