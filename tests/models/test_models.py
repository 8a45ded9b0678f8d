"""VAR, its VQ-VAE and the stock cache: checkpoints, arithmetic, sampling, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, VARConfig, VQVAEConfig, filter_logits
from amskv_kernels.models.vqvae import phi_of_scales
from amskv_kernels.schedule import ScaleSchedule

SQUARE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (5, 5)])
OBLONG = ScaleSchedule([(1, 1), (1, 2), (2, 3), (4, 3), (4, 6)])
SCHEDULES = pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
VARIANTS = pytest.mark.parametrize(
    "variant",
    [{}, {"shared_adaln": True}, {"attn_l2_norm": False}],
    ids=["plain", "shared adaLN", "no L2 norm"],
)


def shuffled(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values that matter, zero-initialised ones too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim < 2 else 1.0 / parameter[0].numel() ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def pair(schedule: ScaleSchedule, seed: int = 0, **changes: object) -> tuple[VAR, VQVAE]:
    """A small random VAR with its VQ-VAE."""
    vae = VQVAE(VQVAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=6, vocab_size=40, schedule=schedule))
    config = VARConfig(schedule, depth=2, embed_dim=64, num_heads=2, vocab_size=40, z_channels=6, num_classes=5)
    var = VAR(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    shuffled(var, seed)
    shuffled(vae, seed + 1)
    return var.eval(), vae.eval()


class Masked:
    """All scales in one pass: a plain softmax over a mask, in the caller's dtype."""

    def __init__(self, var: VAR) -> None:
        self.mask = var.attn_bias_for_masking[0, 0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        n = q.shape[1]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale + self.mask[:n, :n]
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Recorder(ConcatKVCache):
    """The stock cache, noting what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int, tuple[torch.dtype, ...]]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        self.calls.append((layer, q.shape[1], (q.dtype, k.dtype, v.dtype)))
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return super().attend(layer, q, k, v, softmax_scale)


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


def test_phi_of_the_released_schedule() -> None:
    # scales 2 and 7 lie exactly between two of the four, and 64-bit rounding decides
    assert phi_of_scales(10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scales(1) == (0,)
    assert sorted(set(phi_of_scales(14))) == [0, 1, 2, 3]


@SCHEDULES
def test_tokens_are_the_greedy_residual_codes(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    h, w = schedule.sizes[-1]
    images = torch.rand(2, 3, 2 * h, 2 * w)
    with torch.no_grad():
        tokens, rest = vae.tokens(images), vae.features(images)
        assert tokens.shape == (2, schedule.total) and tokens.dtype == torch.int64
        for k, part in enumerate(tokens.split(list(schedule.tokens), dim=1)):
            wanted = torch.nn.functional.adaptive_avg_pool2d(rest, schedule.sizes[k]).flatten(2).transpose(1, 2)
            distance = torch.cdist(wanted, vae.quantize.embedding.weight.expand(2, -1, -1))
            chosen = distance.gather(2, part[..., None])[..., 0]
            assert torch.allclose(chosen, distance.amin(2), atol=1e-4)
            rest = rest - vae.quantize.spread(k, part)
        assert torch.allclose(vae.latent(tokens), vae.features(images) - rest, atol=1e-5)


@SCHEDULES
def test_inputs_are_the_partial_sums_at_the_next_size(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    tokens = torch.randint(40, (3, schedule.total))
    with torch.no_grad():
        inputs = vae.inputs(tokens)
        assert inputs.shape == (3, schedule.total - 1, 6) and inputs.dtype == torch.float32
        fhat = torch.zeros(3, 6, *schedule.sizes[-1])
        parts = tokens.split(list(schedule.tokens), dim=1)
        for k, part in enumerate(parts[:-1]):
            fhat = fhat + vae.quantize.spread(k, part)
            at, n = schedule.offsets[k + 1] - 1, schedule.tokens[k + 1]
            assert torch.allclose(inputs[:, at : at + n], vae.quantize.next_map(k + 1, fhat), atol=1e-5)
        fhat = fhat + vae.quantize.spread(len(parts) - 1, parts[-1])
        assert torch.allclose(vae.decode(fhat), vae.decode(vae.latent(tokens)), atol=1e-5)


@SCHEDULES
def test_later_tokens_do_not_reach_earlier_inputs(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    tokens = torch.randint(40, (1, schedule.total))
    changed = tokens.clone()
    at = schedule.offsets[2]
    changed[:, at:] = (changed[:, at:] + 1) % 40
    with torch.no_grad():
        one, other = vae.inputs(tokens), vae.inputs(changed)
    upto = schedule.offsets[3] - 1
    first = at - 1 + schedule.tokens[2]
    assert first == upto and torch.equal(one[:, :upto], other[:, :upto])
    assert not torch.equal(one[:, upto:], other[:, upto:])


def test_vqvae_refuses_wrong_sizes() -> None:
    _, vae = pair(OBLONG)
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 8, 8\); it must be \(B, 3, 8, 12\)"):
        vae.tokens(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tokens is torch\.int64"):
        vae.latent(torch.zeros(1, OBLONG.total + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens is torch\.float32"):
        vae.inputs(torch.zeros(1, OBLONG.total))


def brute_force(row: Tensor, top_k: int, top_p: float) -> set[int]:
    """Which tokens of one row survive, by the definition, in fp64."""
    order = sorted(range(len(row)), key=lambda i: -float(row[i]))
    kept = order[:top_k] if top_k else order
    if top_p:
        chance = row.double()[kept].softmax(0)
        tail = [float(chance[i:].sum()) for i in range(len(kept))]  # what is lost when cutting from i on
        kept = [token for i, token in enumerate(kept) if i == 0 or tail[i] > 1 - top_p]
    return set(kept)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (7, 0.0), (0, 0.6), (0, 1.0), (9, 0.5), (40, 0.97)])
def test_filter_against_brute_force(top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 4, 40) * 3
    before = logits.clone()
    out = filter_logits(logits, top_k, top_p)
    assert torch.equal(logits, before)
    for row, got in zip(logits.flatten(0, 1), out.flatten(0, 1), strict=True):
        kept = set(got.isfinite().nonzero().flatten().tolist())
        assert kept == brute_force(row, top_k, top_p)
        assert all(got[i] == row[i] for i in kept)


def test_filter_always_keeps_one() -> None:
    out = filter_logits(torch.tensor([[0.0, 50.0, 1.0]]), 0, 1e-6)
    assert out.isfinite().tolist() == [[False, True, False]]


@SCHEDULES
@VARIANTS
def test_generation_is_reproducible(schedule: ScaleSchedule, variant: dict[str, bool]) -> None:
    var, vae = pair(schedule, **variant)
    labels = torch.tensor([0, 4, 5])

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return var.generate(vae, labels, ConcatKVCache(), top_k=20, generator=generator)

    images, tokens = draw(1)
    h, w = schedule.sizes[-1]
    assert images.shape == (3, 3, 2 * h, 2 * w) and images.dtype == torch.float32
    assert tokens.shape == (3, schedule.total) and tokens.dtype == torch.int64
    assert images.min() >= 0 and images.max() <= 1 and tokens.min() >= 0 and tokens.max() < 40
    assert not images.requires_grad
    again = draw(1)
    assert torch.equal(tokens, again[1]) and torch.equal(images, again[0])
    assert not torch.equal(tokens, draw(2)[1])
    with torch.no_grad():
        assert torch.allclose(images, vae.decode(vae.latent(tokens)), atol=1e-5)


@SCHEDULES
@VARIANTS
def test_teacher_forcing_equals_generation(schedule: ScaleSchedule, variant: dict[str, bool]) -> None:
    """The logits of every step, taken from generation by greedy choice at cfg 0, equal those of one masked pass."""
    var, vae = pair(schedule, **variant)
    labels = torch.tensor([2, 5])
    steps: list[Tensor] = []
    hook = var.head.register_forward_hook(lambda module, given, out: steps.append(out[:2]))
    tokens = var.generate(vae, labels, ConcatKVCache(), cfg=0.0, top_k=1, top_p=0.0).tokens
    hook.remove()
    with torch.no_grad():
        logits = var.logits(labels, vae.inputs(tokens), Masked(var))
    assert torch.allclose(torch.cat(steps, dim=1), logits, atol=1e-4)
    assert torch.equal(logits.argmax(-1), tokens)


def test_teacher_forcing_on_the_first_scales_only() -> None:
    var, vae = pair(OBLONG)
    labels, end = torch.tensor([1, 0]), OBLONG.offsets[3]
    with torch.no_grad():
        inputs = vae.inputs(torch.randint(40, (2, OBLONG.total)))
        whole, part = (var.logits(labels, x, Masked(var)) for x in (inputs, inputs[:, : end - 1]))
    assert torch.allclose(whole[:, :end], part, atol=1e-5)


def test_guidance_mixes_the_two_halves() -> None:
    var, vae = pair(SQUARE)
    labels = torch.tensor([1, 3])
    raw: list[Tensor] = []
    hook = var.head.register_forward_hook(lambda module, given, out: raw.append(out))
    tokens = var.generate(vae, labels, ConcatKVCache(), cfg=2.0, top_k=1, top_p=0.0).tokens
    hook.remove()
    for k, part in enumerate(tokens.split(list(SQUARE.tokens), dim=1)):
        t = 2.0 * k / 3
        assert torch.equal(((1 + t) * raw[k][:2] - t * raw[k][2:]).argmax(-1), part)


def test_without_a_class_guidance_changes_nothing() -> None:
    var, vae = pair(SQUARE)
    none = torch.tensor([5, 5])
    one, other = (var.generate(vae, none, ConcatKVCache(), cfg=cfg, top_k=1, top_p=0.0).tokens for cfg in (0.0, 4.0))
    assert torch.equal(one, other)


def test_layers_and_steps_come_in_order() -> None:
    var, vae = pair(OBLONG)
    cache, told = Recorder(), list[tuple[int, int]]()
    var.generate(vae, torch.tensor([0]), cache, top_k=5, progress=lambda done, of: told.append((done, of)))
    assert [(layer, n) for layer, n, _ in cache.calls] == [(layer, n) for n in OBLONG.tokens for layer in (0, 1)]
    assert told == [(i + 1, len(OBLONG)) for i in range(len(OBLONG))]
    assert cache.bytes == 2 * 2 * 2 * 2 * 32 * OBLONG.total * 4  # layers, K and V, CFG, heads, D, tokens, fp32
    cache.reset()
    assert cache.bytes == 0


@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_sixteen_bit_models(how: str) -> None:
    """Stock keys stay fp32 beside 16-bit values; any other attention gets one dtype."""
    var, vae = pair(SQUARE)
    if how == "converted":
        var = var.bfloat16()
    stock, plain = Recorder(), Recorder()
    plain.keeps_fp32_keys = False
    for cache in (stock, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            images, _ = var.generate(vae, torch.tensor([1]), cache, top_k=3)
        assert images.dtype == torch.float32 and images.isfinite().all()
    wide, narrow = torch.float32, torch.bfloat16
    assert {dtypes for *_, dtypes in stock.calls} == {(wide, wide, narrow)}
    assert {dtypes for *_, dtypes in plain.calls} == {(narrow, narrow, narrow)}
    assert stock.bytes * 2 == plain.bytes * 3


def test_schedule_of_one_scale() -> None:
    schedule = ScaleSchedule([(2, 3)])
    var, vae = pair(schedule)
    images, tokens = var.generate(vae, torch.tensor([0, 1]), ConcatKVCache(), top_k=3)
    assert images.shape == (2, 3, 4, 6) and tokens.shape == (2, 6)
    with torch.no_grad():
        inputs = vae.inputs(tokens)
        assert inputs.shape == (2, 0, 6)
        assert var.logits(torch.tensor([0, 1]), inputs, Masked(var)).shape == (2, 6, 40)


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([6]), torch.tensor([-1]), torch.zeros(0).long()],
    ids=["float", "2-D", "too large", "negative", "none"],
)
def test_bad_labels(labels: Tensor) -> None:
    var, vae = pair(SQUARE)
    cache = ConcatKVCache()
    with pytest.raises(ValueError, match=r"^labels "):
        var.generate(vae, labels, cache, top_k=3)
    with pytest.raises(ValueError, match=r"^labels "):
        var.logits(labels, torch.zeros(len(labels), SQUARE.total - 1, 6), cache)
    assert cache.bytes == 0


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 41), ("top_k", -1), ("top_p", 1.01), ("top_p", -0.1), ("cfg", float("nan"))]
)
def test_bad_sampling_arguments(name: str, value: float) -> None:
    var, vae = pair(SQUARE)
    arguments = {"top_k": 3, name: value}
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        var.generate(vae, torch.tensor([0]), ConcatKVCache(), **arguments)  # type: ignore[arg-type]


def test_a_vae_of_another_model_is_refused() -> None:
    var, _ = pair(SQUARE)
    _, vae = pair(OBLONG)
    with pytest.raises(ValueError, match="vae has schedule"):
        var.generate(vae, torch.tensor([0]), ConcatKVCache(), top_k=3)


def test_inputs_of_a_shape_that_fits_no_scale() -> None:
    var, _ = pair(SQUARE)
    for shape in [(1, SQUARE.total, 6), (2, SQUARE.total - 1, 6), (1, SQUARE.total - 1, 5), (SQUARE.total - 1, 6)]:
        with pytest.raises(ValueError, match=r"^inputs has shape"):
            var.logits(torch.tensor([0]), torch.zeros(shape), Masked(var))


def test_stock_cache_refuses_another_batch() -> None:
    cache = ConcatKVCache()
    x = torch.randn(2, 3, 2, 8)
    cache.attend(0, x, x, x, 1.0)
    other = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"k has shape \(1, 3, 2, 8\); it must be \(2, n, 2, 8\)"):
        cache.attend(0, other, other, other, 1.0)


def test_training_attention_is_block_causal() -> None:
    train = pytest.importorskip("examples.digits.train", reason="the digits example needs scikit-learn and tqdm")
    schedule = ScaleSchedule.named("var-256")
    scale = torch.arange(len(schedule)).repeat_interleave(torch.tensor(schedule.tokens))
    q, k, v = torch.randn(3, 2, schedule.total, 2, 16).unbind(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    weights = scores.masked_fill(scale[:, None] < scale, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    attention = train.BlockCausal(schedule, "cpu")
    assert torch.allclose(attention.attend(0, q, k, v, 0.3), wanted, atol=1e-5)
    end = schedule.offsets[8]
    part = attention.attend(0, q[:, :end], k[:, :end], v[:, :end], 0.3)
    assert torch.allclose(part, wanted[:, :end], atol=1e-5)


def test_the_digits_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = pytest.importorskip("examples.digits.train", reason="the digits example needs scikit-learn and tqdm")
    monkeypatch.setattr("examples.digits.evaluate.POLICIES", ("full",))
    model = pytest.importorskip("examples.digits.model")
    train.main(["--quick", "--out", str(tmp_path)])
    var, vae = model.load(weights=tmp_path)
    assert var.config.schedule == vae.config.schedule == ScaleSchedule.named("var-256")
    assert not any(parameter.requires_grad for parameter in (*var.parameters(), *vae.parameters()))
    log = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert log["vqvae_log"][-1]["step"] == log["plan"]["vae_steps"]
    assert log["var_log"][-1]["step"] == log["plan"]["var_steps"]
    assert set(log["generated"]["recognised"]) == {"full"}
    train.main(["--quick", "--out", str(tmp_path)])  # finished: goes on from the last checkpoint and changes nothing
    for name, value in model.load(weights=tmp_path)[0].state_dict().items():
        assert torch.equal(value, var.state_dict()[name])
