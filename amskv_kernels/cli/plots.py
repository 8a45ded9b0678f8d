"""Pictures of plans and calibrations. Needs matplotlib (`pip install 'amskv_kernels[plot]'`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amskv_kernels.files import check_writable, replacing
from amskv_kernels.planning.memory import MIB, counted
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Calibration, Losses
from amskv_kernels.schedule import ScaleSchedule

FORMATS = (".png", ".pdf")


def picture_path(name: str) -> Path:
    """The file that a picture of this name goes to: a name without an ending gets `.png`.

    Raises:
        ValueError: no name, a directory, another ending than `FORMATS`, or where nothing can be written.
        RuntimeError: there is no matplotlib to draw with.
    """
    path = Path(name)
    if path.name and path.suffix not in ("", *FORMATS):
        raise ValueError(f"{name!r} ends in {path.suffix}; pictures are {' or '.join(FORMATS)}")
    check_writable(name)
    _figure()
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    check_writable(path)
    return path


def _figure(**options: Any) -> Any:
    """A figure of its own: the process's backend and what `pyplot` shows stay as they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'amskv_kernels[plot]'") from error
    return Figure(**options)


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1, dpi: int = 120) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches and its axes, as `Figure.subplots` gives them."""
    figure = _figure(figsize=(width, height), layout="constrained", dpi=dpi)
    return figure, figure.subplots(rows, columns)


def save(figure: Any, path: str | Path) -> None:
    """Write a picture, PNG or PDF by its name; one that fails leaves the old one."""
    ending = Path(path).suffix.removeprefix(".")
    with replacing(path) as beside:
        figure.savefig(beside, format=ending, metadata={"Software": None} if ending == "png" else None)


def timeline(plans: Mapping[str, CachePlan], token_bytes: Mapping[str, int], title: str, path: str | Path) -> None:
    """Bytes in the cache over the steps of a generation, one line a plan, stock code's on top.

    Args:
        plans: by the name to show; all of one schedule and depth.
        token_bytes: bytes of one token in one layer over all sequences and heads, for "ours" and "stock".
        title: of the picture.
        path: of the PNG.
    """
    figure, axes = new_figure(8, 4.5)
    first = next(iter(plans.values()))
    tokens, layers = np.asarray(first.schedule.tokens), first.num_layers
    steps = np.arange(len(tokens))
    calls = 1 + steps.repeat(layers) + np.tile(np.arange(layers), len(steps)) / layers
    stock = np.cumsum(tokens.repeat(layers)) * token_bytes["stock"] / MIB
    axes.plot(calls, stock, color="black", linestyle="--", label="stock")
    for name, plan in plans.items():
        axes.plot(calls, plan.live.ravel() / plan.heads * token_bytes["ours"] / MIB, label=name)
    axes.set_xticks(steps + 1, [f"{h}×{w}" for h, w in first.schedule.sizes])
    axes.set_xlabel("step: the map being drawn, layer by layer")
    axes.set_ylabel("MiB in the cache")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def similarity(calibration: Calibration, path: str | Path) -> None:
    """Inter-scale key similarity, layers × scales; cache-demanding layers are marked."""
    table = np.asarray(calibration.similarity)[:, 1:]
    figure, axes = new_figure(1.5 + 0.6 * table.shape[1], 1.8 + 0.28 * table.shape[0])
    image = axes.imshow(table, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axes, label="similarity (− mean L2 distance)")
    axes.set_xticks(range(table.shape[1]), [f"{h}×{w}" for h, w in calibration.schedule[1:]], rotation=45)
    marks = [f"{layer} *" if layer in calibration.demanding_layers else f"{layer}" for layer in range(len(table))]
    axes.set_yticks(range(len(table)), marks)
    axes.set_xlabel("scale, compared with the one before")
    axes.set_ylabel("layer (* cache-demanding)")
    axes.set_title(f"Key similarity of {calibration.model}, {counted(calibration.images, 'image')}")
    save(figure, path)


def quality(rows: Sequence[Mapping[str, Any]], title: str, path: str | Path) -> None:
    """Quality over bytes, and what explains it, one line a policy.

    Args:
        rows: of each policy and size: "policy", "retained_share" of stock's bytes, "psnr_db" (None: identical, not
            drawn), "attention_error".
        title: of the picture.
        path: of the PNG.
    """
    figure, (left, right) = new_figure(11, 4.5, columns=2)
    names = list(dict.fromkeys(row["policy"] for row in rows if row["psnr_db"] is not None))
    for i, name in enumerate(names):
        own = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["retained_share"])
        shares = [100 * row["retained_share"] for row in own]
        style: dict[str, Any] = {"marker": "osD^v<>PX*dp"[i % 12], "markersize": 5, "linewidth": 1.3, "label": name}
        style["color"] = f"C{i}" if i < 10 else ("black", "navy")[i % 2]
        left.plot(shares, [row["psnr_db"] for row in own], **style)
        right.plot(shares, [100 * row["attention_error"] for row in own], **style)
    left.set_ylabel("PSNR to the full cache's images, dB")
    right.set_ylabel("attention error, %")
    for axes in (left, right):
        axes.set_xlabel("retained, % of stock's bytes")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def losses(measured: Losses, path: str | Path) -> None:
    """What forgetting a scale costs, layers × scales: on all later queries together, and for each of its tokens."""
    tokens = np.asarray(ScaleSchedule(measured.schedule).tokens)
    alone = measured.alone().sum(1)  # (L, step, scale) of one query, all heads
    total = np.einsum("lts,t->ls", alone, tokens)[:, :-1]
    figure, axes = new_figure(4 + 1.0 * total.shape[1], 1.8 + 0.28 * len(total), columns=2)
    for axis, table, title in zip(axes, (total, total / tokens[:-1]), ("whole scale", "per token"), strict=True):
        image = axis.imshow(np.log10(table.clip(table.max() * 1e-6)), aspect="auto", cmap="magma")
        figure.colorbar(image, ax=axis, label="log₁₀ loss")
        axis.set_xticks(range(total.shape[1]), [f"{h}×{w}" for h, w in measured.schedule[:-1]], rotation=45)
        axis.set_xlabel("scale forgotten")
        axis.set_title(title)
    axes[0].set_ylabel("layer")
    figure.suptitle(f"What forgetting costs {measured.model}, {counted(measured.images, 'image')}")
    save(figure, path)


def strips(pictures: Mapping[str, Any], path: str | Path) -> None:
    """A contact sheet: for each name one strip, (h, w, 3) in [0, 1]."""
    height, width = next(iter(pictures.values())).shape[:2]
    figure, axes = new_figure(10, 10 * height / width * len(pictures) + 0.4, rows=len(pictures))
    for axis, (name, strip) in zip(np.atleast_1d(axes), pictures.items(), strict=True):
        axis.imshow(strip)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, path)


def image(picture: Any, path: str | Path) -> None:
    """One picture (h, w, 3) in [0, 1], pixel by pixel, as PNG."""
    _figure()
    from matplotlib.image import imsave

    with replacing(path) as beside:
        imsave(beside, picture, format="png")


def grid(pictures: Sequence[Any], path: str | Path) -> None:
    """A contact sheet of pictures (h, w, 3) in [0, 1], as square as their number allows."""
    height, width = pictures[0].shape[:2]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = np.ones((rows * height, columns * width, 3), dtype=np.float32)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    image(sheet, path)
