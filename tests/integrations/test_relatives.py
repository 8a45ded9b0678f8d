"""Relatives of VAR and Infinity through the one `patch`: the same checks for each."""

import checks
import public_infinities as infinities
import public_relatives as relatives
import pytest
import torch
from checks import Case, around_of

from amskv_kernels import AMSKV, H2O, Full, HeatKV, LeastLoss, ScaleKV, ScaleSchedule, SlidingWindow, Tokens, patch
from amskv_kernels.cache import UnplannedKVCache
from amskv_kernels.calibrate import AttentionRecorder, LossRecorder, SimilarityRecorder
from amskv_kernels.integrations.hart import passes
from amskv_kernels.policies import HeadOrders

SQUARES = ScaleSchedule([(p, p) for p in (1, 2, 3, 5)])
HART = around_of(ScaleSchedule([(p, p) for p in (2, 3, 4, 5)]), prefix=1)
MAPS = infinities.Maps.schedule


def case(kind, around, *args, blocks="blocks", attention="attn"):
    def make():
        torch.manual_seed(7)
        return kind(*args).eval()

    return Case(
        make,
        lambda model: model.draw(),
        lambda model: [getattr(block, attention) for block in getattr(model, blocks)],
        lambda model: list(getattr(model, blocks)),
        around,
    )


TEXT = {"blocks": "unregistered_blocks", "attention": "sa"}
CASES = {
    "STAR": case(relatives.Star, around_of(SQUARES)),
    "Switti": case(relatives.Switti, around_of(SQUARES)),
    "HART (Llama)": case(relatives.Hart, HART),
    "HART (GPT-2)": case(relatives.Hart, HART, "gpt2"),
    "FastVAR": case(infinities.FastVAR, around_of(MAPS), **TEXT),
    "VAREdit": case(infinities.VAREdit, around_of(MAPS, prefix=1, beside=(0,)), **TEXT),
}
PREFIXED = [name for name, each in CASES.items() if each.around.prefix]
PLANNED = [name for name in CASES if name != "FastVAR"]


@pytest.fixture(params=CASES)
def family(request):
    return CASES[request.param]


def test_full_is_stock(family):
    assert checks.full_is_stock(family) < 1e-5


def test_policies_are_attention_masked_to_what_they_show(family):
    assert checks.policies_are_masks(family) < 1e-5


def test_undo_leaves_nothing(family):
    checks.undo_leaves_nothing(family)


def test_copies_are_their_own(family):
    checks.copies_are_their_own(family)


# A block is cut at its attentions and compiled for one token, for many, and for what its model tells it: which layer is
# the first in VAREdit, and whose tokens they are.
@pytest.mark.parametrize(("name", "most"), [("STAR", 6), ("Switti", 9), ("HART (Llama)", 8), ("VAREdit", 24)])
def test_compiled_blocks_give_a_handful_of_graphs_however_many_layers(name, most, monkeypatch):
    few = checks.compiled_graphs(CASES[name])
    assert few <= most
    monkeypatch.setattr(type(CASES[name].make()), "depth", 6)
    assert checks.compiled_graphs(CASES[name]) == few


def test_an_observer_gets_every_call(family):
    model, seen = family.make(), []
    with patch(model, Full(), observe=lambda *call: seen.append(call)):
        family.draw(model)
    layers = len(family.layers(model))
    assert [layer for layer, *_ in seen] == list(range(layers)) * (len(seen) // layers)
    for _, q, k, v, scale in seen:
        assert q.shape == k.shape == v.shape and q.shape[2:] == (2, 64) and isinstance(scale, float)


@pytest.mark.parametrize("name", PLANNED)
def test_recorders_measure_what_passes_by(name):
    """The same signature for each: what is measured serves a policy on the same model."""
    family = CASES[name]
    model, maps = family.make(), family.around.maps
    layers = len(family.layers(model))
    with patch(model, Full()) as patched:
        family.draw(model)
        whole = patched.plan.schedule
    prefix = whole.tokens[0] if family.around.prefix else 0
    recorders = [kind(maps, layers, prefix=prefix) for kind in (AttentionRecorder, LossRecorder, SimilarityRecorder)]

    def observe(*call):
        for recorder in recorders:
            recorder.observe(*call)

    with patch(model, Full(), observe=observe):
        family.draw(model)
    attention, losses, similarity = recorders
    assert len(similarity.similarity()) == layers
    policies = [HeatKV(0.7, attention.orders(1)), LeastLoss(Tokens(8), losses.losses())]
    for policy in policies:
        with patch(model, policy) as patched:
            assert torch.isfinite(family.draw(model)).all()
            assert not patched.plan.lossless


def test_eight_bits_change_little(family):
    model = family.make()
    expected = family.draw(model)
    with patch(model, Full(), pages="int8") as patched:
        assert 0 < checks.difference(family.draw(model), expected) < 0.02
        eight = patched.cache.nbytes
    with patch(model, Full()) as patched:
        family.draw(model)
        assert eight / patched.cache.nbytes == (64 + 4) / (4 * 64)


@pytest.mark.parametrize("name", PLANNED)
def test_token_and_head_policies_run(name):
    family = CASES[name]
    model = family.make()
    expected = family.draw(model)
    maps, layers = family.around.maps, len(family.layers(model))
    scores = torch.rand(layers, 2, len(maps), generator=torch.Generator().manual_seed(0)).tolist()
    policies = {"heads": HeatKV(0.7, HeadOrders.from_scores(scores, maps, 1))}
    if not family.around.beside:
        policies |= {"tokens": H2O(6), "all": ScaleKV(maps.prefix, drafters=((0,),))}
    for kind, policy in policies.items():
        with patch(model, policy) as patched:
            got = checks.difference(family.draw(model), expected)
            assert patched.plan.lossless == (kind == "all")
        assert got < 1e-5 if kind == "all" else 1e-5 < got < 10, kind


def test_token_policies_keep_the_prefix():
    family = CASES["HART (Llama)"]
    with patch(family.make(), H2O(6)) as patched:
        plan = patched.plan
    for step in range(1, len(plan.schedule)):
        at = plan.compaction(step, 0)
        assert plan.read_rows(step, 0) >= 7
        assert at is None or list(at.always[:7]) == list(range(7))
    assert any(plan.compaction(step, 0) for step in range(len(plan.schedule)))


@pytest.mark.parametrize("count", [1, 2, 3, 25])
def test_masked_passes_add_up_to_the_map(count):
    drawn = list(passes(25, count))
    assert sum(drawn) == 25 and len(drawn) == count and min(drawn) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_passes_of_the_last_map_read_those_before_them(kind):
    torch.manual_seed(7)
    model = relatives.Hart(kind).eval()
    once = model.draw()
    expected = model.draw(num_maskgit_iters=3)
    for policy, largest in ((Full(), 1e-5), (H2O(100), 1e-5), (SlidingWindow(1), 10)):
        with patch(model, policy) as patched:
            got = model.draw(num_maskgit_iters=3)
            assert checks.difference(got, expected) < largest
            assert patched.plan.schedule.tokens == (7, 4, 9, 16, *passes(25, 3))
            if policy == Full():
                assert checks.difference(model.draw(), once) < 1e-5, "the next generation has one pass again"


def test_sequences_leave_a_switti(monkeypatch):
    family = CASES["Switti"]
    for ends in (0, 1, 99):
        monkeypatch.setattr(relatives.Switti, "ends", ends)
        assert checks.full_is_stock(family) < 1e-5
        assert checks.policies_are_masks(family) < 1e-5


def test_a_switti_that_looks_back_at_nothing_is_refused(monkeypatch):
    model = CASES["Switti"].make()
    model.use_ar = False
    with pytest.raises(ValueError, match="use_ar is False; a Switti that does not look back"):
        patch(model, Full())


def test_what_fastvar_leaves_out_is_never_stored():
    family = CASES["FastVAR"]
    model = family.make()
    with patch(model, Full()) as patched:
        assert patched.plan is None
        family.draw(model)
        cache = patched.cache
        assert isinstance(cache, UnplannedKVCache)
        assert (cache.tokens(0), cache.tokens(2)) == (1 + 4 + 8 + 24, 1 + 4 + 8 + 14)


@pytest.mark.parametrize("name", [*PREFIXED, "FastVAR"])
def test_the_online_mode_is_refused_where_it_cannot_be(name):
    with pytest.raises(ValueError, match="online is True; "):
        patch(CASES[name].make(), AMSKV.with_capacity(9, 40), online=True, theta=0.0)


@pytest.mark.parametrize("name", ["STAR", "Switti"])
@pytest.mark.parametrize("theta", [-100.0, 100.0])
def test_the_online_mode_runs_where_it_can(name, theta):
    family = CASES[name]
    model, table = family.make(), tuple((0.0,) * 4 for _ in range(3))
    with patch(model, AMSKV.with_capacity(6, 14), online=True, theta=theta):
        got = family.draw(model)
    with patch(model, AMSKV.with_capacity(6, 14, similarity=table, theta=theta)):
        assert checks.difference(got, family.draw(model)) < 1e-5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FastVAR", "where token counts are known only as the model runs, it must be one of whole scales"),
        ("VAREdit", "layer 0 sees the prefix anew at every scale, and only policies of whole scales know layers apart"),
    ],
)
def test_policies_that_a_family_cannot_have_are_named(name, message):
    model = CASES[name].make()
    with pytest.raises(TypeError, match=message), patch(model, H2O(6)):
        CASES[name].draw(model)


def test_a_first_layer_that_is_not_the_first_is_named():
    model = CASES["VAREdit"].make()
    model.unregistered_blocks = torch.nn.ModuleList(reversed(model.unregistered_blocks))
    blocks = list(model.unregistered_blocks)
    with (
        patch(model, Full()),
        pytest.raises(RuntimeError, match="start_layer is True in layer 2; the first layer"),
    ):
        model.unregistered_blocks = torch.nn.ModuleList(reversed(blocks))
        model.draw()


@pytest.mark.parametrize("name", CASES)
def test_relatives_called_otherwise_are_refused(name):
    family = CASES[name]
    model = family.make()
    attention = family.layers(model)[1]

    class Another(type(attention)):
        def forward(self, x, attn_bias=None, further=None):
            raise AssertionError("a step was run")

    attention.__class__ = Another
    with pytest.raises(TypeError, match=r"\[1\]\.\w+ is a Another whose forward takes .*further.*as the public"):
        patch(model, Full())
    assert all(vars(module).get("_amskv") is None for module in model.modules())


@pytest.mark.parametrize(("head_dim", "must"), [(100, "be a multiple of 8"), (136, "be at most 128")])
def test_heads_that_no_row_holds_are_refused_at_once(family, head_dim, must):
    model = family.make()
    family.layers(model)[-1].head_dim = head_dim
    with pytest.raises(ValueError, match=rf"\[2\]\.\w+\.head_dim is {head_dim}; it must {must}"):
        patch(model, Full())
