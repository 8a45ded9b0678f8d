"""Which model a command draws with: a checkpoint, the digits of this project, or a stack of random weights."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import default_device, device, seed, whole
from amskv_kernels.cli.processes import check_alone

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from amskv_kernels.cli.drawing import Subject
    from amskv_kernels.models.infinity import Text

SCHEDULE = "infinity-0.06m-1.000"
STACK = "4,256,4"
# A clone has the weights of the digits beside the package; a wheel has not.
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "weights"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_SAMPLING: dict[str, Any] = {"cfg": 3.0, "top_k": 64, "top_p": 0.95}
SAMPLING: dict[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}  # of VAR's published FID


def add_var(parser: argparse.ArgumentParser) -> None:
    """Which VAR, and where it runs."""
    parser.add_argument("--var", metavar="FILE", help="var_d*.pth, a checkpoint of the public trainer, or safetensors")
    parser.add_argument("--vae", metavar="FILE", help="vae_ch160v4096z32.pth, a trainer's checkpoint, or safetensors")
    parser.add_argument("--model", help="var-d16 … var-d36, where the file must be of that model")
    parser.add_argument("--cfg", type=float, help="guidance (default 1.5; digits 3)")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, a VAR or an Infinity stack, and where it runs."""
    add_var(parser)
    parser.add_argument(
        "--stack", metavar="LAYERS,WIDTH,HEADS", help="in place of --var: an Infinity stack of random weights"
    )
    parser.add_argument("--schedule", help=f"of --stack, a published one (default {SCHEDULE})")
    parser.add_argument("--seed", type=seed, default=0, help="of classes and sampling (default 0)")


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """What is drawn, and how it is sampled: what `generate` and `evaluate` take beside the model."""
    parser.add_argument(
        "--family", choices=("var", "infinity"),
        help="infinity: maps of a stack of random weights, which show nothing but cost what real ones cost (default: "
        "var, with --stack infinity)",
    )  # fmt: skip
    add_sampling(parser)
    parser.add_argument("--labels", help="classes such as 3,207,207 (default: spread over all)")
    parser.add_argument("--images", type=whole(1), help="how many, where no labels are given (default 8)")
    parser.add_argument("--prompt-features", metavar="FILE", help="of --family infinity: a .pt of one (n, C) a prompt")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """A checkpoint of both models, the pages' dtype, and limits of sampling."""
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="in place of --var and --vae: a trainer's checkpoint, which holds both"
    )
    add_pages(parser)
    parser.add_argument("--top-k", type=whole(0), help="0 for no limit (default 900; digits 64)")
    parser.add_argument("--top-p", type=float, help="0 for no limit (default 0.96; digits 0.95)")


def add_pages(parser: argparse.ArgumentParser) -> None:
    """What the pages hold."""
    parser.add_argument(
        "--pages", choices=("model", "int8"), default="model",
        help="int8: eight bits and a scale per row, in place of the model's own dtype",
    )  # fmt: skip


def subject_of(arguments: argparse.Namespace, mesh: DeviceMesh | None = None) -> Subject:
    """The model that the arguments name; sharded over the processes of a mesh, where one is given.

    Raises:
        ValueError: they name none, or do not go together; heads that the processes do not divide; a command of one
            process in several.
    """
    check_alone(mesh)
    subject = _subject(arguments, mesh)
    subject.eight_bit = getattr(arguments, "pages", "model") == "int8"
    return subject


def _subject(arguments: argparse.Namespace, mesh: DeviceMesh | None) -> Subject:
    # A model to shard is read on the CPU: no GPU may hold it all.
    where = "cpu" if mesh is not None else arguments.device or default_device()
    family = getattr(arguments, "family", None)
    if arguments.stack is not None and family == "var":
        raise ValueError("--stack is of --family infinity; a VAR is a checkpoint's")
    if arguments.stack is not None or family == "infinity":
        return _stack(arguments, where, mesh)
    from amskv_kernels.cli.drawing import Checkpoint
    from amskv_kernels.models import checkpoint

    if arguments.schedule is not None:
        raise ValueError("--schedule is of --stack; a checkpoint has its own")
    if getattr(arguments, "prompt_features", None) is not None:
        raise ValueError("--prompt-features are of --family infinity; a VAR is given --labels")
    files, name = _files(arguments)
    digits = files[0].resolve().parent == DIGITS.resolve()
    var, vae = checkpoint.load(*files, arguments.model, where)
    if mesh is not None:
        from amskv_kernels.models.tensor_parallel import shard

        shard(var, mesh)
        vae.to(mesh.device_type)
    sampling = dict(DIGITS_SAMPLING if digits else SAMPLING)
    sampling |= {key: own for key in sampling if (own := getattr(arguments, key, None)) is not None}
    if getattr(arguments, "top_k", None) is None:
        sampling["top_k"] = min(sampling["top_k"], var.config.vocab_size)
    labels = _labels(getattr(arguments, "labels", None), var.config.num_classes)
    return Checkpoint.of(var, vae, arguments.model or name, sampling, labels)


def _files(arguments: argparse.Namespace) -> tuple[tuple[Path, Path], str]:
    """The files of the VAR and of its VQ-VAE, and the model's name."""
    both = getattr(arguments, "checkpoint", None)
    given = [text for text in (arguments.var, arguments.vae) if text is not None]
    if both is not None and not given:
        return (Path(both), Path(both)), Path(both).stem
    if len(given) == 2 and both is None:
        return (Path(given[0]), Path(given[1])), Path(given[0]).stem
    if given or both is not None:
        raise ValueError("give --var and --vae, or --checkpoint alone")
    files = DIGITS / "var.safetensors", DIGITS / "vqvae.safetensors"
    if not files[0].exists():
        raise ValueError(
            "no checkpoint is named, and this installation has no digits beside it as a clone has; "
            "give --var and --vae, or --checkpoint"
        )
    return files, "digits"


def _labels(text: str | None, num_classes: int) -> Tensor | None:
    import torch

    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise ValueError(f"--labels is {text[:40]!r}; it must be classes such as 3,207")
    labels = [int(part) for part in text.split(",")]
    if max(labels) >= num_classes:
        raise ValueError(f"--labels has {max(labels)}; this model has classes 0 … {num_classes - 1}")
    return torch.tensor(labels)


def _stack(arguments: argparse.Namespace, where: str, mesh: DeviceMesh | None) -> Subject:
    import torch

    from amskv_kernels.cli.drawing import RandomStack
    from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
    from amskv_kernels.schedule import ScaleSchedule

    foreign = ("var", "vae", "checkpoint", "model", "labels", "cfg", "top_k", "top_p")
    given = [name.replace("_", "-") for name in foreign if getattr(arguments, name, None) is not None]
    if given:
        raise ValueError(
            f"--{given[0]} is of a VAR; an Infinity stack has random weights, prompts, and nothing to sample"
        )
    sizes = arguments.stack or STACK
    if not re.fullmatch(r"[0-9]{1,4},[0-9]{1,5},[0-9]{1,4}", sizes):
        raise ValueError(f"--stack is {sizes!r}; it must be LAYERS,WIDTH,HEADS, such as {STACK}")
    schedule = ScaleSchedule.named(arguments.schedule or SCHEDULE)
    layers, width, heads = map(int, sizes.split(","))
    torch.manual_seed(arguments.seed)
    stack = InfinityStack(InfinityConfig(layers, width, heads, chunks=1)).to(where).eval().requires_grad_(False)
    if mesh is not None:
        from amskv_kernels.models.tensor_parallel import shard

        shard(stack, mesh)
    prompts = getattr(arguments, "prompt_features", None)
    return RandomStack.of(stack, schedule, None if prompts is None else _features(prompts, width))


def _features(path: str, width: int) -> Text:
    """The prompts of a file, as Infinity's code packs them."""
    import torch
    from torch.nn import functional as F

    from amskv_kernels.models import checkpoint

    try:
        found, _, _ = checkpoint.contents(Path(path))
    except ValueError as error:
        raise ValueError(f"--prompt-features {path} cannot be read: {error}") from error
    prompts = list(found) if isinstance(found, list | tuple) else [found]
    for prompt in prompts:
        if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or not len(prompt) or prompt.shape[1] != width:
            shape = tuple(prompt.shape) if isinstance(prompt, torch.Tensor) else type(prompt).__name__
            raise ValueError(f"--prompt-features {path} has {shape}; each prompt must be (n, {width}), n > 0")
    # One sequence with guidance, one without.
    lengths = torch.tensor([len(prompt) for prompt in prompts for _ in range(2)])
    packed = torch.cat([half for prompt in prompts for half in (prompt.float(), torch.zeros_like(prompt).float())])
    return packed, F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
