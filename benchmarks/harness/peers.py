"""Everyone who runs in a race: our backends, and the peers, each with contiguous K, V handed to it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from amskv_kernels import ops
from amskv_kernels.ops.checks import PlannedAttn
from amskv_kernels.ops.prepared import prepare_attn
from amskv_kernels.ops.quantise import quantise
from amskv_kernels.planning.layout import ROWS_BITS
from benchmarks.harness.inputs import CallInputs, Dense, UnavailableError, gather

OURS = "amskv"
CONTIGUOUS = "amskv contiguous"
STOCK = "concatenation"
EIGHT_BIT = OURS + " {}, int8 pages"  # of a backend
PAGE = 128  # of the contiguous run: the largest page there is
SCORE_BYTES = 4 << 30  # the torch backend writes all scores on a GPU: beyond this it is not measured

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contestant:
    """Calls, one per set; `output` makes of a call's result the (B, n, H, D) tensor to check."""

    calls: Sequence[Call]
    output: Callable[[Any], Tensor]
    stores: bool = False
    eager: bool = False  # waits for the device: no graph can hold it
    rounded: bool = False  # reads a history of eight bits


def backends(device: str) -> tuple[str, list[str]]:
    """The backend that serves `attn` by itself, and all that can serve it when forced."""
    auto = ops.choose("attn", device).backend
    able = []
    for name in ops.dispatch.BACKENDS:
        try:
            with ops.backend(name):
                able.append(ops.choose("attn", device).backend)
        except RuntimeError:
            continue
    return auto, able


def ours(inputs: CallInputs, backend: str = "auto") -> Contestant:
    """Our op on the generation's own pages, storing what must be kept."""
    score_bytes = 4 * inputs.work.flops // (4 * inputs.case.shape.head_dim)
    if backend == "torch" and inputs.pool.device == "cuda" and score_bytes > SCORE_BYTES:
        raise UnavailableError(f"its scores would take {score_bytes / 2**30:.0f} GiB")
    with ops.backend(backend):  # as the cache calls it: what the plan knows is worked out beforehand
        ready = [prepare_attn(planned(inputs, i)) for i in range(inputs.sets)]
    calls = [
        functools.partial(call, *qkv, inputs.scale) for call, qkv in zip(ready, inputs.qkv[: inputs.sets], strict=True)
    ]
    return Contestant(calls, lambda out: out, stores=True, eager=backend == "torch")


def eight_bit(inputs: CallInputs, backend: str = "auto") -> Contestant:
    """Our op on the same pool in int8 pages, of which what it reads is filled, storing into them."""
    pool, dtype = inputs.pool, inputs.pool.pages.dtype
    pages, scales = torch.empty_like(pool.pages, dtype=torch.int8), torch.empty_like(pool.pages[..., 0]).float()
    exact, rows, row_scales = (x.unflatten(0, (-1, pool.case.plan.pages)) for x in (pool.pages, pages, scales))
    for page in (torch.cat([read.flatten() for read, _ in inputs.tables]) >> ROWS_BITS).unique().tolist():
        rows[:, page], row_scales[:, page] = quantise(exact[:, page])
    calls = []
    with ops.backend(backend):
        for tables, qkv in zip(inputs.tables, inputs.qkv, strict=False):
            call = prepare_attn(PlannedAttn(pages, pool.arena, *tables, inputs.group.n, dtype, scales))
            calls.append(functools.partial(call, *qkv, inputs.scale))
    return Contestant(calls, lambda out: out, rounded=True)


def planned(inputs: CallInputs, i: int) -> PlannedAttn:
    """The call on set `i` as a plan knows it."""
    return PlannedAttn(inputs.pool.pages, inputs.pool.arena, *inputs.tables[i], inputs.group.n, inputs.pool.pages.dtype)


def contiguous(inputs: CallInputs) -> Contestant:
    """Our op on histories in one run of full pages each, storing nothing: what paging costs is the difference."""
    batch, _, kv_heads, head_dim = inputs.qkv[0][1].shape
    history = inputs.dense(0).k.shape[2] - inputs.group.n
    count = -(-history // PAGE)
    made = []
    for i in range(inputs.sets):
        k, v = inputs.qkv[i][1:]
        pages = k.new_zeros(batch * kv_heads * count, 2, PAGE, head_dim)
        rows = pages.view(batch, kv_heads, count, 2, PAGE, head_dim)
        for j, held in enumerate(gather(inputs.pool.pages, inputs.pool.arena, inputs.tables[i][0])):
            padded = F.pad(held, (0, 0, 0, count * PAGE - history))
            rows[:, :, :, j] = padded.view(batch, kv_heads, count, PAGE, head_dim)
        arena = torch.arange(batch * kv_heads, dtype=torch.int32, device=k.device).view(batch, kv_heads) * count
        slots = [page << ROWS_BITS | min(PAGE, history - page * PAGE) for page in range(count)]
        read = torch.tensor(slots, dtype=torch.int32, device=k.device).view(1, 1, -1)
        made.append((k, v, pages, arena, read, read[..., :0].contiguous()))

    def call(i: int) -> tuple[Tensor, Tensor]:
        return torch.ops.amskv.attn(inputs.qkv[i][0], *made[i], inputs.scale)

    return Contestant([functools.partial(call, i) for i in range(inputs.sets)], lambda result: result[0])


def concatenation(inputs: CallInputs) -> Contestant:
    """What stock code does: K held in fp32, both concatenated anew, K cast, attention; inputs as stock has them."""
    inputs.dense(0)  # refuses heads of different lengths
    made = []
    for i in range(inputs.sets):
        q, k, v = inputs.qkv[i]
        held_k, held_v = gather(inputs.pool.pages, inputs.pool.arena, inputs.tables[i][0])
        made.append((q.transpose(1, 2), held_k.float(), k.float().transpose(1, 2), held_v, v.transpose(1, 2)))

    def call(i: int) -> Tensor:
        q, held_k, k, held_v, v = made[i]
        keys, values = torch.cat((held_k, k), dim=2), torch.cat((held_v, v), dim=2)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys.to(v.dtype), values, scale=inputs.scale, enable_gqa=gqa)

    return Contestant([functools.partial(call, i) for i in range(inputs.sets)], lambda out: out.transpose(1, 2))


Prepare = Callable[[Dense], Call]


def _sdpa(backend: SDPBackend | None) -> Prepare:
    def prepare(dense: Dense) -> Call:
        def call() -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(
                    dense.q, dense.k, dense.v, scale=dense.scale, enable_gqa=dense.gqa
                )
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    dense.q, dense.k, dense.v, scale=dense.scale, enable_gqa=dense.gqa
                )

        return call

    return prepare


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Past its limit torch would quietly run the slow eager version: rather let it fail, and say so.
    for name, value in (("recompile_limit", 256), ("fail_on_recompile_limit_hit", True)):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, value)
    return torch.compile(flex_attention, dynamic=True)


def _flex(dense: Dense) -> Call:
    flex = _compiled_flex()
    return lambda: flex(dense.q, dense.k, dense.v, scale=dense.scale, enable_gqa=dense.gqa)


def _flash3(dense: Dense) -> Call:
    from flash_attn_interface import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in (dense.q, dense.k, dense.v))

    def call() -> Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=dense.scale, causal=False)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _flash4(dense: Dense) -> Call:
    """FlashAttention-4, in CuTe DSL: the package flash-attn-4."""
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in (dense.q, dense.k, dense.v))

    def call() -> Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=dense.scale, causal=False)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _given(where: str) -> Prepare:
    """A peer of the user's own, FILE.py:FUNCTION: it takes contiguous q, k, v and the scale, as `Dense` has them, and
    gives a call that returns (B, H, n, D).

    Raises:
        ValueError: no such file, or no such function in it.
    """
    path, _, name = where.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"a peer is at {where!r}; it must be NAME=FILE.py:FUNCTION of a file that is there")
    spec = spec_from_file_location(f"amskv_peer_{name}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(prepare := getattr(module, name, None)):
        raise ValueError(f"a peer is {name!r}; {path} has no function of that name")
    return lambda dense: prepare(dense.q, dense.k, dense.v, dense.scale)


def _not_given(_: Dense) -> Call:
    raise UnavailableError("its code is not on PyPI: --peer 'HeatKV=FILE.py:FUNCTION' takes what a user has of it")


def _flashinfer(dense: Dense) -> Call:
    """Its paged prefill, on pages of 16 in one run."""
    import flashinfer

    device, (batch, heads, n, head_dim) = dense.q.device, dense.q.shape
    kv_heads, keys = dense.k.shape[1:3]
    count, page = -(-keys // 16), 16
    pages = dense.k.new_zeros(batch, count * page, 2, kv_heads, head_dim)
    pages[:, :keys, 0], pages[:, :keys, 1] = dense.k.transpose(1, 2), dense.v.transpose(1, 2)
    pages = pages.view(batch * count, page, 2, kv_heads, head_dim).transpose(1, 2).contiguous()

    def every(stride: int) -> Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * stride

    q = dense.q.transpose(1, 2).reshape(batch * n, heads, head_dim).contiguous()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
    wrapper.plan(
        every(n), every(count), torch.arange(batch * count, dtype=torch.int32, device=device),
        torch.full((batch,), keys - (count - 1) * page, dtype=torch.int32, device=device),
        heads, kv_heads, head_dim, page, causal=False, sm_scale=dense.scale, q_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, pages).view(batch, n, heads, head_dim).transpose(1, 2)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Peer:
    """Another implementation: (B, H, n, D) out of contiguous K, V."""

    name: str
    prepare: Prepare
    devices: tuple[str, ...] = ("cuda",)
    package: str | None = None


PEERS = (
    Peer("SDPA", _sdpa(None), ("cpu",)),
    Peer("cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("FlexAttention", _flex, package="triton"),
    Peer("FlashInfer", _flashinfer, package="flashinfer"),
    Peer("FlashAttention-3", _flash3, package="flash_attn_interface"),
    Peer("FlashAttention-4", _flash4, package="flash_attn.cute"),
    Peer("HeatKV", _not_given),
)
_others: dict[str, Peer] = {}


def add(text: str) -> None:
    """One more peer, "NAME=FILE.py:FUNCTION"; one of a known name takes its place.

    Raises:
        ValueError: not of this form, or the function cannot be had.
    """
    name, _, where = text.partition("=")
    _others[name] = Peer(name, _given(where), ("cuda", "cpu"))


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False


def peer(which: Peer, inputs: CallInputs) -> Contestant:
    """A peer with K and V made contiguous for it, outside the timing.

    Raises:
        UnavailableError: its package is not installed.
    """
    if which.package is not None and not _installed(which.package):
        raise UnavailableError(f"{which.package} is not installed")
    calls = [which.prepare(inputs.dense(i)) for i in range(inputs.sets)]
    return Contestant(calls, lambda out: out.transpose(1, 2))


def line_up(inputs: CallInputs) -> dict[str, Callable[[], Contestant]]:
    """All contestants of this device by name, each made when it is called for, ours first."""
    device = inputs.pool.device
    auto, able = backends(device)
    makers: dict[str, Callable[[], Contestant]] = {OURS: functools.partial(ours, inputs)}
    for name in able:
        if name != auto:
            makers[f"{OURS} {name}"] = functools.partial(ours, inputs, name)
    if device == "cuda" and inputs.group.history:
        makers[CONTIGUOUS] = functools.partial(contiguous, inputs)
    for name in able if inputs.group.history else ():
        if name not in ("torch", "hopper"):  # one indexes page by page, one leaves int8 pages to "cuda"
            makers[EIGHT_BIT.format(name)] = functools.partial(eight_bit, inputs, name)
    makers[STOCK] = functools.partial(concatenation, inputs)
    for which in ({each.name: each for each in PEERS} | _others).values():
        if device in which.devices:
            makers[which.name] = functools.partial(peer, which, inputs)
    return makers
