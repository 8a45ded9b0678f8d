"""Two replicas behind one endpoint; one is killed while it draws, and nobody's image is lost."""

import concurrent.futures
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from small_engines import SCHEDULE, alone, engine, model

ray = pytest.importorskip("ray")
web = pytest.importorskip("small_servers", reason="needs what the extra `serve` installs")

IMAGES = 40
PORT = 18473


@pytest.fixture
def address(tmp_path):
    """Of an endpoint with two replicas, whose process ids are the names of files in `replicas`."""
    from ray import serve

    from amskv_kernels.serving.ray import application

    var, vae = model()
    torch.save((var.state_dict(), vae.state_dict()), tmp_path / "weights")  # random ones, of this process alone
    (tmp_path / "replicas").mkdir()

    def make():
        torch.set_num_threads(1)
        for own, weights in zip(model(), torch.load(tmp_path / "weights"), strict=True):
            own.load_state_dict(weights)
        drawer = engine("sliding:1", 2, max_waiting=IMAGES)
        step = drawer._model.step
        drawer._model.step = lambda *given: [__import__("time").sleep(0.02), step(*given)]  # so that it dies at work
        (tmp_path / "replicas" / str(os.getpid())).touch()
        return drawer, web.served(drawer)

    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(make, replicas=2, actor_options={"num_cpus": 0}), name="small")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(address, path="/v1/images/generations", **body):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=500) as answer:
        return answer.read().decode()


def same_as_alone(picture, seed):
    want = (alone(2, seed, "sliding:1").images[0] * 255).round()
    assert (web.pixels(picture).float() - want).abs().max() <= 1


def test_a_replica_that_is_killed_loses_no_image(address, tmp_path):
    replicas = tmp_path / "replicas"
    with concurrent.futures.ThreadPoolExecutor(IMAGES) as pool:
        plain = [pool.submit(ask, address, prompt="dog", seed=seed) for seed in range(IMAGES - 4)]
        streams = [
            pool.submit(ask, address, prompt="dog", seed=seed, stream=True, partial_images=len(SCHEDULE) - 1)
            for seed in range(IMAGES - 4, IMAGES)
        ]
        web.until(lambda: len(list(replicas.iterdir())) == 2 and any(one.done() for one in plain), 300)
        assert not all(one.done() for one in (*plain, *streams)), "it dies at work"
        os.kill(int(next(replicas.iterdir()).name), signal.SIGKILL)
        for seed, answer in enumerate(plain):
            same_as_alone(json.loads(answer.result())["data"][0]["b64_json"], seed)
        for seed, answer in enumerate(streams, IMAGES - 4):
            events = [json.loads(line[6:]) for line in answer.result().splitlines() if line.startswith("data: ")]
            assert [event.get("step") for event in events] == [1, 2, 3, 4, None], "each scale once, in order"
            same_as_alone(events[-1]["b64_json"], seed)
    web.until(lambda: len(list(replicas.iterdir())) == 3, 300)  # another has taken its place
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, prompt="unicorn")
    assert json.loads(refused.value.read())["error"]["param"] == "prompt"
    assert "amskv_pool_pages_used" in ask(address, "/metrics")
