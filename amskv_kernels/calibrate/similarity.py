"""Inter-scale key similarity, and the layers that AMS-KV calls cache-demanding.

AMS-KV (arXiv 2511.16047) calls a layer cache-demanding where the keys of scale i−1, resized to the map of scale i,
lie far from those of scale i. How the distance is reduced is not published; here it is the L2 norm over the head
size, averaged over tokens, heads and batch, so that it neither grows with the model nor with the batch. Conditional
and unconditional sequences are measured together, since they share one decision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.arguments import threshold
from amskv_kernels.calibrate.recorder import Recorder
from amskv_kernels.models.attention import Attention
from amskv_kernels.policies.calibration import Calibration, rank_layers
from amskv_kernels.schedule import ScaleSchedule


def key_similarity(
    previous: Tensor, current: Tensor, previous_size: tuple[int, int], size: tuple[int, int], mode: str = "bilinear"
) -> Tensor:  # fmt: skip
    """Negative L2 distance between the keys of two scales, the earlier ones resized to the later map.

    Args:
        previous: (B, h'·w', Hkv, D) keys of the earlier scale.
        current: (B, h·w, Hkv, D) keys of the later one.
        previous_size: (h', w').
        size: (h, w).
        mode: of the 2-D interpolation, as `torch.nn.functional.interpolate` takes it.

    Returns:
        fp32 scalar, at most 0; for keys of unit length at least −2.
    """
    batch, _, heads, head_dim = previous.shape
    maps = previous.float().permute(0, 2, 3, 1).reshape(batch, heads * head_dim, *previous_size)
    align = False if mode in ("bilinear", "bicubic") else None
    resized = F.interpolate(maps, size=size, mode=mode, align_corners=align)
    resized = resized.view(batch, heads, head_dim, -1).permute(0, 3, 1, 2)
    return -(current.float() - resized).norm(dim=-1).mean()


class SimilarityRecorder(Recorder):
    """Watches the keys of every layer and scale go by, and averages their similarity over generations.

    Args:
        schedule: see `Recorder`.
        num_layers: see `Recorder`.
        inner: see `Recorder`.
        mode: see `key_similarity`.
        prefix: see `Recorder`.
    """

    def __init__(
        self, schedule: ScaleSchedule, num_layers: int, inner: Attention | None = None, mode: str = "bilinear",
        prefix: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(schedule, num_layers, inner, prefix)
        self.mode = mode
        self._sums = torch.zeros(num_layers, len(schedule), dtype=torch.float64, device="cpu")  # over sequences
        self._previous: list[Tensor | None] = [None] * num_layers

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
        """Take the keys (B, n, Hkv, D) of the next call; layers come in order, step by step."""
        step = self._turn(layer, q, k, v)
        previous, sizes = self._previous[layer], self.schedule.sizes
        if step > 0 and previous is not None:
            alike = key_similarity(previous[: len(k)], k, sizes[step - 1], sizes[step], self.mode)
            self._sums[layer, step] += self._batch * alike.cpu()
        self._previous[layer] = k
        self._count()

    def similarity(self) -> tuple[tuple[float, ...], ...]:
        """(L, K) means over the sequences seen; 0 for scale 0.

        Raises:
            ValueError: no generation has been seen to its end.
        """
        self._check_seen()
        return tuple(tuple(row) for row in (self._sums / self._sequences).tolist())


def demanding_layers(
    similarity: tuple[tuple[float, ...], ...], *, theta: float | None = None, count: int | None = None
) -> tuple[tuple[int, ...], float]:  # fmt: skip
    """The cache-demanding layers, by threshold or by count, and the threshold they lie below.

    Args:
        similarity: (L, K) as `SimilarityRecorder.similarity` gives it.
        theta: every layer whose mean similarity is below it.
        count: the `count` layers of lowest mean similarity.

    Raises:
        ValueError: not exactly one of theta and count, a theta that is no number, or a count outside 0 … L.
    """
    if (theta is None) == (count is None):
        raise ValueError("give exactly one of theta and count")
    if theta is not None:
        threshold("theta", theta)
    means = [sum(row[1:]) / max(1, len(row) - 1) for row in similarity]
    if theta is not None:
        return tuple(layer for layer, mean in enumerate(means) if mean < theta), theta
    assert count is not None
    if not 0 <= count <= len(means):
        raise ValueError(f"count is {count}; it must be within 0 … {len(means)}, the number of layers")
    chosen = rank_layers(similarity)[:count]
    ordered = sorted(means)
    between = [ordered[0] - 1, *ordered, ordered[-1] + 1]
    return tuple(sorted(chosen)), (between[count] + between[count + 1]) / 2


def calibrate(
    generate: Callable[[SimilarityRecorder], None],
    recorder: SimilarityRecorder,
    *,
    theta: float | None = None,
    count: int | None = None,
    model: str = "unnamed",
) -> Calibration:
    """Run generations through a recorder and choose the demanding layers.

    Args:
        generate: draws images with the recorder as attention, or lets it observe.
        recorder: a fresh one.
        theta: see `demanding_layers`.
        count: see `demanding_layers`.
        model: a name for people.

    Raises:
        ValueError: what `demanding_layers` and `SimilarityRecorder.similarity` raise.
    """
    generate(recorder)
    table = recorder.similarity()
    chosen, threshold = demanding_layers(table, theta=theta, count=count)
    return Calibration(recorder.schedule.sizes, table, chosen, threshold, recorder.images, model)
