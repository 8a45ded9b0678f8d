"""`amskv generate`: images of a checkpoint under a policy, with what they took."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import command, output_folder
from amskv_kernels.cli.processes import each_of, is_first, processes
from amskv_kernels.cli.subjects import add_drawing, add_model, subject_of
from amskv_kernels.planning.memory import MIB

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from amskv_kernels.cli.drawing import Drawn, Subject

IMAGES, FP32_BYTES = 8, 4
EPILOG = """\
for example:
  amskv generate                                   the digits of this project, in a clone of it
  amskv generate --var var_d16.pth --vae vae_ch160v4096z32.pth --labels 207,980,88 --policy ams-kv:75
  torchrun --standalone --nproc-per-node 2 -m amskv_kernels generate     a model that one GPU does not hold, on two

writes to --out: 0000.png …, contact-sheet.png, generation.json

next: amskv evaluate --policies ams-kv:75,sink:2,1 draws the same images under several policies and compares them
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    generate = command(commands, "generate", "draw images of a checkpoint under a policy", EPILOG)
    add_model(generate)
    add_drawing(generate)
    generate.add_argument("--policy", default="full", help="as `amskv plan` takes it, such as ams-kv:75 (default full)")
    generate.add_argument(
        "--out", type=output_folder, default=Path("images"), help="folder to write to (default images)"
    )
    generate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw and write; started by torchrun, in several processes, of which the first writes."""
    with processes(arguments.device) as mesh:
        return _run(arguments, mesh)


def _run(arguments: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    from tqdm import tqdm

    from amskv_kernels.cli import plots
    from amskv_kernels.policies import parse_policy
    from amskv_kernels.policies.base import check_ranks

    plots.picture_path(str(arguments.out / "contact-sheet.png"))  # no matplotlib, no pictures: told before drawing
    subject = subject_of(arguments, mesh)
    policy = parse_policy(arguments.policy, subject.shape.schedule, subject.shape.layers)
    check_ranks(policy, 1 if mesh is None else mesh.size())
    images = count_of(arguments, subject)
    pool = images * subject.image_bytes(subject.plan(policy))
    with tqdm(
        total=len(subject.shape.schedule), desc="drawing", unit="scale", disable=None if is_first(mesh) else True
    ) as bar:
        drawn = subject.draw(policy, images, arguments.seed, lambda *_: bar.update() and None)
    if is_first(mesh):
        _write(arguments, subject, drawn, round(pool), mesh)
    return 0


def _write(
    arguments: argparse.Namespace, subject: Subject, drawn: Drawn, pool: int, mesh: DeviceMesh | None
) -> None:  # fmt: skip
    """Pictures and figures to --out, and lines of both."""
    from amskv_kernels.cli import plots
    from amskv_kernels.files import write_json

    images = len(drawn.images)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pictures = list(drawn.images.permute(0, 2, 3, 1).clamp(0, 1).numpy())
    for number, picture in enumerate(pictures):
        plots.image(picture, arguments.out / f"{number:04}.png")
    plots.grid(pictures, arguments.out / "contact-sheet.png")
    shape = subject.shape
    token = 2 * images * shape.layers * shape.kv_heads * shape.head_dim
    stock = token * shape.schedule.total * (FP32_BYTES + subject.dtype.itemsize)  # K is fp32 there, V the model's
    result = {
        "model": shape.name, "policy": arguments.policy, "images": images, "seed": arguments.seed,
        "pages": subject.pages,
        "seconds": round(drawn.seconds, 3), "pool_bytes": pool, "stock_bytes": stock,
        "processes": 1 if mesh is None else mesh.size(),
    }  # fmt: skip
    write_json(arguments.out / "generation.json", result)
    height, width = drawn.images.shape[2:]
    print(f"drawn     {images} of {width}×{height} in {drawn.seconds:.2f} s, {drawn.seconds / images:.3f} s each")
    print(
        f"cache     {pool / MIB:.2f} MiB of {subject.pages} under {arguments.policy}; stock's {stock / MIB:.2f} MiB"
        f"{each_of(mesh)}"
    )
    print(f"pictures  {arguments.out / 'contact-sheet.png'}, 0000.png … beside it")


def count_of(arguments: argparse.Namespace, subject: Subject) -> int:
    """How many images to draw.

    Raises:
        ValueError: --images beside labels or prompts.
    """
    if subject.images is not None and arguments.images is not None:
        raise ValueError("--images counts images of classes spread over all; labels and prompts are one image each")
    return subject.images or arguments.images or IMAGES
