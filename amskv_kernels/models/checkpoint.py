"""Models from files: the official `.pth` checkpoints, those of the public trainer, and safetensors that `save` wrote.

A state dict shows its sizes by its shapes; what a file or a caller says besides is compared with them before any model
is built.
"""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amskv_kernels.arguments import check_device
from amskv_kernels.files import MISTAKES, parse_json, reason, replacing
from amskv_kernels.models.var import VAR, VARConfig
from amskv_kernels.models.vqvae import VQVAE, VQVAEConfig
from amskv_kernels.schedule import ScaleSchedule
from amskv_kernels.shapes import ModelShape

__all__ = ["load", "model_shape", "save"]

Config = TypeVar("Config", VARConfig, VQVAEConfig)
State = dict[str, Tensor]
Sizes = dict[str, Any]

# Where training code puts a state dict: the public trainer has {"trainer": {"var_wo_ddp": …, "vae_local": …}}.
_AROUND = ("trainer", "state_dict", "model")
_PARTS = {VARConfig: "var_wo_ddp", VQVAEConfig: "vae_local"}
_INFINITY_BLOCKS = "block_chunks."
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def save(path: str | Path, model: torch.nn.Module, sizes: Sizes, schedule: ScaleSchedule) -> None:
    """Write a state dict as safetensors with the sizes and schedule it belongs to.

    The mask buffer is stored in fp16, which holds its 0 and −inf exactly.
    """
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    if "attn_bias_for_masking" in state:
        state["attn_bias_for_masking"] = state["attn_bias_for_masking"].half()
    with replacing(path) as beside:
        save_file(state, beside, metadata={"config": json.dumps(sizes), "schedule": json.dumps(schedule.sizes)})


def load(
    var: str | Path, vae: str | Path, model: str | None = None, device: torch.device | str = "cpu"
) -> tuple[VAR, VQVAE]:  # fmt: skip
    """A VAR and its VQ-VAE, in evaluation mode, without gradients.

    Args:
        var: `var_d16.pth` … `var_d36.pth`, a checkpoint of the public trainer, or safetensors that `save` wrote.
        vae: `vae_ch160v4096z32.pth`, a checkpoint of the public trainer, or safetensors that `save` wrote.
        model: "var-d16" … "var-d36", where the file must be of that model.
        device: where to put them.

    Raises:
        ValueError: an unknown model or device, or a file that cannot be read, does not fit the sizes it says it has,
            is of another model than named, or has weights that are not finite; the message names the file.
    """
    named = None if model is None else VARConfig.named(model)
    check_device("device", device)
    var_state, config = _read(Path(var), VARConfig, None)
    if named is not None and named != config:
        raise ValueError(f"{var} has other sizes than {model}: {_differences(config, named)}")
    vae_state, vae_config = _read(Path(vae), VQVAEConfig, config.schedule)
    transformer, autoencoder = VAR(config), VQVAE(vae_config)
    for path, module, state in ((var, transformer, var_state), (vae, autoencoder, vae_state)):
        try:
            module.load_state_dict(state)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {reason(error)}") from error
        for name, weight in module.named_parameters():
            if not all(map(math.isfinite, weight.detach().aminmax())):
                raise ValueError(f"{path}: {name} has values that are not finite; nothing can be drawn with it")
        module.eval().requires_grad_(False).to(device)
    return transformer, autoencoder


def model_shape(path: str | Path, schedule: ScaleSchedule | None = None) -> ModelShape:
    """What a cache needs to know of the VAR or Infinity in a checkpoint.

    Args:
        path: what `load` takes as VAR, or a state dict of the public Infinity.
        schedule: another than the checkpoint's own; Infinity's is "infinity-1m-1.000" unless given.

    Raises:
        ValueError: as `load`.
    """
    path = Path(path)
    state = _state_of(path, "infinity")[0]
    if not any(name.startswith(_INFINITY_BLOCKS) for name in state):
        config = _read(path, VARConfig, None)[1]
        heads = config.num_heads
        return ModelShape(path.stem, config.depth, heads, heads, config.head_dim, schedule or config.schedule)
    try:
        layers = len(
            {name.partition(".sa.")[0] for name in state if name.startswith(_INFINITY_BLOCKS) and ".sa." in name}
        )
        heads = state["block_chunks.0.module.0.sa.scale_mul_1H11"].numel()
        width = _shape(state, "block_chunks.0.module.0.sa.mat_qkv.weight", 2)[1]
    except MISTAKES as error:
        raise ValueError(f"{path} holds no Infinity: {reason(error)}") from error
    found = schedule or ScaleSchedule.named("infinity-1m-1.000")
    return ModelShape(path.stem, layers, heads, heads, width // heads, found)


def _read(path: Path, kind: type[Config], schedule: ScaleSchedule | None) -> tuple[State, Config]:
    """A state dict and the configuration that its shapes give; `schedule` is for those that cannot tell theirs."""
    state, stated, own_schedule = _state_of(path, _PARTS[kind])
    try:
        seen = _var_sizes(state) if kind is VARConfig else _vqvae_sizes(state)
        schedule = own_schedule or schedule or _square_schedule(state)
        if kind is VARConfig and list(schedule.tokens) != _tokens(state):
            raise ValueError("its schedule is not that of its buffer of levels, lvl_1L")
        return state, kind(schedule=schedule, **_agreed(kind, seen, stated))
    except KeyError as error:
        raise ValueError(f"{path} holds no {kind.__name__.removesuffix('Config')}: {error} is missing") from error
    except MISTAKES as error:
        raise ValueError(f"{path} does not fit its own sizes: {reason(error)}") from error


def _state_of(path: Path, part: str) -> tuple[State, Sizes, ScaleSchedule | None]:
    """The state dict of one part of a model, and the sizes and schedule that the file says it has."""
    try:
        raw, stated, schedule = contents(path)
        return _state(raw, part), stated, schedule
    except MISTAKES as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error


def contents(path: Path) -> tuple[Any, Sizes, ScaleSchedule | None]:
    """What a file holds, and the sizes and schedule that it says it has.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if path.suffix != ".safetensors":
            mapped = zipfile.is_zipfile(path)  # read when it is copied, and not at all where shapes will do
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped), {}, None
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ValueError(reason(error)) from error
    except Exception as error:  # the unpickler runs what it finds: bytes at random end in any error at all
        raise ValueError(f"it is not a PyTorch checkpoint of tensors alone ({type(error).__name__})") from error
    sizes = parse_json(metadata.get("config", "{}"))
    if not isinstance(sizes, dict):
        raise ValueError(f"its sizes are {type(sizes).__name__}; they must be an object")
    schedule = ScaleSchedule(parse_json(metadata["schedule"])) if "schedule" in metadata else None
    return state, sizes, schedule


def _state(raw: Any, part: str) -> State:
    """The state dict in what a file holds, under its plain names.

    Raises:
        ValueError: there is none.
    """
    state = raw
    for name in (*_AROUND, part):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"it holds {'nothing' if state == {} else type(state).__name__}; it must hold a state dict")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"it holds {type(value).__name__} under {str(name)[:40]!r}; it must hold tensors by name")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(
                f"it holds a sparse, quantized or empty tensor under {name[:40]!r}; it must hold plain ones"
            )
    for prefix in (f"{part}.", *_PREFIXES):
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = inside or state
    return state


def _var_sizes(state: State) -> Sizes:
    """The sizes of a VAR by its shapes; a KeyError names what is missing."""
    width, z_channels = _shape(state, "word_embed.weight", 2)
    normed = state.get("blocks.0.attn.scale_mul_1H11")
    return {
        "depth": _count(state, "blocks."),
        "embed_dim": width,
        # Without the learned lengths nothing tells; the public code has heads of 64.
        "num_heads": max(width // 64, 1) if normed is None else normed.numel(),
        "mlp_ratio": _shape(state, "blocks.0.ffn.fc1.weight", 2)[0] / width,
        "vocab_size": _shape(state, "head.weight", 2)[0],
        "z_channels": z_channels,
        "num_classes": _shape(state, "class_emb.weight", 2)[0] - 1,
        "shared_adaln": "shared_ada_lin.1.weight" in state,
        "attn_l2_norm": normed is not None,
    }


def _vqvae_sizes(state: State) -> Sizes:
    """The sizes of a VQ-VAE by its shapes; a KeyError names what is missing."""
    ch, image_channels = _shape(state, "encoder.conv_in.weight", 4)[:2]
    levels = range(_count(state, "encoder.down."))
    vocab_size, z_channels = _shape(state, "quantize.embedding.weight", 2)
    return {
        "ch": ch,
        "ch_mult": tuple(_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // ch for i in levels),
        "num_res_blocks": _count(state, "encoder.down.0.block."),
        "z_channels": z_channels,
        "vocab_size": vocab_size,
        "image_channels": image_channels,
        "num_phi": _count(state, "quantize.quant_resi.qresi_ls."),
    }


def _shape(state: State, name: str, rank: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{name} is of shape {shape}; it must have {rank} dimensions, none of them 0")
    return shape


def _count(state: State, prefix: str) -> int:
    """How many numbers follow `prefix` in the names of a state dict."""
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def _tokens(state: State) -> list[int]:
    """How many tokens each scale has."""
    tokens: list[int] = torch.unique_consecutive(state["lvl_1L"].flatten(), return_counts=True)[1].tolist()
    return tokens


def _square_schedule(state: State) -> ScaleSchedule:
    """The schedule of square maps that a VAR's buffer of levels was made for."""
    tokens = _tokens(state)
    sides = [math.isqrt(n) for n in tokens]
    if [side * side for side in sides] != tokens:
        raise ValueError(f"lvl_1L has scales of {tokens} tokens, which are not square; the file must say its schedule")
    published = (ScaleSchedule.named(name) for name in ScaleSchedule.names())
    found = ScaleSchedule([(side, side) for side in sides])
    return next((schedule for schedule in published if schedule == found), found)


def _agreed(kind: type[Config], seen: Sizes, stated: Sizes) -> Sizes:
    """The sizes that the shapes show, with what only a file can say; a ValueError where the two differ."""
    known, agreed = kind.__dataclass_fields__.keys() - {"schedule"}, dict(seen)
    for name, value in stated.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in known:
            raise ValueError(f"{name} is no size of a {kind.__name__}; its sizes are {', '.join(sorted(known))}")
        shown = seen.get(name, 0.5)  # phi_ratio leaves no trace in the shapes
        if type(value) is not type(shown) and not (type(value) is int and isinstance(shown, float)):
            raise ValueError(f"{name} is {str(value)[:40]}; it must be {_kind(shown)}")
        rounded = name == "mlp_ratio" and round(seen["embed_dim"] * value) == round(seen["embed_dim"] * shown)
        if name in seen and value != shown and not rounded:
            raise ValueError(f"{name} is {str(value)[:40]} by its metadata and {shown} by its weights")
        agreed[name] = value
    return agreed


def _kind(shown: object) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", tuple: "a list"}[type(shown)]


def _differences(found: VARConfig, named: VARConfig) -> str:
    ours, theirs = asdict(found), asdict(named)
    ours["schedule"], theirs["schedule"] = found.schedule.name, named.schedule.name
    return ", ".join(
        f"{name} is {ours[name]} and must be {theirs[name]}" for name in ours if ours[name] != theirs[name]
    )
