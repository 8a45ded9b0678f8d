"""Tensor parallelism: two processes draw what one draws, each with half the weights of a layer and half the pages."""

import contextlib
import copy

import public_var
import pytest
import torch
import torch.distributed as dist
from small_engines import Unlike
from small_models import OBLONG, SQUARE, infinity_stack, pair
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from amskv_kernels import AMSKV, Full, PagedKVCache, ScaleSchedule, patch
from amskv_kernels.models.infinity import InfinityConfig
from amskv_kernels.models.tensor_parallel import ranks_of, shard
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import parse_policy

HEADS, LAYERS, OTHER_SEED = 4, 2, 99
SIZES = {"depth": LAYERS, "embed_dim": 64 * HEADS, "num_heads": HEADS}
MAPS = ScaleSchedule.named("infinity-0.06m-0.571")
LABELS = torch.tensor([3, 0])


def seeded(make, seed=0):
    """A model whose initial weights follow from the seed."""
    torch.manual_seed(seed)
    return make()


def draw(var, vae, policy, kv_heads, *, labels=LABELS, seed=5, mode=contextlib.nullcontext):
    """Two images with guidance, and the bytes of their pages."""
    config = var.config
    plan = CachePlan.build(config.schedule, parse_policy(policy, config.schedule, LAYERS), LAYERS, kv_heads=kv_heads)
    cache = PagedKVCache(plan, batch=4, kv_heads=kv_heads, head_dim=64, dtype=torch.float32)
    with mode():
        generator = torch.Generator().manual_seed(seed)
        drawn = var.generate(vae, labels, cache, cfg=2.0, top_k=20, top_p=0.9, generator=generator)
    return drawn, cache.nbytes


def drawn_by_half(mesh, schedule, variant, policy, inference):
    """The other process comes with other weights and labels: the first one's count."""
    rank = mesh.get_local_rank()
    var, _ = seeded(lambda: pair(schedule, OTHER_SEED * rank, **SIZES, **variant), rank)
    _, vae = seeded(lambda: pair(schedule, **SIZES, **variant))
    assert shard(var, mesh) is var and ranks_of(var) == mesh.size() == 2
    labels, mode = LABELS + rank, torch.inference_mode if inference else contextlib.nullcontext
    return draw(var, vae, policy, var.kv_heads, labels=labels, mode=mode)


@pytest.mark.parametrize(
    ("schedule", "variant", "policy", "inference"),
    [
        (SQUARE, {}, "full", False),
        (OBLONG, {"shared_adaln": True}, "sliding:1", True),
        (OBLONG, {"attn_l2_norm": False}, "ams-kv:60", False),
        (SQUARE, {}, "h2o:12", True),
        (SQUARE, {}, "recent:40", False),
    ],
    ids=["full", "shared adaLN", "no L2 norm", "H2O", "recent"],
)
def test_two_processes_draw_what_one_draws(two_ranks, schedule, variant, policy, inference):
    expected, whole = draw(*seeded(lambda: pair(schedule, **SIZES, **variant)), policy, HEADS)
    for found, nbytes in two_ranks.run(drawn_by_half, schedule, variant, policy, inference):
        assert torch.equal(found.tokens, expected.tokens)
        torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-5)
        assert 2 * nbytes == whole


def drawn_with_noise_of_its_own(mesh):
    var, vae = seeded(lambda: pair(SQUARE, **SIZES))
    return draw(shard(var, mesh), vae, "full", var.kv_heads, seed=5 + mesh.get_local_rank())[0].tokens


def test_the_first_processs_image_counts_where_noise_differs(two_ranks):
    expected, _ = draw(*seeded(lambda: pair(SQUARE, **SIZES)), "full", HEADS)
    first, other = two_ranks.run(drawn_with_noise_of_its_own)
    assert torch.equal(first, expected.tokens) and not torch.equal(other, first)


def bytes_held(mesh):
    var, _ = seeded(lambda: pair(SQUARE, **SIZES))
    shard(var, mesh)
    held = {name: getattr(p, "to_local", lambda p=p: p)() for name, p in var.state_dict().items()}
    return {name: tensor.numel() for name, tensor in held.items()}, {str(p.device) for p in held.values()}


def test_what_layers_are_made_of_is_halved(two_ranks):
    whole = {name: p.numel() for name, p in pair(SQUARE, **SIZES)[0].state_dict().items()}
    in_full = ("attn.proj.bias", "ffn.fc2.bias")  # added once, to the sum
    for held, _ in two_ranks.run(bytes_held):
        assert held.keys() == whole.keys()
        for name, count in whole.items():
            cut = name.startswith("blocks.") and not name.endswith(in_full)
            assert held[name] * (2 if cut else 1) == count, name


def texts(lengths=(5, 3), width=64 * HEADS):
    features = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0))
    return features, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32), max(lengths)


def stack():
    return infinity_stack(InfinityConfig(layers=2, width=64 * HEADS, heads=HEADS, chunks=1))


def maps(model, policy):
    if policy is None:
        return model.generate(texts(), MAPS), 0
    with patch(model, policy) as patched:
        return model.generate(texts(), MAPS), patched.cache.nbytes


def maps_by_half(mesh, policy):
    return maps(shard(seeded(stack, mesh.get_local_rank()), mesh), policy)


@pytest.mark.parametrize("policy", [None, "full", "sliding:2", "snapkv:50"])
def test_infinity_draws_the_same(two_ranks, policy):
    expected, whole = maps(seeded(stack), policy)
    for found, nbytes in two_ranks.run(maps_by_half, policy):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        assert 2 * nbytes == whole


def public_image(mesh, policy, repository):
    if repository is None:
        model = seeded(lambda: public_var.VAR(heads=HEADS).eval())
    else:
        from test_var import _public_class

        model = seeded(lambda: _public_class(repository))
    if mesh is not None:
        shard(model, mesh)
    with patch(model, policy) as patched:
        return model.autoregressive_infer_cfg(B=2, label_B=LABELS, g_seed=5), patched.cache.nbytes


@pytest.mark.parametrize("policy", [Full(), AMSKV(condensed=0, local=1, demanding_layers=(1,))], ids=str)
@pytest.mark.parametrize("source", ["stand-in", "public class"])
def test_the_public_class_draws_the_same_once_patched(two_ranks, clone, policy, source):
    repository = str(clone("VAR")) if source == "public class" else None
    expected, whole = public_image(None, policy, repository)
    for found, nbytes in two_ranks.run(public_image, policy, repository):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert 2 * nbytes == whole


def tokens_under_autocast(mesh):
    """Any of two processes: what 16 bits round away differs from one process, not between them."""
    var, vae = seeded(lambda: pair(SQUARE, **SIZES))
    shard(var, mesh)
    plan = CachePlan.build(SQUARE, Full(), LAYERS)
    cache = PagedKVCache(plan, batch=4, kv_heads=var.kv_heads, head_dim=64, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return var.generate(vae, LABELS, cache, generator=torch.Generator().manual_seed(1), top_k=20).tokens


def test_autocast_runs_and_processes_agree(two_ranks):
    first, other = two_ranks.run(tokens_under_autocast)
    assert torch.equal(first, other)


def refused(make, *arguments, **named):
    try:
        make(*arguments, **named)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def every_refusal(mesh):
    """What each wrong use says; none of them may touch the model or wait for the other process."""
    rank = mesh.get_local_rank()
    square, alone = init_device_mesh("cpu", (2, 1)), DeviceMesh("cpu", [0])
    fresh = lambda **changes: seeded(lambda: pair(SQUARE, **SIZES | changes))[0]  # noqa: E731
    narrow, headless, public = fresh(mlp_ratio=1 / 256), fresh(), public_var.VAR(heads=HEADS)
    del headless.blocks[1].attn
    lacking = fresh()
    del lacking.blocks[0].attn.v_bias
    empty, unlike_rows, compiled, other_linear = fresh(), fresh(), fresh(), fresh()
    unlike_rows.blocks[0].attn.mat_qkv = nn.Linear(256, 512, bias=False)
    compiled.blocks[0] = torch.compile(compiled.blocks[0])
    other_linear.blocks[1].attn.proj = nn.Identity()
    empty.blocks = nn.ModuleList()
    patched = patch(public, Full())
    sharded, unlike = shard(fresh(), mesh), Unlike()
    said = {
        "module": refused(shard, "var", mesh),
        "layout": refused(shard, nn.Linear(2, 2), mesh),
        "attention": refused(shard, headless, mesh),
        "tensors": refused(shard, lacking, mesh),
        "layers": refused(shard, empty, mesh),
        "rows": refused(shard, unlike_rows, mesh),
        "wrapper": refused(shard, compiled, mesh),
        "wrapped": refused(shard, torch.compile(fresh()), mesh),
        "linear": refused(shard, other_linear, mesh),
        "mesh": refused(shard, fresh(), "cpu"),
        "dimensions": refused(shard, fresh(), square),
        "heads": refused(shard, fresh(num_heads=3, embed_dim=192), mesh),
        "width": refused(shard, narrow, mesh),
        "patched": refused(shard, public, mesh),
        "twice": refused(shard, sharded, mesh),
    }
    patched.undo()
    shard(public, mesh)
    said["unlike heads"] = refused(patch, public, unlike)
    said["unlike heads, made for the schedule"] = refused(patch, public, lambda schedule: unlike)
    said["online"] = refused(patch, public, AMSKV.with_capacity(20, 30), online=True, theta=0.5)
    said["outside"] = refused(shard, fresh(), alone) if rank else f"{ranks_of(shard(fresh(), alone))} process"
    return said


def refused_by_one(mesh, changes):
    var, _ = seeded(lambda: pair(SQUARE, **SIZES | (changes if mesh.get_local_rank() else {})))
    return refused(shard, var, mesh), ranks_of(var)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 1}, "model.blocks[0].attn has 1 heads; 2 processes must divide them"),
        ({"depth": 3}, "process 1 brings another model than the first: they differ in blocks.2."),
        ({"vocab_size": 41}, "process 1 brings another model than the first: they differ in head.bias"),
    ],
    ids=["heads", "depth", "vocabulary"],
)
def test_what_one_process_refuses_all_refuse(two_ranks, changes, words):
    for said, ranks in two_ranks.run(refused_by_one, changes):
        assert said.startswith("ValueError: ") and words in said and ranks == 1


def tokens_of_a_copy(mesh):
    var, vae = seeded(lambda: pair(SQUARE, **SIZES))
    shard(var, mesh)
    copied = copy.deepcopy(var)
    for parameter in copied.parameters():
        if isinstance(parameter, DTensor):
            parameter.to_local().zero_()
    return [draw(each, vae, "full", var.kv_heads)[0].tokens for each in (var, copied)]


def test_a_copy_runs_its_own_weights(two_ranks):
    expected, _ = draw(*seeded(lambda: pair(SQUARE, **SIZES)), "full", HEADS)
    for own, copied in two_ranks.run(tokens_of_a_copy):
        assert torch.equal(own, expected.tokens) and not torch.equal(copied, own)


def test_wrong_uses_are_named(two_ranks):
    first, other = two_ranks.run(every_refusal)
    assert first.pop("outside") == "1 process" and "of processes [0]; this is process 1" in other.pop("outside")
    assert first == other
    for use, words in {
        "module": "TypeError: model is 'var'",
        "layout": "TypeError: model is a Linear without unregistered_blocks or blocks",
        "attention": "TypeError: model.blocks[1] is a Block without attn or sa",
        "tensors": "TypeError: model.blocks[0].attn is a SelfAttention without v_bias",
        "layers": "TypeError: model has no layers",
        "rows": "ValueError: model.blocks[0].attn.mat_qkv has 512 rows; 3 parts of every head are 768",
        "wrapper": "TypeError: model.blocks[0].attn.proj is in a wrapper; shard a model before torch.compile",
        "wrapped": "TypeError: model is a OptimizedModule without unregistered_blocks or blocks",
        "linear": "TypeError: model.blocks[1].attn.proj is a Identity; it must be a torch.nn.Linear",
        "mesh": "TypeError: mesh is 'cpu'",
        "dimensions": "ValueError: mesh has 2 dimensions; it must have one",
        "heads": "ValueError: model.blocks[0].attn has 3 heads; 2 processes must divide them",
        "width": "ValueError: model.blocks[0].ffn has 1 hidden units; 2 processes must divide them",
        "patched": "ValueError: model is patched; shard it first",
        "twice": "ValueError: model is sharded already, over 2 processes",
        "unlike heads": "ValueError: policy is a Unlike, which tells heads apart; the model's are on 2 processes",
        "unlike heads, made for the schedule": "ValueError: policy is a Unlike, which tells heads apart",
        "online": "ValueError: online is True; it decides by all heads, and the model's are on 2 processes",
    }.items():
        assert words in first[use], first[use]


def test_without_a_process_group_nothing_is_sharded():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="no process group; start the program with torchrun"):
        shard(pair(SQUARE, **SIZES)[0], "mesh")
