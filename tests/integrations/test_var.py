"""Patching the public VAR class: the stand-in always, a real clone with `pytest --repo VAR=DIR`."""

import sys
import weakref
from types import ModuleType, SimpleNamespace

import public_var
import pytest
import torch
from torch.nn import functional as F

from amskv_kernels import AMSKV, H2O, Full, HeatKV, PagedKVCache, ScaleKV, ScaleSchedule, SlidingWindow, patch
from amskv_kernels.calibrate import AttentionRecorder, SimilarityRecorder
from amskv_kernels.integrations import caches
from amskv_kernels.policies import HeadOrders

LABELS = torch.tensor([3, 7])
POLICY = AMSKV(condensed=0, local=1, demanding_local=2, demanding_layers=(1,))


@pytest.fixture(params=["stand-in", "stand-in, no l2 norm", "public class"])
def model(request, clone):
    torch.manual_seed(7)
    if request.param == "public class":
        return _public_class(str(clone("VAR")))
    return public_var.VAR(attn_l2_norm=request.param == "stand-in").eval()


def _public_class(repository):
    hub = ModuleType("huggingface_hub")  # of which the public class takes the base of another class
    hub.PyTorchModelHubMixin = type(
        "PyTorchModelHubMixin", (), {"__init_subclass__": classmethod(lambda *_, **__: None)}
    )
    sys.modules.setdefault("huggingface_hub", hub)
    sys.path.insert(0, repository)
    try:
        from models import VAR, VQVAE
    finally:
        sys.path.remove(repository)
    vae = VQVAE(vocab_size=64, ch=32, v_patch_nums=(1, 2, 3, 5), test_mode=True)
    var = VAR(
        vae, num_classes=10, depth=3, embed_dim=128, num_heads=2, attn_l2_norm=True, patch_nums=(1, 2, 3, 5),
        flash_if_available=False, fused_if_available=False,
    )  # fmt: skip
    var.init_weights(init_adaln=0.5, init_adaln_gamma=1.0, init_head=20.0)
    for block in var.blocks:  # initial weights are too small for attention to show in the images
        block.attn.proj.weight.data.mul_(20)
        block.attn.mat_qkv.weight.data.mul_(20)
    for p in [*var.parameters(), *vae.parameters()]:
        p.requires_grad_(False)
    return var.eval()


def images(model, labels=LABELS, **kwargs):
    return model.autoregressive_infer_cfg(B=len(labels), label_B=labels, g_seed=5, **kwargs)


def test_full_gives_the_same_images(model):
    expected = images(model)
    with patch(model, Full()) as patched:
        torch.testing.assert_close(images(model), expected, rtol=0, atol=2e-5)
        assert patched.cache.step == len(model.patch_nums)
        assert patched.cache.plan is patched.plan
    assert torch.equal(images(model), expected)


def test_a_policy_is_attention_masked_to_the_visible_scales(model, monkeypatch):
    schedule = ScaleSchedule([(p, p) for p in model.patch_nums])
    with patch(model, POLICY):
        got = images(model)
    attentions = [block.attn for block in model.blocks]
    for layer, attention in enumerate(attentions):
        if isinstance(attention, public_var.SelfAttention):
            monkeypatch.setattr(attention, "sees", lambda step, layer=layer: POLICY.visible(schedule, layer, step))
        else:
            _mask_public(
                monkeypatch, attention, lambda step, layer=layer: POLICY.visible(schedule, layer, step), schedule
            )
    masked = images(model)
    torch.testing.assert_close(got, masked, rtol=0, atol=2e-5)
    monkeypatch.undo()
    assert (images(model) - masked).abs().max() > 1e-3, "the mask changes the images"


def test_token_and_head_policies_run_through_the_patch(model):
    schedule = ScaleSchedule([(p, p) for p in model.patch_nums])
    expected = images(model)
    scores = torch.rand(3, 2, len(schedule), generator=torch.Generator().manual_seed(0)).tolist()
    released = ScaleKV(16, drafters=((0,),))  # 16 tokens are all but the last scale: lossless
    for policy, lossless in ((H2O(6), False), (HeatKV(0.7, HeadOrders.from_scores(scores, schedule, 1)), False),
                             (released, True)):  # fmt: skip
        with patch(model, policy) as patched:
            got = images(model)
            assert patched.plan.lossless == lossless
        difference = float((got - expected).abs().max())
        assert difference < 2e-5 if lossless else 1e-4 < difference < 10


def test_released_scalekv_gets_its_raw_queries(monkeypatch):
    model = public_var.VAR(patch_nums=(1, 2, 4, 5, 6)).eval()
    seen = []
    prepare = PagedKVCache.prepare
    monkeypatch.setattr(PagedKVCache, "prepare", lambda *a: (seen.append((a[2].shape, a[3].shape)), prepare(*a))[1])
    with patch(model, ScaleKV(20, drafters=((0,),))) as patched:
        assert torch.isfinite(images(model)).all()
        assert not patched.plan.lossless
    assert seen[-1] == ((4, 36, 128), (128, 128))


def _mask_public(monkeypatch, attention, visible, schedule):
    """Make a public attention module ignore the scales that the policy does not show, by a mask over its keys."""
    original = attention.forward

    def forward(x, attn_bias):
        held = 0 if attention.cached_k is None else attention.cached_k.shape[2]
        step = schedule.offsets.index(held)
        shown = [scale in (*visible(step), step) for scale in range(step + 1)]
        mask = torch.cat([torch.full((schedule.tokens[i],), 0.0 if s else -torch.inf) for i, s in enumerate(shown)])
        return original(x, mask.expand(1, 1, x.shape[1], -1))

    monkeypatch.setattr(attention, "forward", forward)


def test_generations_of_other_batches_follow_each_other(model):
    with patch(model, POLICY) as patched:
        first = images(model)
        pool = patched.cache.pages
        again = images(model)
        assert patched.cache.pages is pool
        images(model, torch.tensor([1, 2, 3]))
        assert patched.cache.batch == 6
        assert torch.equal(first, again)
        torch.testing.assert_close(images(model), first, rtol=0, atol=1e-6)


def test_an_interrupted_generation_does_no_harm(model, monkeypatch):
    with patch(model, POLICY):
        expected = images(model)
        with monkeypatch.context() as m:
            m.setattr(model.blocks[1], "forward", lambda *a, **k: (_ for _ in ()).throw(InterruptedError))
            with pytest.raises(InterruptedError):
                images(model)
        assert torch.equal(images(model), expected)


@pytest.mark.parametrize("recorder", [AttentionRecorder, SimilarityRecorder])
def test_every_recorder_listens(recorder):
    model = public_var.VAR().eval()
    listening = recorder(ScaleSchedule([(p, p) for p in model.patch_nums]), len(model.blocks))
    seen = []

    def observe(layer, q, k, v, softmax_scale):
        seen.append((layer, *(tuple(x.shape) for x in (q, k, v)), softmax_scale))
        listening.observe(layer, q, k, v, softmax_scale)

    with patch(model, Full(), observe=observe):
        images(model)
    assert listening.images == 2
    assert seen == [(layer, *[(4, p * p, 2, 64)] * 3, 1.0) for p in model.patch_nums for layer in range(3)]


def test_training_forward_is_untouched():
    model = public_var.VAR()
    labels, bias = torch.tensor([1, 2]), torch.zeros(1, 1, 39, 39)
    expected = model(labels, bias)
    with patch(model, Full()):
        got = model(labels, bias)
        got.sum().backward()
    assert torch.equal(got, expected)
    assert model.blocks[0].attn.mat_qkv.weight.grad is not None


def test_autocast_keeps_sixteen_bit_pages():
    torch.manual_seed(0)
    model = public_var.VAR().eval()
    truth = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        stock = images(model)
        with patch(model, Full()) as patched:
            got = images(model)
            assert patched.cache.pages.dtype == torch.bfloat16
    assert F.mse_loss(got.float(), truth) < 1.5 * F.mse_loss(stock.float(), truth)


def test_undo_restores_every_module():
    model = public_var.VAR()
    before = [dict(block.attn.__dict__) for block in model.blocks]
    patched = patch(model, SlidingWindow(1))
    with pytest.raises(ValueError, match=r"model is patched already; undo\(\) that patch first"):
        patch(model, Full())
    patched.undo()
    patched.undo()
    assert [set(block.attn.__dict__) for block in model.blocks] == [set(x) for x in before]
    patch(model, Full()).undo()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            SimpleNamespace(patch_nums=(1,), blocks=[SimpleNamespace(attn=torch.nn.Linear(2, 2))]),
            r"model.blocks\[0\].attn is a Linear without num_heads, head_dim",
        ),
        (SimpleNamespace(patch_nums=(1,), blocks=[SimpleNamespace()]), r"model.blocks\[0\].attn is a NoneType without"),
    ],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(TypeError, match=message):
        patch(model, Full())


def test_a_policy_that_does_not_fit_is_refused_before_anything_is_patched():
    model = public_var.VAR(depth=2)
    with pytest.raises(ValueError, match="demanding_layers names layer 5; this model has layers 0 … 1"):
        patch(model, AMSKV(demanding_layers=(5,)))
    assert "forward" not in model.blocks[0].attn.__dict__


def test_inference_mode_and_back():
    model = public_var.VAR().eval()
    expected = images(model)
    with patch(model, Full()):
        with torch.inference_mode():
            torch.testing.assert_close(images(model), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(images(model), expected, rtol=0, atol=2e-5)


def test_never_two_pools_at_a_time(monkeypatch):
    model, alive = public_var.VAR().eval(), []

    class Counted(PagedKVCache):
        def __init__(self, *args, **kwargs):
            assert not any(cache() is not None for cache in alive)
            alive.append(weakref.ref(self))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(caches, "PagedKVCache", Counted)
    with patch(model, Full()):
        images(model)
        images(model, torch.tensor([1, 2, 3]))
    assert len(alive) == 2
