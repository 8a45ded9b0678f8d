"""What forgetting a scale costs: one pass over a few images, for every layer, head, scale and later step."""

from __future__ import annotations

import torch
from torch import Tensor

from amskv_kernels.arguments import whole_number
from amskv_kernels.calibrate.recorder import Recorder
from amskv_kernels.calibrate.similarity import key_similarity
from amskv_kernels.models.attention import Attention
from amskv_kernels.policies.losses import Losses
from amskv_kernels.schedule import ScaleSchedule


class LossRecorder(Recorder):
    """Watches attention layer by layer and scale by scale, and averages what `Losses` holds over generations.

    It keeps the keys and values of the running generation and computes its attention once more, some queries at a time;
    what it has measured takes the same few numbers however many images it has seen.

    Args:
        schedule: see `Recorder`.
        num_layers: see `Recorder`.
        inner: see `Recorder`.
        rows: queries at a time.
        prefix: see `Recorder`.
    """

    def __init__(
        self, schedule: ScaleSchedule, num_layers: int, inner: Attention | None = None, rows: int = 256,
        prefix: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(schedule, num_layers, inner, prefix)
        self._rows = whole_number("rows", rows, 1)
        self._mass: Tensor | None = None  # (L, Hkv, K, K), summed over sequences
        self._gram: Tensor | None = None  # (L, Hkv, K, K, K)
        self._similarity = torch.zeros(num_layers, len(schedule), dtype=torch.float64, device="cpu")
        self._held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_layers)]

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
        """Take q (B, n, H, D), k and v (B, n, Hkv, D) of the next call; layers come in order, step by step."""
        step = self._turn(layer, q, k, v)
        sequences, queries, heads = self._batch, q.shape[1], k.shape[2]
        if self._mass is None or self._gram is None:
            layers, steps = len(self._held), len(self.schedule)
            self._mass = torch.zeros(layers, heads, steps, steps, dtype=torch.float64, device="cpu")
            self._gram = torch.zeros(layers, heads, steps, steps, steps, dtype=torch.float64, device="cpu")
        earlier = self._held[layer] if step > self._first_step else []
        earlier = [(keys[: len(k)], values[: len(k)]) for keys, values in earlier]
        held = self._held[layer] = [*earlier, (k, v)]
        if step < 0:
            self._count()
            return
        if step:
            sizes, before = self.schedule.sizes, earlier[-1][0]
            alike = key_similarity(before, k, sizes[step - 1], sizes[step])
            self._similarity[layer, step] += sequences * float(alike)
        keys = torch.cat([each for each, _ in held], dim=1).float().permute(0, 2, 3, 1)  # [B, Hkv, D, N]
        values = [each.float().transpose(1, 2) for _, each in held]  # [B, Hkv, n_s, D]
        for part in q.float().split(self._rows, dim=1):
            grouped = part.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G·n, D]
            with torch.autocast(q.device.type, enabled=False):  # the same measurement with autocast and without
                mass, gram = _moments((softmax_scale * grouped @ keys).softmax(-1), values, -self._first_step)
            share = sequences * part.shape[1] / queries
            self._mass[layer, :, step, : step + 1] += share * mass.double().cpu()
            # Outputs of the query heads that share a KV head lie side by side: their squares add up.
            self._gram[layer, :, step, :step, :step] += share * (q.shape[2] // heads) * gram.double().cpu()
        if self._count():
            self._held = [[] for _ in self._held]

    def losses(self, model: str = "unnamed") -> Losses:
        """The means over what has been seen.

        Raises:
            ValueError: no generation has been seen to its end, or one gave numbers that are not finite.
        """
        self._check_seen()
        assert self._mass is not None
        assert self._gram is not None
        mass, gram, similarity = (x / self._sequences for x in (self._mass, self._gram, self._similarity))
        table = tuple(tuple(row) for row in similarity.tolist())
        return Losses(self.schedule.sizes, mass.numpy(), gram.numpy(), table, self.images, model)


def _moments(weights: Tensor, values: list[Tensor], prefixes: int = 0) -> tuple[Tensor, Tensor]:
    """Means over sequences and queries of the attention to each scale, and of the products of the earlier ones' a.

    Args:
        weights: (B, Hkv, Q, N) of all keys.
        values: of each scale (B, Hkv, n_s, D), the current one's last.
        prefixes: how many of them come before the maps: attended to, and never forgotten.

    Returns:
        (Hkv, K') and (Hkv, K' − 1, K' − 1) for K' scales.
    """
    shares = weights.split([each.shape[2] for each in values], dim=-1)
    mass = torch.stack([share.sum(-1) for share in shares], dim=-1)  # [B, Hkv, Q, K']
    parts = torch.stack([share @ value for share, value in zip(shares, values, strict=True)], dim=-2)
    moved = (mass[..., None] * parts.sum(-2, keepdim=True) - parts)[..., prefixes:-1, :]  # a of each earlier scale
    mass = mass[..., prefixes:]
    gram = torch.einsum("bhqsd,bhqtd->hst", moved, moved)
    return mass.mean((0, 2)), gram / (weights.shape[0] * weights.shape[2])
