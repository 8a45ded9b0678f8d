"""The attention shapes of the published models, enough to plan their caches without loading them."""

from __future__ import annotations

from dataclasses import dataclass

from amskv_kernels.arguments import shown
from amskv_kernels.schedule import ScaleSchedule


@dataclass(frozen=True)
class ModelShape:
    """Layers L, query heads H, KV heads, head size D and the schedule of one model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    schedule: ScaleSchedule

    @classmethod
    def named(cls, name: str, schedule: str | None = None) -> ModelShape:
        """A published model's shape, optionally with another published schedule.

        Raises:
            ValueError: no model, or no schedule, of that name.
        """
        if name not in _MODELS:
            raise ValueError(f"model {shown(name)} is not known; known: {', '.join(_MODELS)}")
        layers, heads, head_dim, default = _MODELS[name]
        return cls(name, layers, heads, heads, head_dim, ScaleSchedule.named(schedule or default))

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of all known models."""
        return tuple(_MODELS)


# name: (layers, heads, head_dim, schedule)
_MODELS = {
    "var-d16": (16, 16, 64, "var-256"),
    "var-d20": (20, 20, 64, "var-256"),
    "var-d24": (24, 24, 64, "var-256"),
    "var-d30": (30, 30, 64, "var-256"),
    "var-d36": (36, 36, 64, "var-512"),
    "infinity-2b": (32, 16, 128, "infinity-1m-1.000"),
    "infinity-8b": (40, 28, 128, "infinity-1m-1.000"),
    "infinity-layer32": (32, 20, 104, "infinity-1m-1.000"),
    "infinity-layer40": (40, 24, 112, "infinity-1m-1.000"),
    "infinity-layer48": (48, 28, 120, "infinity-1m-1.000"),
}
