"""State dicts that must fit: a module that names what does not, before anything of it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_NAMED_KEYS = 4  # how many offending keys an error message spells out


def _some(keys: list[str]) -> str:
    more = f", … ({len(keys)} in all)" if len(keys) > _NAMED_KEYS else ""
    return ", ".join(keys[:_NAMED_KEYS]) + more


class CheckedModule(nn.Module):
    """A module whose strict load compares names, shapes and dtypes first: a wrong checkpoint changes nothing."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy `state_dict` into the module; arguments as in `torch.nn.Module.load_state_dict`.

        Raises:
            ValueError: `strict`, and a key is missing, unknown, of the wrong shape, or of integers where real numbers
                belong, which would be cut off. Nothing was modified.
        """
        if strict:
            own = self.state_dict()
            missing = [key for key in own if key not in state_dict]
            unknown = [key for key in state_dict if key not in own]
            wrong = [
                f"{key} is {tuple(state_dict[key].shape)} and must be {tuple(value.shape)}"
                for key, value in own.items()
                if key in state_dict and state_dict[key].shape != value.shape
            ]
            other = [
                f"{key} is {state_dict[key].dtype} and must be {value.dtype}"
                for key, value in own.items()
                if key in state_dict and state_dict[key].is_floating_point() != value.is_floating_point()
            ]
            faults = [("missing", missing), ("unknown", unknown), ("wrong shape", wrong), ("wrong dtype", other)]
            if missing or unknown or wrong or other:
                told = "; ".join(f"{what}: {_some(keys)}" for what, keys in faults if keys)
                raise ValueError(f"state_dict does not fit this {type(self).__name__}: {told}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
