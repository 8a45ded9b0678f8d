"""What `patch` refuses: relatives of the public classes, and arguments that fit no model."""

from types import SimpleNamespace

import public_var
import pytest
import torch
from families import FAMILIES
from torch import nn

from amskv_kernels import AMSKV, Full, ScaleSchedule, patch, unpatch
from amskv_kernels.models import infinity as stack


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_a_refused_patch_leaves_the_model_as_it_was(family):
    model = family.make()
    before = [(type(m), set(vars(m))) for m in model.modules()]
    for policy, kind, message in (
        (3, TypeError, "policy is 3; it must be a Policy, a string or a function of the schedule"),
        (AMSKV(demanding_layers=(9,)), ValueError, "demanding_layers names layer 9"),
    ):
        with pytest.raises(kind, match=message):
            patch(model, policy)
        assert [(type(m), set(vars(m))) for m in model.modules()] == before
    family.attentions(model)[-1].head_dim = 60
    with pytest.raises(ValueError, match=r"\[2\]\.\w+\.head_dim is 60; it must be a multiple of 8"):
        patch(model, Full())
    assert [(type(m), set(vars(m))) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"page_size": 24}, ValueError, r"page_size is 24; it must be one of \(16, 32, 64, 128\)"),
        ({"observe": 3}, TypeError, r"observe is 3; it must be callable as \(layer, q, k, v, softmax_scale\)"),
        ({"theta": 0.5}, ValueError, "theta is 0.5; it means something to online=True alone"),
        ({"theta": "x", "online": True}, TypeError, "theta is 'x'; it must be a number"),
        ({"theta": float("nan"), "online": True}, ValueError, "theta is nan; it must be a similarity"),
        (
            {"theta": 0.5, "online": True},
            TypeError,
            r"policy is Full\(\); the online mode needs an AMSKV",
        ),
        ({"policy": AMSKV.with_capacity(9, 9), "online": True}, ValueError, "theta is None; the online mode needs"),
    ],
)
def test_what_fits_no_schedule_is_refused_at_once(family, arguments, kind, message):
    model = family.make()
    with pytest.raises(kind, match=message):
        patch(model, **{"policy": Full(), **arguments})
    assert all("_amskv" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("sides", "kind", "message"),
    [
        (None, TypeError, r"model.patch_nums is None; it must be sides of maps, such as \(1, 2, 3\)"),
        ((1, 2.5), ValueError, r"model.patch_nums\[1\] is 2.5; it must be a whole number ≥ 1"),
        ((0, 1), ValueError, r"model.patch_nums\[0\] is 0; it must be a whole number ≥ 1"),
    ],
)
def test_sides_that_are_none_are_named(sides, kind, message):
    model = public_var.VAR()
    model.patch_nums = sides
    with pytest.raises(kind, match=message):
        patch(model, Full())


def test_a_policy_made_for_another_schedule_is_refused(family):
    model = family.make()
    expected = family.draw(model)
    policy = AMSKV.for_saving(ScaleSchedule.named("var-256"), 3, 0.75)
    with pytest.raises(ValueError, match="the policy was made for maps 1×1 2×2 3×3 4×4"), patch(model, policy):
        family.draw(model)
    assert torch.equal(family.draw(model), expected)


def test_policies_that_are_none_are_named(family):
    model = family.make()
    with pytest.raises(ValueError, match="policy 'ams' is not known"):
        patch(model, "ams")
    with pytest.raises(ValueError, match="policy 'sliding:x': LOCAL is 'x'"):
        patch(model, "sliding:x")
    with pytest.raises(TypeError, match="policy gave 3 for schedule"), patch(model, lambda schedule: 3):
        family.draw(model)
    with pytest.raises(ValueError, match="policy 'ams' is not known"), patch(model, lambda schedule: "ams"):
        family.draw(model)
    assert "_amskv" not in vars(family.attentions(model)[0])


class StarAttention(public_var.SelfAttention):
    def forward(self, x, attn_bias=None, encoder_hidden_states=None, freqs_cis=None, layer_id=0):
        raise AssertionError("a step was run")


class HartAttention(public_var.SelfAttention):
    def forward(self, x, attn_bias, si=-1, context_position_ids=None, context_mask=None):
        raise AssertionError("a step was run")


class HartLlamaAttention(HartAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.qkv_proj = self.mat_qkv
        del self.mat_qkv


class TwoCaches(public_var.SelfAttention):
    def kv_caching(self, enable, which=0):
        super().kv_caching(enable)


class FastVARAttention(stack.SelfAttention):
    def forward(
        self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None, scale_ind=0,
        rope_idx=None, ori_len=0,
    ):  # fmt: skip
        raise AssertionError("a step was run")


class OlderAttention(stack.SelfAttention):
    def forward(self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None):
        raise AssertionError("a step was run")


TAKES_VAR = r"it must take \(x, attn_bias\), as the public VAR's does"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (StarAttention, f"whose forward takes also encoder_hidden_states, freqs_cis, layer_id; {TAKES_VAR}"),
        (HartAttention, f"whose forward takes also si, context_position_ids, context_mask; {TAKES_VAR}"),
        (HartLlamaAttention, "without mat_qkv; it must be the public VAR's"),
        (TwoCaches, r"whose kv_caching takes also which; it must take \(enable\)"),
        (
            FastVARAttention,
            "whose forward takes also rope_idx, ori_len; it must take .* as the public Infinity's",
        ),
        (OlderAttention, "whose forward takes not scale_ind; it must take"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_relatives_with_another_attention_are_refused_at_once(kind, message):
    message = rf"\[1\]\.\w+ is a {kind.__name__} {message}"
    family = FAMILIES["Infinity" if issubclass(kind, stack.SelfAttention) else "VAR"]
    model = family.make()
    config = (model.config,) if family is FAMILIES["Infinity"] else (128, 2, True)
    family.replace(model, 1, kind(*config))
    with pytest.raises(TypeError, match=message):
        patch(model, Full())
    assert all(vars(module).get("_amskv") is None for module in model.modules())


@pytest.mark.parametrize("model", [SimpleNamespace(), nn.Linear(2, 2), None], ids=["namespace", "module", "none"])
def test_a_model_of_no_family_is_named(model):
    with pytest.raises(
        TypeError,
        match=r"of no family that can be patched; these have unregistered_blocks \(Infinity, .*\); patch_nums and "
        r"blocks \(VAR, STAR\); ",
    ):
        patch(model, Full())


def test_only_a_module_can_be_unpatched():
    with pytest.raises(TypeError, match=r"model is namespace\(\); it must be a Module"):
        unpatch(SimpleNamespace())


def test_a_model_without_layers_is_named():
    with pytest.raises(TypeError, match=r"model\.blocks is empty"):
        patch(SimpleNamespace(patch_nums=(1, 2), blocks=[]), Full())
    with pytest.raises(TypeError, match=r"model\.unregistered_blocks is empty"):
        patch(SimpleNamespace(unregistered_blocks=[]), Full())
