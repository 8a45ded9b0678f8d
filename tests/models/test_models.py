"""VAR, its VQ-VAE and the stock cache: checkpoints, arithmetic, sampling, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_models import OBLONG, SCHEDULES, SQUARE, VARIANTS, Masked, Recorder, pair
from torch import Tensor

from amskv_kernels.models import ConcatKVCache, filter_logits
from amskv_kernels.schedule import ScaleSchedule


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
    training = pytest.importorskip("examples.training", reason="training needs tqdm")
    schedule = ScaleSchedule.named("var-256")
    scale = torch.arange(len(schedule)).repeat_interleave(torch.tensor(schedule.tokens))
    q, k, v = torch.randn(3, 2, schedule.total, 2, 16).unbind(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    weights = scores.masked_fill(scale[:, None] < scale, -torch.inf).softmax(-1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    attention = training.BlockCausal(schedule, "cpu")
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
