"""Files out of clones of the public code; what they import and a CPU does not have is stood in for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.nn import functional as F

from amskv_kernels.models.infinity import text_attention


def _flash(q, k, v, dropout_p=0.0, softmax_scale=None, **_):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)


def _varlen(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale):
    batch = len(cu_seqlens_q) - 1
    return text_attention(q.unflatten(0, (batch, -1)), kv, cu_seqlens_k, max_seqlen_k, softmax_scale).flatten(0, 1)


# What a CPU without these packages gets in their place, by module.
_STOOD_IN = {
    "flash_attn": {
        "flash_attn_func": _flash, "flash_attn_varlen_kvpacked_func": _varlen, "flash_attn_qkvpacked_func": None,
    },
    "timm": {"__path__": []}, "timm.models": {"__path__": []},
    "timm.models.layers": dict.fromkeys(("drop_path", "to_2tuple", "trunc_normal_")) | {"DropPath": nn.Identity},
    "timm.models.vision_transformer": dict.fromkeys(("Mlp", "PatchEmbed", "_cfg")),
    "timm.models.registry": {"register_model": None},
    "einops": {"rearrange": lambda x, pattern: x[:, None, None]},
    "hart_backend": {"__path__": []}, "hart_backend.fused_kernels": {},
    "infinity.utils.sequence_parallel": {
        "sp_all_to_all": None, "SequenceParallelManager": type("Off", (), {"sp_on": staticmethod(lambda: False)}),
    },
    "infinity.schedules.dynamic_resolution": {"get_first_full_spatial_size_scale_index": None},
}  # fmt: skip
_ABSENT = {package for name in _STOOD_IN if importlib.util.find_spec(package := name.split(".")[0]) is None}
# Packages that several of the repositories have under one name; what their __init__ files import is left out.
_OWN = ("models", "hart", "infinity", "infinity.models", "infinity.utils", "infinity.schedules")


def _stand_in(folder: Path) -> None:
    """Let what follows import from a clone, file by file; what was imported from another is forgotten."""
    for name in [name for name in sys.modules if name.split(".")[0] in _OWN]:
        del sys.modules[name]
    own = {name: {"__path__": [str(folder / name.replace(".", "/"))]} for name in _OWN}
    for name, attributes in {**own, **_STOOD_IN}.items():
        package = name.split(".")[0]
        if package in _OWN or (package in _ABSENT and name not in sys.modules):
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)


def _file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def public(folder: Path, path: str, name: str) -> ModuleType:
    """One file of a clone, under a name of its own."""
    _stand_in(folder)
    return _file(folder / path, f"clone_{name}")
