"""State dicts: the released models' keys and shapes, and whatever does not fit them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import SQUARE, VARIANTS, Masked, pair

from amskv_kernels.models import VAR, VQVAE, VARConfig, VQVAEConfig
from amskv_kernels.schedule import ScaleSchedule


def official_var_shapes(depth: int, width: int, heads: int, schedule: ScaleSchedule, shared: bool) -> dict[str, tuple]:
    """The released checkpoints' keys and shapes, spelled out."""
    total, scales = schedule.total, len(schedule)
    shapes: dict[str, tuple] = {
        "pos_start": (1, schedule.tokens[0], width), "pos_1LC": (1, total, width), "lvl_1L": (1, total),
        "attn_bias_for_masking": (1, 1, total, total), "word_embed.weight": (width, 32), "word_embed.bias": (width,),
        "class_emb.weight": (1001, width), "lvl_embed.weight": (scales, width),
        "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (4096, width), "head.bias": (4096,),
    }  # fmt: skip
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,)}
    for i in range(depth):
        block = {
            "attn.scale_mul_1H11": (1, heads, 1, 1), "attn.q_bias": (width,), "attn.v_bias": (width,),
            "attn.zero_k_bias": (width,), "attn.mat_qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "ffn.fc1.weight": (4 * width, width), "ffn.fc1.bias": (4 * width,),
            "ffn.fc2.weight": (width, 4 * width), "ffn.fc2.bias": (width,),
        }  # fmt: skip
        if shared:
            block["ada_gss"] = (1, 1, 6, width)
        else:
            block |= {"ada_lin.1.weight": (6 * width, width), "ada_lin.1.bias": (6 * width,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    return shapes


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_named_models_have_the_released_keys(depth: int) -> None:
    config = VARConfig.named(f"var-d{depth}")
    assert config.head_dim == 64
    with torch.device("meta"):
        state = VAR(config).state_dict()
    schedule = ScaleSchedule.named("var-512" if depth == 36 else "var-256")
    wanted = official_var_shapes(depth, 64 * depth, depth, schedule, shared=depth == 36)
    assert {key: tuple(value.shape) for key, value in state.items()} == wanted
    assert state["lvl_1L"].dtype == torch.int64


def test_released_vqvae_keys() -> None:
    with torch.device("meta"):
        state = {key: tuple(value.shape) for key, value in VQVAE(VQVAEConfig()).state_dict().items()}
    assert len(state) == 324
    some = {
        "quantize.embedding.weight": (4096, 32), "quantize.ema_vocab_hit_SV": (10, 4096),
        "quantize.quant_resi.qresi_ls.3.weight": (32, 32, 3, 3), "quant_conv.weight": (32, 32, 3, 3),
        "post_quant_conv.bias": (32,), "encoder.conv_in.weight": (160, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (160, 160, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (320, 160, 1, 1),
        "encoder.down.4.attn.1.qkv.weight": (1920, 640, 1, 1), "encoder.mid.attn_1.proj_out.bias": (640,),
        "encoder.conv_out.weight": (32, 640, 3, 3), "decoder.conv_in.weight": (640, 32, 3, 3),
        "decoder.up.4.attn.2.norm.weight": (640,), "decoder.up.4.upsample.conv.weight": (640, 640, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (160, 320, 1, 1),
        "decoder.up.0.block.2.conv2.weight": (160, 160, 3, 3),
        "decoder.norm_out.weight": (160,), "decoder.conv_out.weight": (3, 160, 3, 3),
    }  # fmt: skip
    assert {key: state.get(key) for key in some} == some
    assert "decoder.up.0.upsample.conv.weight" not in state and "encoder.down.4.downsample.conv.weight" not in state


@VARIANTS
def test_state_dict_round_trip(variant: dict[str, bool]) -> None:
    one, _ = pair(SQUARE, 3, **variant)
    other, _ = pair(SQUARE, 4, **variant)
    other.load_state_dict(one.state_dict())
    inputs, labels = torch.randn(2, SQUARE.total - 1, 6), torch.tensor([0, 5])
    assert torch.equal(one.logits(labels, inputs, Masked(one)), other.logits(labels, inputs, Masked(other)))


@pytest.mark.parametrize("which", [0, 1], ids=["VAR", "VQVAE"])
def test_a_wrong_state_dict_is_named_and_changes_nothing(which: int) -> None:
    model = pair(SQUARE)[which]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {key: value + 1 for key, value in before.items()}
    keys = [key for key in wrong if key.endswith(".bias")]
    del wrong[keys[0]]
    wrong["nonsense"] = torch.zeros(1)
    wrong[keys[1]] = torch.zeros(3, 3)
    with pytest.raises(ValueError) as caught:
        model.load_state_dict(wrong)
    message = str(caught.value)
    assert f"missing: {keys[0]}" in message and "unknown: nonsense" in message
    assert f"{keys[1]} is (3, 3) and must be {tuple(before[keys[1]].shape)}" in message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_many_faults_are_counted() -> None:
    model, _ = pair(SQUARE)
    with pytest.raises(ValueError, match=rf"missing: .*, … \({len(model.state_dict())} in all\)"):
        model.load_state_dict({})


def test_usage_statistics_of_another_schedule_do_not_matter() -> None:
    _, vae = pair(SQUARE)
    state = vae.state_dict()
    state["quantize.ema_vocab_hit_SV"] = torch.ones(10, 40)
    vae.load_state_dict(state)
    assert vae.quantize.ema_vocab_hit_SV.shape == (len(SQUARE), 40)
    assert state["quantize.ema_vocab_hit_SV"].shape == (10, 40)


@pytest.mark.parametrize(
    ("config", "changes", "word"),
    [
        (VARConfig.named("var-d16"), {"num_heads": 7}, "num_heads is 7"),
        (VARConfig.named("var-d16"), {"depth": 0}, "depth is 0"),
        (VQVAEConfig(), {"ch": 33}, "ch_mult"),
        (VQVAEConfig(), {"phi_ratio": 1.5}, "phi_ratio is 1.5"),
        (VQVAEConfig(), {"z_channels": -1}, "z_channels is -1"),
    ],
)
def test_impossible_sizes_are_named(config: VARConfig | VQVAEConfig, changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_unknown_model_name() -> None:
    with pytest.raises(ValueError, match="var-d16"):
        VARConfig.named("var-d17")
