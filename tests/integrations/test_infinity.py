"""Patching Infinity: the stack with its arithmetic and stock caching, on every published aspect ratio."""

import importlib.util
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amskv_kernels import AMSKV, Full, ScaleSchedule, SlidingWindow, patch
from amskv_kernels.calibrate import AttentionRecorder, SimilarityRecorder
from amskv_kernels.models import infinity as stack
from amskv_kernels.models.infinity import InfinityConfig, InfinityStack
from amskv_kernels.policies import H2O, HeadOrders, HeatKV, ScaleKV, SnapKV

RATIOS = sorted({name.rsplit("-", 1)[1] for name in ScaleSchedule.names() if name.startswith("infinity")})
SMALL = ScaleSchedule.named("infinity-0.06m-1.000")
WIDE = ScaleSchedule.named("infinity-0.06m-0.571")


@pytest.fixture
def model():
    torch.manual_seed(5)
    made = InfinityStack(InfinityConfig(layers=4, width=128, heads=2, chunks=2))
    for block in made.unregistered_blocks:  # initial weights are too small for attention to show in the maps
        torch.nn.init.normal_(block.sa.scale_mul_1H11, 2.0)
        for bias in (block.sa.q_bias, block.sa.v_bias, block.ca.v_bias):
            torch.nn.init.normal_(bias)
        for linear in (block.sa.mat_qkv, block.sa.proj, block.ca.mat_kv):
            linear.weight.data.mul_(3)
    return made.eval()


def prompts(lengths=(5, 3), width=128, seed=0):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(lengths), width, generator=rng)
    return features, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), max(lengths)


def test_all_fifteen_ratios_are_published():
    assert len(RATIOS) == 15


@pytest.mark.parametrize("ratio", RATIOS)
def test_full_gives_the_same_maps_at_every_aspect_ratio(model, ratio):
    text = prompts()
    with patch(model, Full()) as patched:
        for pixels in ("0.06m", "0.25m"):
            schedule = ScaleSchedule.named(f"infinity-{pixels}-{ratio}")
            got = model.generate(text, schedule)
            assert patched.plan.schedule == schedule
            assert patched.cache.step == len(schedule)
            patched.undo()
            torch.testing.assert_close(got, model.generate(text, schedule), rtol=0, atol=2e-4)
            patched = patch(model, Full())
        patched.undo()


@pytest.mark.parametrize("schedule", [SMALL, WIDE], ids=lambda s: s.name)
@pytest.mark.parametrize("mode", ["released", "paper"])
def test_scalekv_runs_and_changes_little(model, schedule, mode):
    text = prompts()
    expected = model.generate(text, schedule)
    with patch(model, ScaleKV(0.5, mode)) as patched:
        got = model.generate(text, schedule)
        assert patched.plan.selection is not None
    error, size = (got - expected).square().mean(), expected.square().mean()
    assert 1e-9 < error / size < 0.5


def test_raw_queries_are_the_projection_without_its_bias(model, monkeypatch):
    seen = []
    original = torch.ops.amskv.window_scores

    def spy(q_window, k, pages, arena, read, scale, mode, *page_scales):
        seen.append((q_window.clone(), scale, mode))
        return original(q_window, k, pages, arena, read, scale, mode, *page_scales)

    inputs = []
    block = model.unregistered_blocks[0].sa
    with patch(model, ScaleKV(0.5, drafters=((1,),))) as patched:
        forward = block.forward
        object.__setattr__(block, "forward", lambda x, *a, **k: (inputs.append(x.clone()), forward(x, *a, **k))[1])
        monkeypatch.setattr("amskv_kernels.cache.selector.torch.ops.amskv.window_scores", spy)
        model.generate(prompts(), SMALL)
        plan = patched.plan
        steps = [step for step in range(len(SMALL)) if plan.compaction(step, 0) is not None]
    assert steps
    firsts = list(seen)[:: max(1, len(seen) // len(steps))]
    weight = block.mat_qkv.weight[:128]
    window = list(plan.selection.observing(SMALL.sizes[steps[0]]))
    expected = F.linear(inputs[steps[0]][:, window], weight).view(2, len(window), 2, 64)
    assert any(e[0].shape == expected.shape and torch.allclose(e[0], expected, atol=1e-5) for e in seen)
    assert {mode for _, _, mode in firsts} == {"sum_logits"}
    assert {scale for _, scale, _ in firsts} == {1 / 8}


@pytest.mark.parametrize(
    "policy", [AMSKV(demanding_layers=(1,)), SlidingWindow(2), SnapKV(60), H2O(60)], ids=lambda p: type(p).__name__
)
def test_other_policies_run_on_several_ratios_in_turn(model, policy):
    text = prompts()
    with patch(model, policy) as patched:
        first = model.generate(text, SMALL)
        pool = patched.cache.pages
        assert torch.equal(model.generate(text, SMALL), first)
        assert patched.cache.pages is pool
        wide = model.generate(text, WIDE)
        assert wide.shape[2:] == WIDE.sizes[-1]
        model.generate(prompts((4, 2, 6)), WIDE)
        assert patched.cache.batch == 3
        torch.testing.assert_close(model.generate(text, SMALL), first, rtol=0, atol=1e-6)


def test_a_policy_may_be_made_for_each_schedule(model):
    with patch(model, lambda schedule: AMSKV.for_saving(schedule, 4, 0.7)) as patched:
        for schedule in (SMALL, WIDE):
            model.generate(prompts(), schedule)
            assert patched.plan.retained_tokens <= 0.31 * 4 * schedule.total


def test_heads_drop_scales_of_their_own(model):
    scores = torch.rand(4, 2, len(SMALL)).tolist()
    with patch(model, HeatKV(0.5, HeadOrders.from_scores(scores, SMALL))) as patched:
        assert torch.isfinite(model.generate(prompts(), SMALL)).all()
        assert patched.plan.heads == 2


def test_a_recorder_measures_what_passes_by(model):
    recorder = AttentionRecorder(SMALL, 4, top=4)
    with patch(model, Full(), observe=recorder.observe):
        model.generate(prompts(), SMALL)
    assert recorder.images == 1
    similarity = SimilarityRecorder(SMALL, 4)
    with patch(model, Full(), observe=similarity.observe):
        model.generate(prompts(), SMALL)
    assert len(similarity.similarity()) == 4
    found = recorder.drafters(2)
    with patch(model, ScaleKV(0.4, drafters=found.layers)):
        model.generate(prompts(), SMALL)


def test_text_is_projected_once_per_prompt_and_layer(model, monkeypatch):
    calls = []
    original = F.linear

    def count(x, weight, bias=None):
        calls.append(weight.shape)
        return original(x, weight, bias)

    monkeypatch.setattr("amskv_kernels.integrations.infinity.F.linear", count)
    kv = model.unregistered_blocks[0].ca.mat_kv.weight.shape
    with patch(model, Full()) as patched:
        first = model.generate(prompts(), SMALL)
        assert sum(shape == kv for shape in calls) == 4
        other = model.generate(prompts(seed=1), SMALL)
        assert sum(shape == kv for shape in calls) == 8
        assert (first - other).abs().max() > 1e-3
        assert not patched.prompts, "a generation leaves no text behind"
    calls.clear()
    model.generate(prompts(), SMALL)
    assert sum(shape == kv for shape in calls) == 4 * len(SMALL)


def test_an_interrupted_generation_leaves_no_text_behind(model, monkeypatch):
    def interrupt(*args):
        raise InterruptedError

    monkeypatch.setattr(model.unregistered_blocks[-1].ffn, "forward", interrupt)
    with pytest.raises(InterruptedError), patch(model, Full()) as patched:
        model.generate(prompts(), SMALL)
    assert not patched.prompts


def test_text_changed_in_place_is_projected_again(model):
    text = prompts()
    with patch(model, Full()) as patched:
        block = model.unregistered_blocks[0].ca
        patched.caching = True
        x = torch.randn(2, 3, 128)
        with torch.no_grad():
            before = block(x, text)
            text[0].mul_(2)
            assert not torch.allclose(block(x, text), before)


def test_the_models_own_text_attention_is_used_where_its_module_has_one(model, monkeypatch):
    used = []

    def varlen(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale):
        used.append((q.dtype, kv.dtype, q.shape, cu_seqlens_q.tolist()))
        batch = len(cu_seqlens_q) - 1
        return stack.text_attention(q.unflatten(0, (batch, -1)), kv, cu_seqlens_k, max_seqlen_k, softmax_scale).flatten(
            0, 1
        )

    expected = model.generate(prompts(), SMALL)
    monkeypatch.setattr(stack, "flash_attn_varlen_kvpacked_func", varlen, raising=False)
    with patch(model, Full()):
        got = model.generate(prompts(), SMALL)
    assert used[1] == (torch.bfloat16, torch.bfloat16, (2, 2, 64), [0, 1, 2])
    assert F.mse_loss(got, expected) < 1e-2 * expected.square().mean()


def test_autocast_keeps_sixteen_bit_pages_and_is_as_far_from_fp32_as_stock(model):
    truth = model.generate(prompts(), SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(prompts(), SMALL)
        with patch(model, Full()) as patched:
            got = model.generate(prompts(), SMALL)
            assert patched.cache.pages.dtype == torch.bfloat16
    assert F.mse_loss(got, expected) < 0.02 * expected.square().mean()
    assert F.mse_loss(got.float(), truth) < 1.5 * F.mse_loss(expected.float(), truth)


def test_undo_restores_every_module(model):
    modules = [m for block in model.unregistered_blocks for m in (block.sa, block.ca)]
    before = [set(module.__dict__) for module in modules]
    patched = patch(model, Full())
    with pytest.raises(ValueError, match=r"model is patched already; undo\(\) that patch first"):
        patch(model, Full())
    patched.undo()
    patched.undo()
    assert [set(module.__dict__) for module in modules] == before


def test_a_forward_with_a_mask_is_the_models_own(model):
    block, x, bias = model.unregistered_blocks[0].sa, torch.randn(1, 5, 128), torch.zeros(1, 1, 5, 5)
    expected = block(x, bias)
    with patch(model, Full()):
        assert torch.equal(block(x, bias), expected)


def test_models_that_are_laid_out_otherwise_are_refused(model):
    with pytest.raises(TypeError, match=r"\[0\].sa is a int without num_heads"):
        patch(SimpleNamespace(unregistered_blocks=[SimpleNamespace(sa=1, ca=2)]), Full())
    model.unregistered_blocks[1].ca = nn.Identity()
    with pytest.raises(TypeError, match=r"unregistered_blocks\[1\].ca is a Identity without num_heads"):
        patch(model, Full())
    del model.unregistered_blocks[1].ca
    with pytest.raises(TypeError, match=r"unregistered_blocks\[1\] is a Block without ca"):
        patch(model, Full())
    assert "_amskv" not in vars(model.unregistered_blocks[0].sa)


def test_a_policy_that_does_not_fit_is_refused_before_anything_is_patched(model):
    with pytest.raises(ValueError, match="demanding_layers names layer 9"):
        patch(model, AMSKV(demanding_layers=(9,)))
    assert "forward" not in model.unregistered_blocks[0].sa.__dict__


def test_videos_are_refused(model):
    with patch(model, Full()) as patched:
        patched.caching = patched._begins = True
        with torch.no_grad(), pytest.raises(ValueError, match="only images are supported"):
            model.unregistered_blocks[0].sa(torch.randn(1, 4, 128), None, None, [(2, 1, 2)])


def _public_block(repository, monkeypatch):
    """The public transformer block, with CPU stand-ins for what it imports from flash_attn and timm."""

    def varlen(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale):
        batch = len(cu_seqlens_q) - 1
        out = stack.text_attention(q.unflatten(0, (batch, -1)), kv, cu_seqlens_k, max_seqlen_k, softmax_scale)
        return out.flatten(0, 1)

    modules = {name: ModuleType(name) for name in ("flash_attn", "timm", "timm.models", "timm.models.layers")}
    modules["flash_attn"].flash_attn_func = modules["timm.models.layers"].drop_path = None
    modules["flash_attn"].flash_attn_varlen_kvpacked_func = varlen
    modules["timm.models.layers"].DropPath = torch.nn.Identity
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = f"{repository}/infinity/models/basic.py"
    spec = importlib.util.spec_from_file_location("public_infinity_basic", path)
    public = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, public)
    spec.loader.exec_module(public)
    return public


@pytest.mark.parametrize("ratio", ["1.000", "0.571"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_public_blocks_give_the_same(clone, monkeypatch, ratio):
    public = _public_block(clone("Infinity"), monkeypatch)
    schedule = ScaleSchedule.named(f"infinity-0.06m-{ratio}")
    sizes = stack.triples(schedule)

    def modulate(C, eps, x, scale, shift):
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift

    torch.manual_seed(2)
    blocks = [
        public.CrossAttnBlock(
            embed_dim=128, kv_dim=128, cross_attn_layer_scale=-1, cond_dim=128, act=True, shared_aln=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), num_heads=2, cos_attn=True, fused_norm_func=modulate,
            rope2d_normalized_by_hw=2,
        )
        for _ in range(2)
    ]  # fmt: skip
    grid = public.precompute_rope2d_freqs_grid(64, {1.0: {"1M": {"scales": sizes}}}, rope2d_normalized_by_hw=2)
    text, cond = prompts(), torch.randn(2, 1, 6, 128)
    inputs = [torch.randn(2, n, 128) for n in schedule.tokens]

    @torch.no_grad()
    def run():
        for block in blocks:
            block.sa.kv_caching(True)
        maps = []
        for scale, x in enumerate(inputs):
            for block in blocks:
                x = block(x, cond, text, None, None, sizes, grid, scale)
            maps.append(x)
        for block in blocks:
            block.sa.kv_caching(False)
        return maps

    expected = run()
    with patch(SimpleNamespace(unregistered_blocks=blocks), Full()) as patched:
        got = run()
        assert patched.cache.step == len(schedule)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_released_sizes():
    assert InfinityConfig.named("infinity-8b") == InfinityConfig(40, 3584, 28)
    assert InfinityConfig.named("infinity-2b").head_dim == 128
    for name, billions in (("infinity-2b", 2.2), ("infinity-8b", 8.3)):
        with torch.device("meta"):
            model = InfinityStack(InfinityConfig.named(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.05)
        assert f"block_chunks.7.module.{model.config.layers // 8 - 1}.sa.mat_qkv.weight" in model.state_dict()
    for make, message in (
        (lambda: InfinityConfig.named("x"), "model 'x' is not a released one"),
        (lambda: InfinityConfig(4, 100, 3), "heads is 3; it must divide 100"),
        (lambda: InfinityConfig(4, 128, 0), "heads is 0; it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert "amskv_kernels.models.infinity" in sys.modules
