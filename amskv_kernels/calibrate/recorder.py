"""What all recorders share: whose turn it is, and what counts as a generation seen to its end."""

from __future__ import annotations

from torch import Tensor

from amskv_kernels.arguments import instance_of, whole_number
from amskv_kernels.models.attention import Attention
from amskv_kernels.schedule import ScaleSchedule


class Recorder:
    """Watches the attention of every layer and scale go by, over any number of whole generations.

    Stands before another attention object (`attend`), or only listens (`observe`).

    Sequences may leave during a generation, as where guidance ends: the first ones stay.

    Args:
        schedule: the model's schedule, of its maps.
        num_layers: L.
        inner: where calls go on to; not needed to `observe`.
        prefix: tokens that come in a step of their own before the first map, as HART's prompt or the image that
            VAREdit edits; attended to, and no scale of the measurement.

    Raises:
        TypeError: a schedule of another type.
        ValueError: no layer, or a prefix below 0.
    """

    keeps_fp32_keys = False

    def __init__(
        self, schedule: ScaleSchedule, num_layers: int, inner: Attention | None = None, prefix: int = 0
    ) -> None:  # fmt: skip
        instance_of("schedule", schedule, ScaleSchedule)
        self.schedule, self.num_layers, self.inner = schedule, whole_number("num_layers", num_layers, 1), inner
        self.prefix = whole_number("prefix", prefix, 0)
        self.images = 0
        self._batch = 0  # sequences that the running generation began with
        self._sequences = 0
        self._calls = 0

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
        """Take q (B, n, H, D), k and v (B, n, Hkv, D) of the next call; layers come in order, step by step.

        Raises:
            TypeError: q, k or v is no tensor.
            ValueError: a call out of order, or tensors of other shapes.
        """
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """`observe`, then what the inner attention gives."""
        if self.inner is None:
            raise ValueError("this recorder has no inner attention; give it one to attend through it")
        self.observe(layer, q, k, v, softmax_scale)
        return self.inner.attend(layer, q, k, v, softmax_scale)

    def _turn(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> int:
        """The step of a call, whose arguments are those of `observe`, −1 of the prefix; nothing is recorded yet."""
        step, expected = divmod(self._calls, self.num_layers)
        step += self._first_step
        if whole_number("layer", layer, 0) != expected:
            raise ValueError(f"layer is {layer}; the next call is layer {expected} of step {step}")
        tokens = self.prefix if step < 0 else self.schedule.tokens[step]
        for name, tensor, like in (("q", q, q), ("k", k, q), ("v", v, k)):
            instance_of(name, tensor, Tensor)
            if tensor.dim() != 4 or tensor.shape[1] != tokens or tensor.shape[0] != like.shape[0]:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; step {step} takes (B, {tokens}, heads, D), one B for all"
                )
        if not k.shape[2] or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3] or v.shape[2] != k.shape[2]:
            raise ValueError(
                f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; k and v must have the same "
                f"heads, q a multiple of them, and one D"
            )
        if self._calls == 0:
            self._batch = k.shape[0]
        return step

    @property
    def _first_step(self) -> int:
        return -1 if self.prefix else 0

    def _count(self) -> bool:
        """Count a call as made; True where it ends a generation."""
        self._calls += 1
        if self._calls < (len(self.schedule) - self._first_step) * self.num_layers:
            return False
        self._calls = 0
        self._sequences += self._batch
        self.images += self._batch // 2
        return True

    def _check_seen(self) -> None:
        if self._sequences == 0:
            raise ValueError("no whole generation has been recorded yet")
