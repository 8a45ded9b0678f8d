"""Checkpoints as users have them: every layout that holds the weights loads, everything else is named."""

import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from amskv_kernels import ScaleSchedule
from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.models.checkpoint import load, model_shape, save
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4)])
OBLONG = ScaleSchedule([(1, 1), (1, 2), (2, 3)])
VAR_SIZES = {"depth": 3, "embed_dim": 64, "num_heads": 2, "vocab_size": 32, "z_channels": 8, "num_classes": 3}
VAE_SIZES = {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 8, "vocab_size": 32}


def pair(schedule=SCHEDULE, **more):
    torch.manual_seed(0)
    vae = VQVAE(VQVAEConfig(schedule=schedule, **{**VAE_SIZES, "ch_mult": (1, 2)}))
    return VAR(VARConfig(schedule=schedule, **VAR_SIZES, **more)), vae


@pytest.fixture
def files(tmp_path):
    var, vae = pair()
    save(tmp_path / "var.safetensors", var, VAR_SIZES, SCHEDULE)
    save(tmp_path / "vae.safetensors", vae, VAE_SIZES, SCHEDULE)
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    return tmp_path


def same(model, state):
    return all(torch.equal(value, state[name].to(value.dtype)) for name, value in model.state_dict().items())


@pytest.mark.parametrize("more", [{}, {"shared_adaln": True}, {"mlp_ratio": 2.7}, {"mlp_ratio": 3}])
@pytest.mark.parametrize("schedule", [SCHEDULE, OBLONG])
def test_safetensors_come_back(tmp_path, schedule, more):
    var, vae = pair(schedule, **more)
    save(tmp_path / "var.safetensors", var, {**VAR_SIZES, **more}, schedule)
    save(tmp_path / "vae.safetensors", vae, VAE_SIZES, schedule)
    found, _ = load(tmp_path / "var.safetensors", tmp_path / "vae.safetensors")
    assert found.config == var.config
    shape = model_shape(tmp_path / "var.safetensors")
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.schedule) == (3, 2, 32, schedule)
    assert found.config.schedule == schedule
    assert same(found, var.state_dict())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_a_pth_shows_its_sizes(files, shared, normed):
    var, vae = pair(shared_adaln=shared, attn_l2_norm=normed)
    torch.save(var.state_dict(), files / "var.pth")
    found, found_vae = load(files / "var.pth", files / "vae.pth")
    heads = 2 if normed else 1  # without the learned lengths heads are taken to have 64
    assert found.config == VARConfig(
        SCHEDULE, **{**VAR_SIZES, "num_heads": heads}, shared_adaln=shared, attn_l2_norm=normed
    )
    assert same(found, var.state_dict())
    assert same(found_vae, vae.state_dict())
    assert found_vae.config == vae.config


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


LAYOUTS = {
    "the public trainer's": lambda var, vae: {
        "epoch": 3, "iter": 0, "args": {"bs": 768, "depth": 3},
        "trainer": {"config": {"label_smooth": 0.0}, "var_wo_ddp": var, "vae_local": vae, "var_opt": {"optimizer": {}}},
    },
    "without the trainer around": lambda var, vae: {"var_wo_ddp": var, "vae_local": vae},
    "flat": lambda var, vae: {**prefixed(var, "var_wo_ddp."), **prefixed(vae, "vae_local.")},
    "compiled": lambda var, vae: {
        "trainer": {"var_wo_ddp": prefixed(var, "_orig_mod."), "vae_local": prefixed(vae, "_orig_mod.")}
    },
    "distributed": lambda var, vae: {
        "var_wo_ddp": prefixed(var, "module."), "vae_local": prefixed(vae, "module._orig_mod.")
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_training_code_load(tmp_path, layout):
    var, vae = pair()
    torch.save(LAYOUTS[layout](var.state_dict(), vae.state_dict()), tmp_path / "ar-ckpt-last.pth")
    found, found_vae = load(tmp_path / "ar-ckpt-last.pth", tmp_path / "ar-ckpt-last.pth")
    assert same(found, var.state_dict())
    assert same(found_vae, vae.state_dict())


@pytest.mark.parametrize("around", ["state_dict", "model"])
def test_a_state_dict_inside_another_loads(files, around):
    var, _ = pair()
    torch.save({around: var.state_dict(), "step": 7}, files / "var.pth")
    assert same(load(files / "var.pth", files / "vae.pth")[0], var.state_dict())


NO_CHECKPOINTS = {
    "text": b"not a checkpoint\n", "empty": b"", "zeros": bytes(1000), "a pickle's start": b"\x80\x02}q\x00(X",
    "all bytes": bytes(range(256)), "a letter": b"c", "a number": b"I1\n.", "a zip's start": b"PK\x03\x04" + bytes(50),
    "a wrong class": b"cos\nsystem\n(S'true'\ntR.", "deep": b"(" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(files, what, ending):
    path = files / f"x.{ending}"
    path.write_bytes(NO_CHECKPOINTS[what])
    refused(path, files / "vae.pth", "cannot be read: ", path)
    refused(files / "var.safetensors", path, "cannot be read: ", path)


def refused(var, vae, message, named):
    with pytest.raises(ValueError, match=message) as caught:
        load(var, vae)
    assert str(named) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (None, "it holds NoneType; it must hold a state dict"),
        (torch.zeros(3), "it holds Tensor; it must hold a state dict"),
        ([1, 2], "it holds list"),
        (3, "it holds int"),
        ("text", "it holds str"),
        ({}, "it holds nothing"),
        ({"a": 1}, "it holds int under 'a'; it must hold tensors by name"),
        ({1: torch.zeros(1)}, "it holds Tensor under '1'"),
        ({"trainer": None}, "it holds NoneType under 'trainer'"),
        ({"trainer": {"var_wo_ddp": []}}, "it holds list under 'var_wo_ddp'"),
        ({"a": torch.zeros(1)}, "holds no VAR: 'word_embed.weight' is missing"),
        ({"word_embed.weight": torch.zeros(3)}, r"word_embed.weight is of shape \(3,\); it must have 2 dimensions"),
        ({"a": torch.eye(3).to_sparse()}, "it holds a sparse, quantized or empty tensor under 'a'; it must hold plain"),
        ({"a": torch.zeros(3, device="meta")}, "it holds a sparse, quantized or empty tensor under 'a'"),
        ({"word_embed.weight": torch.zeros(0, 8)}, r"word_embed.weight is of shape \(0, 8\)"),
    ],
)
def test_what_is_saved_but_no_state_dict_is_named(files, saved, message):
    torch.save(saved, files / "x.pth")
    refused(files / "x.pth", files / "vae.pth", message, files / "x.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_not_finite_are_named(files, which, value):
    """Sampling would end in a probability of nan, on a GPU in an assertion that takes the process along."""
    state, names = pair()[which].state_dict(), ("blocks.1.attn.proj.bias", "quantize.embedding.weight")
    state[names[which]].view(-1)[3] = value
    torch.save(state, files / "x.pth")
    paths = [files / "var.pth", files / "vae.pth"]
    torch.save(pair()[0].state_dict(), paths[0])
    paths[which] = files / "x.pth"
    refused(*paths, f"{names[which]} has values that are not finite", "x.pth")


def test_files_given_in_the_others_place_are_named(files):
    torch.save(pair()[0].state_dict(), files / "var.pth")
    refused(files / "vae.pth", files / "vae.pth", "holds no VAR: 'word_embed.weight' is missing", "vae.pth")
    refused(files / "var.pth", files / "var.pth", "holds no VQVAE: 'encoder.conv_in.weight' is missing", "var.pth")


def test_weights_that_do_not_fit_each_other_are_named(files):
    state = pair()[0].state_dict()
    for change in (
        lambda raw: raw.pop("blocks.1.attn.proj.bias"),
        lambda raw: raw.update({"blocks.2.ffn.fc1.weight": torch.zeros(3, 64)}),
        lambda raw: raw.update({"blocks.9.x": torch.zeros(1)}),
        lambda raw: raw.update({"lvl_1L": torch.zeros(1, 31, dtype=torch.int64)}),
    ):
        raw = dict(state)
        change(raw)
        torch.save(raw, files / "x.pth")
        refused(files / "x.pth", files / "vae.pth", "x.pth", files / "x.pth")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"depth": 10**9}, "depth is 1000000000 by its metadata and 3 by its weights"),
        ({"depth": 8.0}, "depth is 8.0; it must be a whole number"),
        ({"depth": 3.0}, "depth is 3.0; it must be a whole number"),
        ({"depth": True}, "depth is True; it must be a whole number"),
        ({"depth": []}, r"depth is \(\); it must be a whole number"),
        ({"depth": None}, "depth is None; it must be a whole number"),
        ({"embed_dim": 2**62}, "embed_dim is 4611686018427387904 by its metadata and 64"),
        ({"embed_dim": 2**64}, "cannot be read: 18446744073709551616 is out of range"),
        ({"mlp_ratio": 1e300}, "mlp_ratio is 1e"),
        ({"mlp_ratio": "4"}, "mlp_ratio is 4; it must be a number"),
        ({"attn_l2_norm": 1}, "attn_l2_norm is 1; it must be true or false"),
        ({"num_heads": 0}, "num_heads is 0 by its metadata and 2"),
        ({"width": 3}, "width is no size of a VARConfig; its sizes are attn_l2_norm, depth"),
        ({"schedule": None}, "schedule is no size of a VARConfig"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights_are_named(files, sizes, message):
    rewritten(files, "var", config=json.dumps({**VAR_SIZES, **sizes}))
    refused(files / "x.safetensors", files / "vae.pth", message, files / "x.safetensors")


def rewritten(files, which, **metadata):
    """x.safetensors: another's tensors with other metadata."""
    with safe_open(files / f"{which}.safetensors", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(held, files / "x.safetensors", metadata={**file.metadata(), **metadata})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "[]"}, "its sizes are list; they must be an object"),
        ({"config": "{"}, "cannot be read: "),
        ({"config": "[" * 100_000}, "it is nested too deeply"),
        ({"config": '{"depth": 1e999}'}, "1e999 is not finite"),
        ({"config": '{"depth": NaN}'}, "NaN is not finite"),
        ({"schedule": "null"}, "sizes is None; it must be a sequence"),
        ({"schedule": "[]"}, "sizes is empty"),
        ({"schedule": "[[1, 1], [1000000000, 1000000000]]"}, "cannot be read: sizes "),
        ({"schedule": "[[1, 1], [1000, 1000]]"}, "its schedule is not that of its buffer of levels"),
        ({"schedule": "[[1, 1], [2, 2], [3, 3], [8, 2], [1, 1]]"}, "its schedule is not that of its buffer"),
    ],
)
def test_metadata_that_is_none_is_named(files, metadata, message):
    rewritten(files, "var", **metadata)
    refused(files / "x.safetensors", files / "vae.pth", message, files / "x.safetensors")


@pytest.mark.parametrize("name", ["ch", "num_res_blocks", "z_channels", "vocab_size", "image_channels", "num_phi"])
def test_huge_sizes_of_an_autoencoder_take_no_memory(files, name):
    rewritten(files, "vae", config=json.dumps({**VAE_SIZES, name: 10**9}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        files / "var.safetensors", files / "x.safetensors", f"{name} is 1000000000 by its metadata", "x.safetensors"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB, that is 1 GiB


def test_unknown_models_and_devices_are_refused_before_a_file_is_read(tmp_path):
    with pytest.raises(ValueError, match="model 'var-d99' is not a released one"):
        load(tmp_path / "no.pth", tmp_path / "no.pth", "var-d99")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        load(tmp_path / "no.pth", tmp_path / "no.pth", device="tpu")


def test_another_model_than_named_is_told_by_its_sizes(files):
    torch.save(pair()[0].state_dict(), files / "var.pth")
    with pytest.raises(
        ValueError, match=r"var.pth has other sizes than var-d16: schedule is custom and must be var-256"
    ):
        load(files / "var.pth", files / "vae.pth", "var-d16")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_an_infinity_shows_its_shape(tmp_path, ending):
    path = tmp_path / f"infinity.{ending}"
    state = InfinityStack(InfinityConfig(layers=4, width=128, heads=2, chunks=2)).state_dict()
    torch.save(state, path) if ending == "pth" else save_file(state, path)
    shape = model_shape(path)
    assert (shape.name, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == ("infinity", 4, 2, 2, 64)
    assert shape.schedule == ScaleSchedule.named("infinity-1m-1.000")
    assert model_shape(path, SCHEDULE).schedule == SCHEDULE
    state.pop("block_chunks.0.module.0.sa.scale_mul_1H11")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no Infinity: field 'block_chunks\.0\..*' is missing"):
        model_shape(tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"infinity\..* holds no VAR: '.*' is missing"):
        load(path, path)


def test_files_of_the_old_format_load(files):
    var, _ = pair()
    torch.save(var.state_dict(), files / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load(files / "old.pth", files / "vae.pth")[0], var.state_dict())
