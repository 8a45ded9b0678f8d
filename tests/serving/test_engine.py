"""The engine: every image as it would be drawn alone, whoever is there; the pool as planned, empty at the end."""

import random
import threading

import pytest
import torch
from small_engines import SAMPLING, SCHEDULE, Unlike, alone, engine, model

from amskv_kernels.serving import CancelledError, ClosedError, Engine, QueueFullError

STEPS = len(SCHEDULE)


def run(served: Engine) -> None:
    """Tick to the end; what is planned is held at every tick."""
    while served.tick():
        load = served.load
        assert load.used == load.planned <= load.units
    assert served.pool.used == 0 and not served.admission.coming.any()
    assert len(set(served.pool._free.tolist())) == served.pool.units, "every unit is free, once"


def arrivals(served: Engine, seed: int, count: int, cancels: float = 0.0) -> list:
    """Requests at random ticks; some are given up on the way."""
    rng, handles, left = random.Random(seed), [], count
    while left or any(not handle.done for handle in handles):
        for _ in range(min(left, rng.choice((0, 0, 1, 1, 2, 4)))):
            guidance = rng.choice((0.0, 1.5, 3.0))
            limits = {"top_k": rng.choice((0, 1, 7, 40)), "top_p": rng.choice((0.0, 0.5, 1.0))}
            handles.append(served.submit(rng.randrange(6), seed=rng.randrange(2**63), guidance=guidance, **limits))
            left -= 1
        for handle in handles:
            if rng.random() < cancels:
                handle.cancel()
        served.tick()
        load = served.load
        assert load.used == load.planned <= load.units
    run(served)
    return handles


@pytest.mark.parametrize("policy", ["full", "sliding:1", "sink:1,2", "ams-kv:60", Unlike()], ids=str)
def test_images_are_those_drawn_alone(policy):
    served = engine(policy, 3)
    handles = arrivals(served, seed=11, count=40, cancels=0.02)  # 200 over all policies
    kept = 0
    for handle in handles:
        request = handle.request
        try:
            drawn = handle.result(0)
        except CancelledError:
            continue
        own = alone(
            request.label, request.seed, policy, guidance=request.guidance, top_k=request.top_k, top_p=request.top_p
        )
        torch.testing.assert_close(drawn.tokens, own.tokens[0], rtol=0, atol=0)
        torch.testing.assert_close(drawn.image, own.images[0], rtol=0, atol=1e-5)
        kept += 1
    assert 20 <= kept < 40, "some are given up, most are not"
    assert served.load.drawn == kept and served.load.cancelled == len(handles) - kept


@pytest.mark.parametrize("variant", [{"shared_adaln": True}, {"attn_l2_norm": False}], ids=str)
def test_other_models_draw_the_same_alone_and_in_company(variant):
    var, vae = model(**variant)
    crowd, single = (Engine(var, vae, "full", memory=2**20) for _ in range(2))
    handles = [crowd.submit(i % 6, seed=i, **SAMPLING) for i in range(5)]
    run(crowd)
    for i, handle in enumerate(handles):
        own = single.submit(i % 6, seed=i, **SAMPLING)
        run(single)
        assert torch.equal(handle.result(0).tokens, own.result(0).tokens)


def test_company_changes_nothing():
    crowd, single = engine(), engine()
    first = crowd.submit(3, seed=9, **SAMPLING)
    for i in range(6):
        crowd.tick()
        crowd.submit(i % 6, seed=i, guidance=float(i % 2), top_k=30)
    run(crowd)
    own = single.submit(3, seed=9, **SAMPLING)
    run(single)
    assert torch.equal(first.result(0).tokens, own.result(0).tokens)
    torch.testing.assert_close(
        first.result(0).image, own.result(0).image, rtol=0, atol=1e-5
    )  # decoded in other company


def test_int8_pages():
    served = engine(images=1, dtype=torch.int8)
    assert served.pool.units == 2 * served.plan.pages
    handle = served.submit(2, seed=4, **SAMPLING)
    run(served)
    assert torch.equal(handle.result(0).tokens, alone(2, 4, dtype=torch.int8).tokens[0])


def test_progress_and_previews():
    served, heard = engine(), []
    handle = served.submit(1, seed=3, previews=(1, STEPS - 1), listener=heard.append, **SAMPLING)
    other = served.submit(2, seed=3, listener=lambda _: 1 / 0, **SAMPLING)
    run(served)
    assert [progress.steps for progress in heard] == list(range(1, STEPS + 1))
    assert [progress.preview is not None for progress in heard] == [False, True, False, False, True]
    assert torch.equal(heard[-1].preview, handle.result(0).image)
    assert heard[1].preview.shape == handle.result(0).image.shape
    assert other.result(0).image.isfinite().all(), "a listener that raises spoils nothing"


def test_cancelling_frees_pages_at_once():
    served = engine(images=2)
    handles = [served.submit(0, seed=i, **SAMPLING) for i in range(6)]
    for _ in range(3):
        served.tick()
    assert served.pool.used > 0
    assert all(handle.cancel() for handle in handles)
    assert not handles[0].cancel(), "it is done already"
    assert not served.tick()
    assert served.pool.used == 0 and not served.admission.coming.any()
    with pytest.raises(CancelledError, match="the image was cancelled"):
        handles[0].result(0)
    again = served.submit(0, seed=1, **SAMPLING)
    run(served)
    assert torch.equal(again.result(0).tokens, alone(0, 1).tokens[0])


def test_staggered_images_fit_more_than_the_peak_allows():
    served = engine(images=2)
    lockstep = served.pool.units // (2 * served.plan.pages)
    for i in range(40):
        served.submit(0, seed=i, **SAMPLING)
    most = 0
    while served.tick():
        most = max(most, served.load.active)
    assert most > lockstep
    assert served.load.drawn == 40


def test_nobody_passes_another():
    served, order = engine(images=1), []
    for i in range(12):
        handle = served.submit(0, seed=i, guidance=float(i % 2), top_k=9)
        handle.when_done(lambda _, i=i: order.append(i))
    run(served)
    assert order == sorted(order)


def test_a_thousand_at_once():
    with engine("sliding:1", 8, max_images=8) as served:
        handles = [served.submit(i % 6, seed=i, guidance=0.0, top_k=3) for i in range(1000)]
        assert served.max_images == 8
        tokens = [handle.result(300).tokens for handle in handles]
    assert len(tokens) == served.load.drawn == 1000
    assert served.pool.used == 0
    for i in (0, 511, 999):
        assert torch.equal(tokens[i], alone(i % 6, i, "sliding:1", guidance=0.0, top_k=3, top_p=0.96).tokens[0])


def test_requests_from_many_threads():
    results: dict[int, torch.Tensor] = {}

    def ask(served: Engine, i: int) -> None:
        handle = served.submit(i % 6, seed=i, **SAMPLING)
        if i % 5 == 4:
            handle.cancel()
        else:
            results[i] = handle.result(60).tokens

    with engine(images=3) as served:
        threads = [threading.Thread(target=ask, args=(served, i)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 16
    assert torch.equal(results[7], alone(1, 7).tokens[0])


def test_a_failing_tick_fails_those_inside_alone(monkeypatch):
    served = engine(images=2)
    handles = [served.submit(0, seed=i, **SAMPLING) for i in range(8)]
    served.tick()
    inside, step = served.load.active, served._model.step
    monkeypatch.setattr(served._model, "step", lambda *_: 1 / 0)
    served.tick()
    monkeypatch.setattr(served._model, "step", step)
    run(served)
    assert served.load.failed >= inside and served.load.drawn == 8 - served.load.failed
    with pytest.raises(ZeroDivisionError):
        handles[0].result(0)
    assert torch.equal(handles[-1].result(0).tokens, alone(0, 7).tokens[0])


def test_an_image_that_fails_as_it_enters_leaves_the_engine_at_work(monkeypatch):
    served, failing = engine(images=1), [False, False, True]  # the first of three
    enter = served._model.enter
    monkeypatch.setattr(served._model, "enter", lambda *given: 1 / 0 if failing.pop() else enter(*given))
    handles = [served.submit(0, seed=i, **SAMPLING) for i in range(3)]
    run(served)
    with pytest.raises(ZeroDivisionError):
        handles[0].result(0)
    assert served.load.failed == 1 and served.load.drawn == 2
    assert torch.equal(handles[2].result(0).tokens, alone(0, 2).tokens[0])


def test_drain_finishes_and_close_cancels():
    served = engine().start()
    handle = served.submit(0, seed=1, **SAMPLING)
    served.drain()
    assert handle.done and handle.result(0)
    with pytest.raises(ClosedError, match="takes no more requests"):
        served.submit(0, **SAMPLING)
    served = engine()
    handles = [served.submit(0, seed=i, **SAMPLING) for i in range(3)]
    served.tick()
    served.close()
    assert all(handle.done for handle in handles) and served.pool.used == 0


def test_as_many_wait_as_may():
    served = engine(max_waiting=2)
    for _ in range(2):
        served.submit(0, **SAMPLING)
    with pytest.raises(QueueFullError, match=r"2 images wait already, as many as may; try again in 0 s"):
        served.submit(0, **SAMPLING)
    served.tick()
    served.submit(0, **SAMPLING)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"label": 6}, ValueError, "label is 6; it must be at most 5"),
        ({"label": -1}, ValueError, "label is -1; it must be a whole number ≥ 0"),
        ({"label": "cat"}, ValueError, "label is 'cat'; it must be a whole number ≥ 0"),
        ({"seed": 2**64}, ValueError, f"seed is {2**64}; it must be at most {2**64 - 1}"),
        ({"guidance": float("nan")}, ValueError, "guidance is nan; it must be finite"),
        ({"guidance": "2"}, TypeError, "guidance is '2'; it must be a number"),
        ({"top_k": 41}, ValueError, "top_k is 41; it must be at most 40"),
        ({"top_p": 1.5}, ValueError, r"top_p is 1.5; it must be within \[0, 1\]"),
        ({"top_p": None}, TypeError, "top_p is None; it must be a number"),
        ({"previews": (STEPS,)}, ValueError, f"previews is {STEPS}; it must be at most {STEPS - 1}"),
    ],
)
def test_wrong_requests_are_named(changed, error, message):
    served = engine()
    with pytest.raises(error, match=message):
        served.submit(**{"label": 0, **SAMPLING, **changed})
    assert served.load.waiting == 0


def test_wrong_engines_are_named():
    var, vae = model()
    with pytest.raises(TypeError, match="var is 3; it must be a VAR"):
        Engine(3, vae, "full", memory=2**20)
    with pytest.raises(TypeError, match="vae is 3; it must be a VQVAE"):
        Engine(var, 3, "full", memory=2**20)
    with pytest.raises(ValueError, match="token policy; serving runs policies that keep whole scales"):
        engine("h2o:25")
    with pytest.raises(
        ValueError, match=r"memory is 0.0\d MiB, 1 pages of all heads; one sequence of this plan holds up to"
    ):
        engine(images=0.1)
    with pytest.raises(ValueError, match="max_images is 0; it must be a whole number ≥ 1"):
        engine(max_images=0)
    with pytest.raises(ValueError, match="max_waiting is -1; it must be a whole number ≥ 0"):
        engine(max_waiting=-1)


def test_a_pair_that_never_fits_is_refused_with_the_numbers():
    served = engine()
    small = engine(images=0.5)
    with pytest.raises(
        ValueError, match=rf"the image needs 2 · {served.plan.pages} = .* pages at its widest step; the"
    ):
        small.submit(0, **SAMPLING)
    handle = small.submit(0, seed=3, **{**SAMPLING, "guidance": 0.0})
    run(small)
    assert torch.equal(handle.result(0).tokens, alone(0, 3, guidance=0.0).tokens[0])
