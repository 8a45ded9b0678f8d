"""Tensor parallelism: the heads and the feed-forward width of a model, dealt to the processes of a mesh.

Pages never cross a head, so each process plans, holds and reads the pages of its own KV heads, and attention knows
nothing of the others. A layer adds up over processes what its last projections give, and nothing else. The first
process's weights count, and its labels and maps during a generation, so that all draw the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amskv_kernels.arguments import instance_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["mesh_of", "ranks_of", "shard"]

# What holds a model's layers, and what of a layer is dealt out, as the public classes name them. The rest is on every
# process as it was, and right: a layer's input and output are whole.
_LAYERS = ("unregistered_blocks", "blocks")
_SELF, _CROSS = ("attn", "sa"), "ca"
_SELF_NEEDS = ("num_heads", "head_dim", "mat_qkv", "q_bias", "zero_k_bias", "v_bias", "proj")
_CROSS_NEEDS = ("num_heads", "head_dim", "mat_q", "mat_kv", "zero_k_bias", "v_bias", "proj")
# Tensors by the dimension that heads are dealt along: once they are projections to q, k and v at once, parts first.
_BY_HEAD = {"q_bias": 0, "k_bias": 0, "zero_k_bias": 0, "v_bias": 0, "scale_mul_1H11": 1, "scale_mul_1H1": 1}
_FUSED = {"mat_qkv": 3, "mat_kv": 2}
_TOLD = ("class_emb", "word_embed")  # what a generation is fed through


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh over which a model is sharded; None where it is whole."""
    return getattr(model, "tensor_parallel_mesh", None)


def ranks_of(model: nn.Module) -> int:
    """How many processes hold a model's heads."""
    mesh = mesh_of(model)
    return 1 if mesh is None else mesh.size()


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Keep this process's share of a model, in place; every process of the mesh calls it with the same model.

    Self-attention and attention to a prompt are cut by heads: projections to q, k and v, their biases, learned lengths.
    The first linear layers of a feed-forward and of an adaptive norm are torch's `ColwiseParallel`, last projections
    `RowwiseParallel`. Embeddings, norms and the head are on every process. Inference only.

    Args:
        model: `VAR` or `InfinityStack`, or an instance of the public class of either, which then is to be patched.
        mesh: of one dimension; the model goes to its devices.

    Returns:
        The model.

    Raises:
        TypeError: no module of such a layout, or no mesh.
        RuntimeError: no process group.
        ValueError: a mesh of several dimensions or without this process, a model that is sharded or patched already or
            another than the first process's, or heads or a width that the mesh's processes do not divide. What one
            process refuses, all refuse.
    """
    instance_of("model", model, nn.Module)
    _check_mesh(mesh)
    layers = _agreed(model, mesh)
    model.requires_grad_(False)
    if mesh.size() == 1:
        model.to(mesh.device_type)
    else:
        _deal(model, layers, mesh)
    vars(model)["tensor_parallel_mesh"] = mesh
    return model


def _check_mesh(mesh: DeviceMesh) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "there is no process group; start the program with torchrun --nproc-per-node N, and make the mesh with "
            "torch.distributed.device_mesh.init_device_mesh"
        )
    instance_of("mesh", mesh, DeviceMesh)
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; it must have one, such as mesh['tp'] of a larger one")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh is of processes {mesh.mesh.tolist()}; this is process {dist.get_rank()}")


def _agreed(model: nn.Module, mesh: DeviceMesh) -> dict[str, Any]:
    """A model's layers, once every process has found that it can be sharded and is the same: all refuse, or none."""
    layers: dict[str, Any] = {}
    found: object
    try:
        layers = _layers(model)
        _check_model(model, layers, mesh.size())
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    except (TypeError, ValueError) as error:
        found = error
    all_found: list[Any] = [found] * mesh.size()
    if mesh.size() > 1:
        dist.all_gather_object(all_found, found, group=mesh.get_group())
    for number, each in enumerate(all_found):
        if isinstance(each, Exception):
            raise each
        if each != all_found[0]:
            names = sorted(
                name for name in each.keys() | all_found[0].keys() if each.get(name) != all_found[0].get(name)
            )
            raise ValueError(f"process {number} brings another model than the first: they differ in {names[0]}")
    return layers


def _layers(model: nn.Module) -> dict[str, Any]:
    """A model's layers, by name."""
    for name in _LAYERS:
        if name in vars(model) or name in model._modules:  # its own, not a wrapper's
            return {f"model.{name}[{number}]": layer for number, layer in enumerate(getattr(model, name))}
    raise TypeError(f"model is a {type(model).__name__} without {' or '.join(_LAYERS)}; it must be a VAR or Infinity")


def _check_model(model: nn.Module, layers: dict[str, Any], ranks: int) -> None:
    if mesh_of(model) is not None:
        raise ValueError(f"model is sharded already, over {ranks_of(model)} processes")
    if any(getattr(module, "_amskv", None) is not None for module in model.modules()):
        raise ValueError("model is patched; shard it first, then patch it")
    if not layers:
        raise TypeError("model has no layers; there is nothing to shard")
    for name, layer in layers.items():
        found = list(_attentions(layer))
        if not any(kind in _SELF for kind, _ in found):
            raise TypeError(
                f"{name} is a {type(layer).__name__} without {' or '.join(_SELF)}; it must be VAR's or Infinity's"
            )
        for kind, attention in found:
            _check_attention(f"{name}.{kind}", kind, attention, ranks)
        for path in _styles(layer):
            _check_linear(name, layer, path)
        width = layer.ffn.fc1.out_features if _has_ffn(layer) else 0
        if width % ranks:
            raise ValueError(f"{name}.ffn has {width} hidden units; {ranks} processes must divide them")


def _check_attention(name: str, kind: str, attention: Any, ranks: int) -> None:
    missing = [need for need in (_CROSS_NEEDS if kind == _CROSS else _SELF_NEEDS) if not hasattr(attention, need)]
    if missing:
        raise TypeError(
            f"{name} is a {type(attention).__name__} without {', '.join(missing)}; it must be laid out as VAR's or "
            "Infinity's"
        )
    for fused, parts in _FUSED.items():
        if hasattr(attention, fused):
            rows, wanted = len(getattr(attention, fused).weight), parts * attention.num_heads * attention.head_dim
            if rows != wanted:
                raise ValueError(f"{name}.{fused} has {rows} rows; {parts} parts of every head are {wanted}")
    if attention.num_heads % ranks:
        raise ValueError(f"{name} has {attention.num_heads} heads; {ranks} processes must divide them")


def _check_linear(name: str, layer: nn.Module, path: str) -> None:
    linear = dict(layer.named_modules()).get(path)  # as `parallelize_module` looks for it: not through wrappers
    if linear is None:
        raise TypeError(f"{name}.{path} is in a wrapper; shard a model before torch.compile or FSDP wraps it")
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{name}.{path} is a {type(linear).__name__}; it must be a torch.nn.Linear")


def _attentions(layer: Any) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(layer, name)) for name in (*_SELF, _CROSS) if hasattr(layer, name))


def _has_ffn(layer: Any) -> bool:
    ffn = getattr(layer, "ffn", None)
    return all(isinstance(getattr(ffn, name, None), nn.Linear) for name in ("fc1", "fc2"))


def _deal(model: nn.Module, layers: dict[str, Any], mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    own: set[int] = set()  # ids of what is this process's share
    for layer in layers.values():
        for _, attention in _attentions(layer):
            own |= {id(tensor) for tensor in _deal_heads(attention, mesh)}
        if _has_ffn(layer) and getattr(layer.ffn, "fused_mlp_func", None) is not None:
            layer.ffn.fused_mlp_func = None  # of the public classes, where flash-attention is: it knows of no shares
        styles = _styles(layer)
        parallelize_module(layer, mesh, styles)
        for name in styles:
            if type(linear := layer.get_submodule(name)) is nn.Linear:
                linear.__class__ = _Linear
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) not in own and not isinstance(tensor, DTensor):
                setattr(module, name, _like(tensor, _share(tensor, mesh, None)))
    for name in _TOLD:
        if isinstance(told := getattr(model, name, None), nn.Module):
            told.register_forward_pre_hook(_Told(mesh))


def _deal_heads(attention: Any, mesh: DeviceMesh) -> Iterator[Tensor]:
    """Cut an attention's tensors by heads; gives those it is left with."""
    for name, parts in _FUSED.items():
        linear = getattr(attention, name, None)
        if linear is not None:
            share = _share(linear.weight.unflatten(0, (parts, -1)), mesh, 1).flatten(0, 1)
            linear.weight, linear.out_features = _like(linear.weight, share), len(share)
            yield linear.weight
    for name, dim in _BY_HEAD.items():
        tensor = getattr(attention, name, None)
        if isinstance(tensor, Tensor):
            setattr(attention, name, _like(tensor, _share(tensor, mesh, dim)))
            yield getattr(attention, name)
    attention.num_heads //= mesh.size()


def _styles(layer: Any) -> dict[str, ParallelStyle]:
    """What torch deals out of a layer, and how."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles: dict[str, ParallelStyle] = {}
    for name, attention in _attentions(layer):
        styles[f"{name}.proj"] = RowwiseParallel()
        if isinstance(getattr(attention, "mat_q", None), nn.Linear):
            styles[f"{name}.mat_q"] = ColwiseParallel()
    if _has_ffn(layer):
        first = [name for name in ("fc1", "fcg") if hasattr(layer.ffn, name)]
        styles |= {f"ffn.{name}": ColwiseParallel() for name in first} | {"ffn.fc2": RowwiseParallel()}
    if type(getattr(layer, "ada_lin", None)) is nn.Sequential and type(layer.ada_lin[-1]) is nn.Linear:
        styles[f"ada_lin.{len(layer.ada_lin) - 1}"] = ColwiseParallel(output_layouts=Replicate())
    return styles


def _share(tensor: Tensor, mesh: DeviceMesh, dim: int | None) -> Tensor:
    """This process's part of the first one's tensor along `dim`, None for all of it; on the mesh's device."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = Replicate() if dim is None else Shard(dim)
    return distribute_tensor(tensor.detach(), mesh, [placement]).to_local()


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter where the old tensor was one, else a buffer."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


class _Linear(nn.Linear):
    """Leaves inference mode: there DTensor finds out anew at every call what a linear layer is made of, which takes ten
    times the time."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return super().forward(input)


class _Told:
    """Before a module's forward: its input becomes the first process's, so that all draw the same."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        told = inputs[0].clone(memory_format=torch.contiguous_format)
        dist.broadcast(told, group=self._mesh.get_group(), group_src=0)
        return (told, *inputs[1:])
