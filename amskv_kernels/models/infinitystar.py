"""InfinityStar's schedules of videos, and its rule of what a scale may see.

Written from the public description (arXiv 2511.04675) and its published sizes. A video is an image, then clips of
frames that are drawn together, scale after scale; 16 frames a second, four of which are one in the latent.
"""

from __future__ import annotations

import math

from amskv_kernels.arguments import shown, whole_number
from amskv_kernels.schedule import ScaleSchedule

RESOLUTIONS = {"480p": 14, "720p": 15}  # how many of the sides an image has
_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 40, 60)  # of the square of a scale's area
_WIDE = 9 / 16
_CLIP_FRAMES, _CLIP_SECONDS = 20, 5


def video_schedule(resolution: str, seconds: int) -> ScaleSchedule:
    """The maps of a wide video, 16:9.

    Args:
        resolution: "480p" or "720p".
        seconds: a multiple of 5, or 0 for the image alone.

    Raises:
        ValueError: another resolution or length.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution is {shown(resolution)}; it must be one of {', '.join(RESOLUTIONS)}")
    if whole_number("seconds", seconds, 0) % _CLIP_SECONDS:
        raise ValueError(f"seconds is {seconds}; clips have {_CLIP_SECONDS} seconds each")
    sizes = [_wide(side) for side in _SIDES[: RESOLUTIONS[resolution]]]
    clips = [(_CLIP_FRAMES, h, w) for h, w in sizes] * (seconds // _CLIP_SECONDS)
    return ScaleSchedule([*((1, h, w) for h, w in sizes), *clips], f"infinitystar-{resolution}-{seconds}s")


def references(schedule: ScaleSchedule) -> list[list[int]]:
    """`ref_sids` of the released models: every scale of a clip sees the largest of the clip before, and no other."""
    per_clip = schedule.sizes.index(schedule.sizes[-1]) + 1
    return [[] if scale < per_clip else [scale // per_clip * per_clip - 1] for scale in range(len(schedule))]


def _wide(side: int) -> tuple[int, int]:
    width = math.sqrt(side * side / _WIDE)
    return round(width * _WIDE), round(width)
