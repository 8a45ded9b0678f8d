"""The calibration file: what a measurement of a model found, for AMS-KV to load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from amskv_kernels.arguments import instance_of, whole_number
from amskv_kernels.files import check_fits, finite_number, finite_table, read_fields, write_json
from amskv_kernels.policies.base import check_layers_exist, layer_set, set_fields
from amskv_kernels.schedule import ScaleSchedule

FORMAT = "amskv-similarity-1"


@dataclass(frozen=True)
class Calibration:
    """Inter-scale key similarity of one model and the layers found cache-demanding.

    Args:
        schedule: the (h, w) sizes the model was measured on.
        similarity: (L, K); entry (l, i) is the negative L2 distance of layer l's keys at scale i to those of
            scale i−1 resized to its map; 0 for scale 0, which has no predecessor.
        demanding_layers: the layers chosen, by threshold or by count.
        theta: the threshold they lie below.
        images: how many images were measured.
        model: a name for people.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of range, or a similarity that is not finite; names the field.
    """

    schedule: tuple[tuple[int, int], ...]
    similarity: tuple[tuple[float, ...], ...]
    demanding_layers: tuple[int, ...]
    theta: float
    images: int
    model: str = "unnamed"

    def __post_init__(self) -> None:
        sizes = ScaleSchedule(self.schedule).sizes
        table = finite_table("similarity", self.similarity, len(sizes))
        demanding = layer_set("demanding_layers", self.demanding_layers)
        check_layers_exist("demanding_layers", demanding, len(table))
        theta, images = finite_number("theta", self.theta), whole_number("images", self.images, 0)
        instance_of("model", self.model, str)
        set_fields(self, schedule=sizes, similarity=table, demanding_layers=demanding, theta=theta, images=images)

    @property
    def num_layers(self) -> int:
        """L of the measured model."""
        return len(self.similarity)

    @property
    def ranking(self) -> tuple[int, ...]:
        """All layers, most cache-demanding first: by their mean similarity over the scales after the first."""
        return rank_layers(self.similarity)

    def save(self, path: str | Path) -> None:
        """Write the calibration as JSON."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a calibration.

        Raises:
            ValueError: the file is missing, is not JSON, or a field is missing or out of range; the message
                names the file and the field.
        """
        return read_fields(path, "calibration", FORMAT, cls._parse)

    @classmethod
    def _parse(cls, raw: dict) -> Calibration:
        fields = ("schedule", "similarity", "demanding_layers", "theta", "images", "model")
        return cls(*(raw[field] for field in fields))

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        """Raise ValueError when the calibration was made for another depth or schedule."""
        check_fits("the calibration", self.schedule, self.num_layers, schedule, num_layers)


def rank_layers(similarity: tuple[tuple[float, ...], ...]) -> tuple[int, ...]:
    """Layers by mean similarity over the scales after the first, lowest (most demanding) first."""
    means = [sum(row[1:]) / max(1, len(row) - 1) for row in similarity]
    return tuple(sorted(range(len(means)), key=lambda layer: (means[layer], layer)))
