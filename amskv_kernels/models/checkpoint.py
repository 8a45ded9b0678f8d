"""Models from files: the official `.pth` checkpoints, and safetensors that carry their own sizes."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amskv_kernels.models.var import VAR, VARConfig
from amskv_kernels.models.vqvae import VQVAE, VQVAEConfig
from amskv_kernels.schedule import ScaleSchedule

Config = TypeVar("Config", VARConfig, VQVAEConfig)


def save(path: str | Path, model: torch.nn.Module, sizes: dict[str, Any], schedule: ScaleSchedule) -> None:
    """Write a state dict as safetensors with the sizes and schedule it belongs to.

    The mask buffer is stored in fp16, which holds its 0 and −inf exactly.
    """
    state = {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()}
    if "attn_bias_for_masking" in state:
        state["attn_bias_for_masking"] = state["attn_bias_for_masking"].half()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"config": json.dumps(sizes), "schedule": json.dumps(schedule.sizes)})


def load(
    var: str | Path, vae: str | Path, model: str | None = None, device: torch.device | str = "cpu"
) -> tuple[VAR, VQVAE]:  # fmt: skip
    """A VAR and its VQ-VAE, in evaluation mode, without gradients.

    Args:
        var: `var_d16.pth` … `var_d36.pth`, or safetensors that `save` wrote.
        vae: `vae_ch160v4096z32.pth`, or safetensors that `save` wrote.
        model: "var-d16" … "var-d36", needed for `.pth`, whose files do not carry their sizes; other files
            must be of that model.
        device: where to put them.

    Raises:
        ValueError: a file that cannot be read, has no sizes, does not fit them, or is of another model than
            named; the message names the file.
    """
    var_state, var_sizes, schedule = _read(Path(var))
    vae_state, vae_sizes, vae_schedule = _read(Path(vae))
    if var_sizes is not None:
        config = _configure(VARConfig, var, var_sizes, schedule)
        if model is not None and VARConfig.named(model) != config:
            raise ValueError(f"{var} carries its own sizes, which are not those of {model}")
    elif model is not None:
        config = VARConfig.named(model)
    else:
        raise ValueError(f"{var} does not carry its sizes; say which model it is (var-d16 … var-d36)")
    transformer = VAR(config)
    vae_schedule = config.schedule if vae_sizes is None else vae_schedule
    autoencoder = VQVAE(_configure(VQVAEConfig, vae, vae_sizes or {}, vae_schedule))
    for path, module, state in ((var, transformer, var_state), (vae, autoencoder, vae_state)):
        try:
            module.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        module.eval().requires_grad_(False).to(device)
    return transformer, autoencoder


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, ScaleSchedule]:
    """State dict, sizes and schedule; for a `.pth`, no sizes and VAR-256's schedule."""
    try:
        if path.suffix != ".safetensors":
            state = torch.load(path, map_location="cpu", weights_only=True)
            return state, None, ScaleSchedule.named("var-256")
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return state, json.loads(metadata["config"]), ScaleSchedule(json.loads(metadata["schedule"]))
    except KeyError as error:
        raise ValueError(f"{path} carries no {error} in its metadata") from error
    except UnpicklingError as error:
        raise ValueError(f"{path} cannot be read: it is not a PyTorch checkpoint of tensors alone") from error
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _configure(kind: type[Config], path: str | Path, sizes: dict[str, Any], schedule: ScaleSchedule) -> Config:
    """The configuration that a file's sizes name, or a ValueError naming the file."""
    own: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in sizes.items()}
    try:
        return kind(schedule=schedule, **own)
    except TypeError as error:
        raise ValueError(f"{path} carries sizes that are not a {kind.__name__}'s: {', '.join(sizes)}") from error
