"""Key similarity, the recorder and the online mode, on small random models."""

import numpy as np
import pytest
import torch

from amskv_kernels import AMSKV, CachePlan, Calibration, Full, PagedKVCache, ScaleSchedule
from amskv_kernels.cache.online import OnlineKVCache
from amskv_kernels.calibrate import SimilarityRecorder, calibrate, demanding_layers, key_similarity
from amskv_kernels.cli import plots

SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 2), (3, 5), (6, 6), (7, 7)])
LAYERS = 3


def calls(seed=0, batch=2, heads=2):
    """(step, layer, q, k, v) of a generation whose keys drift the faster the earlier the layer."""
    rng = torch.Generator().manual_seed(seed)
    for step, n in enumerate(SCHEDULE.tokens):
        for layer in range(LAYERS):
            q, k, v = torch.randn(3, batch, n, heads, 64, generator=rng)
            steady = torch.ones(64)
            yield step, layer, q, torch.nn.functional.normalize(steady + k / (1 + layer), dim=-1), v


def test_similarity_of_equal_and_opposite_maps():
    k = torch.nn.functional.normalize(torch.randn(2, 1, 3, 64), dim=-1)
    flat = k.expand(2, 4, 3, 64)
    assert abs(float(key_similarity(k, flat, (1, 1), (2, 2)))) < 1e-6
    assert float(key_similarity(k, -flat, (1, 1), (2, 2))) == pytest.approx(-2, abs=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_similarity_resizes_maps_row_by_row(mode):
    previous, current = torch.randn(2, 6, 3, 64), torch.randn(2, 20, 3, 64)
    total = 0.0
    for b in range(2):
        for h in range(3):
            image = previous[b, :, h].T.view(1, 64, 2, 3)
            align = None if mode == "nearest" else False
            resized = torch.nn.functional.interpolate(image, size=(4, 5), mode=mode, align_corners=align)
            total += (current[b, :, h] - resized.view(64, 20).T).norm(dim=-1).mean() / 6
    assert float(key_similarity(previous, current, (2, 3), (4, 5), mode)) == pytest.approx(-float(total), rel=1e-5)


def observed(count=2):
    recorder = SimilarityRecorder(SCHEDULE, LAYERS)
    for seed in range(count):
        for _, *call in calls(seed):
            recorder.observe(*call, 1.0)
    return recorder


def test_recorder_averages_over_generations():
    tables = [torch.tensor(observed_alone(seed)) for seed in range(2)]
    table = torch.tensor(observed().similarity())
    torch.testing.assert_close(table, sum(tables) / 2)
    assert (table[:, 0] == 0).all()
    assert (table[:, 1:] < 0).all()
    assert observed().images == 2


def observed_alone(seed):
    keys = {(step, layer): k for step, layer, _, k, _ in calls(seed)}
    sizes = SCHEDULE.sizes
    return [
        [0.0]
        + [
            float(key_similarity(keys[s - 1, layer], keys[s, layer], sizes[s - 1], sizes[s]))
            for s in range(1, len(sizes))
        ]
        for layer in range(LAYERS)
    ]


def test_recorder_passes_attention_through():
    plan = CachePlan.build(SCHEDULE, Full(), LAYERS)
    caches = [PagedKVCache(plan, batch=2, kv_heads=2, head_dim=64, dtype=torch.float32) for _ in range(2)]
    recorder = SimilarityRecorder(SCHEDULE, LAYERS, caches[0])
    for _, layer, q, k, v in calls():
        assert torch.equal(recorder.attend(layer, q, k, v, 1.0), caches[1].attend(layer, q, k, v, 1.0))
    torch.testing.assert_close(torch.tensor(recorder.similarity()), torch.tensor(observed(1).similarity()))


def test_demanding_layers_by_count_and_by_threshold_agree():
    table = observed().similarity()
    for count in range(LAYERS + 1):
        layers, theta = demanding_layers(table, count=count)
        assert layers == tuple(range(count)), "keys drift fastest in the first layers"
        assert demanding_layers(table, theta=theta)[0] == layers


def test_calibration_is_written_read_and_drawn(tmp_path):
    def generate(recorder):
        for _, *call in calls():
            recorder.observe(*call, 1.0)

    found = calibrate(generate, SimilarityRecorder(SCHEDULE, LAYERS), count=1, model="random")
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    assert found.demanding_layers == (0,)
    plots.similarity(found, tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: demanding_layers(((0.0, -1.0),)), "give exactly one of theta and count"),
        (lambda: demanding_layers(((0.0, -1.0),), theta=-1, count=1), "give exactly one of theta and count"),
        (lambda: demanding_layers(((0.0, -1.0),), theta=float("nan")), "theta is nan; it must be a similarity"),
        (lambda: demanding_layers(((0.0, -1.0),), count=2), "count is 2; it must be within 0 … 1"),
        (lambda: SimilarityRecorder(SCHEDULE, 2).similarity(), "no whole generation"),
        (lambda: SimilarityRecorder(SCHEDULE, 2).observe(1, *torch.zeros(3, 2, 1, 2, 64), 1.0), "call is layer 0"),
        (lambda: SimilarityRecorder(SCHEDULE, 2).attend(0, *torch.zeros(3, 2, 1, 2, 64), 1.0), "no inner attention"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


CAPACITY = AMSKV.with_capacity(9, 26, condensed=2)


def test_theta_may_be_a_number_of_numpys():
    for theta in (1, np.float32(1), np.float64(1), np.int64(1)):
        assert online(theta).theta == 1.0


def online(theta, policy=CAPACITY, page_size=16):
    return OnlineKVCache(
        SCHEDULE, LAYERS, policy, theta, batch=2, kv_heads=2, head_dim=64, dtype=torch.float32, page_size=page_size
    )


@pytest.mark.parametrize("theta", [-100.0, -0.95, -0.6, 100.0])
@pytest.mark.parametrize("page_size", [16, 64])
def test_online_mode_is_algorithm_1_on_the_similarity_it_meets(theta, page_size):
    cache = online(theta, page_size=page_size)
    for seed in range(2):
        policy = AMSKV.with_capacity(9, 26, similarity=observed_alone(seed), theta=theta)
        plan = CachePlan.build(SCHEDULE, policy, LAYERS)
        planned = PagedKVCache(plan, batch=2, kv_heads=2, head_dim=64, dtype=torch.float32)
        for step, layer, q, k, v in calls(seed):
            assert cache.visible(layer) == policy.visible(SCHEDULE, layer, step)
            expected = planned.attend(layer, q, k, v)
            torch.testing.assert_close(cache.attend(layer, q, k, v), expected, rtol=1e-5, atol=1e-5)
            if cache.nbytes:
                cache._pool._pool[:, cache._pool._free.free] = torch.nan  # nothing may read what has been given back
        turned = set(cache.demanding_layers)
        assert turned == (set(range(LAYERS)) if theta == 100 else set()) or abs(theta) < 2
        cache.reset()


def test_online_mode_turns_the_drifting_layers_only():
    table = observed_alone(0)
    cache = online((table[0][-1] + table[1][-1]) / 2)
    for _, layer, q, k, v in calls(0):
        cache.attend(layer, q, k, v)
    assert set(cache.demanding_layers) == {0}


def test_online_pool_stays_below_everything():
    cache = online(-100.0)
    for _, layer, q, k, v in calls(0):
        cache.attend(layer, q, k, v)
    assert cache.nbytes < SCHEDULE.prefix * LAYERS * 2 * 2 * 64 * 2 * 4


def test_online_misuse_is_named():
    cache = online(0.0)
    q, k, v = torch.randn(3, 2, 4, 2, 64)
    with pytest.raises(ValueError, match=r"layer is 0 with k of shape \(2, 4, 2, 64\); the next call is layer 0 of"):
        cache.attend(0, q, k, v)
    with pytest.raises(ValueError, match="layer is '0'; it must be a whole number"):
        cache.attend("0", q[:, :1], k[:, :1], v[:, :1])
    with pytest.raises(TypeError, match="k is None; it must be a Tensor"):
        cache.attend(0, q[:, :1], None, v[:, :1])
    with pytest.raises(ValueError, match="the next call is layer 0 of step 0, 2 sequences of 1 tokens"):
        cache.attend(1, q[:, :1], k[:, :1], v[:, :1])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"schedule": [(1, 1)]}, TypeError, r"schedule is \[\(1, 1\)\]; it must be a ScaleSchedule"),
        ({"policy": AMSKV()}, TypeError, r"policy is AMSKV\(.*; it must be an AMSKVCapacity"),
        ({"num_layers": 0}, ValueError, "num_layers is 0; it must be a whole number ≥ 1"),
        ({"theta": "low"}, TypeError, "theta is 'low'; it must be a number"),
        ({"theta": float("nan")}, ValueError, "theta is nan; it must be a similarity"),
        ({"batch": 2.5}, ValueError, "batch is 2.5; it must be a whole number ≥ 1"),
        ({"kv_heads": True}, ValueError, "kv_heads is True; it must be a whole number ≥ 1"),
        ({"head_dim": 100}, ValueError, "head_dim is 100; it must be a multiple of 8"),
        ({"dtype": torch.int16}, TypeError, "dtype is torch.int16; it must be one of"),
        ({"device": "mps"}, ValueError, "device is 'mps'; this torch cannot use it: "),
        ({"device": "gpu"}, ValueError, "device is 'gpu'; it must be one that torch knows"),
        ({"page_size": 17}, ValueError, r"page_size is 17; it must be one of \(16, 32, 64, 128\)"),
    ],
)
def test_bad_settings_of_the_online_mode_are_named(arguments, kind, message):
    good = {"schedule": SCHEDULE, "num_layers": LAYERS, "policy": CAPACITY, "theta": 0.0}
    with pytest.raises(kind, match=message):
        OnlineKVCache(**good | {"batch": 2, "kv_heads": 2, "head_dim": 64} | arguments)


def test_online_layers_count_from_the_first():
    with pytest.raises(IndexError, match=f"layer is -1; it must be within 0 … {LAYERS - 1}"):
        online(0.0).visible(-1)


def test_a_refused_call_leaves_the_online_cache_as_it_was():
    caches = [online(-0.6), online(-0.6)]
    for _, layer, q, k, v in calls(0):
        with pytest.raises(TypeError, match=r"q is torch\.float16"):
            caches[0].attend(layer, q.half(), k, v)
        got, expected = (cache.attend(layer, q, k, v) for cache in caches)
        assert torch.equal(got, expected)
    assert caches[0].demanding_layers == caches[1].demanding_layers


def test_every_image_weighs_the_same_whatever_its_batch():
    together, apart = SimilarityRecorder(SCHEDULE, LAYERS), SimilarityRecorder(SCHEDULE, LAYERS)
    keys = [(layer, k) for _, layer, _, k, _ in calls(3, batch=6)]
    for layer, k in keys:
        together.observe(layer, k, k, k, 1.0)
    for part in (slice(0, 4), slice(4, 6)):
        for layer, k in keys:
            apart.observe(layer, *[k[part]] * 3, 1.0)
    torch.testing.assert_close(torch.tensor(apart.similarity()), torch.tensor(together.similarity()))
