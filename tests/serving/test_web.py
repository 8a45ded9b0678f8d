"""The endpoint: images as the engine draws them, streams, every wrong field by its name, clients that go away."""

import asyncio
import contextlib
import json
import socket
import sys
import time

import pytest
from small_engines import SAMPLING, SCHEDULE, alone, engine

web = pytest.importorskip("small_servers", reason="needs what the extra `serve` installs")
GENERATE, served, until = web.GENERATE, web.served, web.until
STEPS = len(SCHEDULE)


@pytest.fixture(scope="module")
def client():
    with web.TestClient(web.app(), raise_server_exceptions=False) as found:
        yield found


def told(response, status, param=None):
    """The message of a refusal."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param
    return error["message"]


def events(text):
    """(name, data) of a stream."""
    found = [part.split("\n") for part in text.split("\n\n") if part and not part.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in found]


def same_as_alone(picture, label, seed):
    want = (alone(label, seed).images[0] * 255).round()
    assert (web.pixels(picture).float() - want).abs().max() <= 1, "a step of 1/255 where rounding differs"


def test_images_are_the_engines(client):
    found = client.post(GENERATE, json={"prompt": "Hen", "n": 3, "seed": 2**64 - 2, "model": "small", "size": "12x12"})
    assert found.status_code == 200, found.text
    body = found.json()
    assert [image["seed"] for image in body["data"]] == [2**64 - 2, 2**64 - 1, 0]
    for image in body["data"]:
        same_as_alone(image["b64_json"], 1, image["seed"])
    assert body["usage"]["output_tokens"] == 3 * SCHEDULE.total
    assert body["size"] == "12x12" and web.pixels(body["data"][0]["b64_json"]).shape == (3, 12, 12)


def test_a_request_may_sample_as_it_likes(client):
    own = {"guidance": 0, "top_k": 3, "top_p": 0.5, "seed": 4}
    found = client.post(GENERATE, json={"prompt": "2", **own}).json()["data"][0]["b64_json"]
    own.pop("seed")
    want = (alone(2, 4, **own).images[0] * 255).round()
    assert (web.pixels(found).float() - want).abs().max() <= 1


def test_without_a_seed_images_differ_and_say_theirs(client):
    first, second = (client.post(GENERATE, json={"prompt": "0", "n": None}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    same_as_alone(first["b64_json"], 0, first["seed"])


@pytest.mark.parametrize("count", [0, 1, 3, STEPS - 1])
def test_a_stream_shows_the_image_as_it_grows(client, count):
    found = client.post(GENERATE, json={"prompt": "dog", "seed": 5, "stream": True, "partial_images": count})
    assert found.headers["content-type"].startswith("text/event-stream")
    *partial, last = events(found.text)
    assert last[0] == last[1]["type"] == "image_generation.completed"
    same_as_alone(last[1]["b64_json"], 2, 5)
    assert [name for name, _ in partial] == ["image_generation.partial_image"] * count
    assert [data["partial_image_index"] for _, data in partial] == list(range(count))
    steps = [data["step"] for _, data in partial]
    assert steps == sorted(set(steps)) and all(0 < step < STEPS for step in steps)


def test_a_stream_of_several_images_tells_them_apart(client):
    found = client.post(GENERATE, json={"prompt": "dog", "seed": 7, "n": 3, "stream": True, "partial_images": 2})
    told_of = [data for _, data in events(found.text)]
    for index in range(3):
        *partial, last = [data for data in told_of if data["index"] == index]
        assert [data["partial_image_index"] for data in partial] == [0, 1]
        assert last["seed"] == 7 + index
        same_as_alone(last["b64_json"], 2, 7 + index)


def test_a_silent_stream_shows_that_it_lives(monkeypatch):
    drawer = engine()
    step = drawer._model.step
    monkeypatch.setattr(sys.modules[web.create_app.__module__], "SIGN_OF_LIFE", 0.001)
    monkeypatch.setattr(drawer._model, "step", lambda *arguments: [step(*arguments), time.sleep(0.1)])
    with web.TestClient(web.app(drawer)) as slow:
        found = slow.post(GENERATE, json={"prompt": "1", "stream": True})
    assert ": waiting\n\n" in found.text and len(events(found.text)) == 1


def test_previews_are_spread_over_all_scales_but_the_last():
    own = served(engine())
    assert [own.previews(n) for n in range(STEPS)] == [(), (2,), (1, 3), (1, 2, 3), (0, 1, 2, 3)]


def test_names_and_numbers_of_classes():
    own = served(engine())
    for prompt in ("goldfish, Carassius auratus", " GOLDFISH", "carassius auratus", "0"):
        assert own.label(prompt) == 0
    for prompt in ("5", "-1", "fish", "", "٣", "1.0", "9" * 999):
        with pytest.raises(ValueError, match="it must be a class, 0 … 4, or one's name"):
            own.label(prompt)
    unnamed = web.Served.of(engine(), "small", ("goldfish, ", "hen", "", "cat", "owl"), **SAMPLING)
    for prompt in ("", " "):
        with pytest.raises(ValueError, match="it must be a class"):
            unnamed.label(prompt)
    with pytest.raises(ValueError, match="names are of 2 classes; the model has 5"):
        web.Served.of(engine(), "small", ("a", "b"), **SAMPLING)
    with pytest.raises(ValueError, match="top_k is 41; it must be at most 40"):
        web.Served.of(engine(), "small", guidance=1.0, top_k=41, top_p=0.0)


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"prompt": "unicorn"}, "prompt", "prompt is 'unicorn'; it must be a class, 0 … 4"),
        ({"prompt": 7}, "prompt", "prompt is 7: Input should be a valid string"),
        ({"prompt": "\ud800"}, "prompt", "prompt is '\\ud800'"),
        ({"model": "dall-e-3"}, "model", "model is 'dall-e-3'; it must be 'small'"),
        ({"n": 0}, "n", "n is 0: "),
        ({"n": 11}, "n", "n is 11: "),
        ({"n": True}, "n", "n is True: "),
        ({"size": "1024x1024"}, "size", "size is '1024x1024'; it must be 12x12 or auto"),
        ({"response_format": "url"}, "response_format", "Input should be 'b64_json'"),
        ({"output_format": "webp"}, "output_format", "Input should be 'png'"),
        ({"background": "transparent"}, "background", "Input should be 'auto' or 'opaque'"),
        ({"quality": "hd"}, "quality", "Input should be 'auto'"),
        ({"stream": "yes"}, "stream", "stream is 'yes': "),
        ({"partial_images": 1}, "partial_images", "partial_images is 1; it needs stream"),
        ({"partial_images": STEPS, "stream": True}, "partial_images", f"partial_images is {STEPS}; it must be at"),
        ({"seed": -1}, "seed", "seed is -1: "),
        ({"seed": 2**64}, "seed", f"seed is {2**64}: "),
        ({"guidance": float("nan")}, "guidance", "guidance is nan: "),
        ({"guidance": "3"}, "guidance", "guidance is '3': "),
        ({"top_k": 41}, "top_k", "top_k is 41; it must be at most 40"),
        ({"top_p": 1.1}, "top_p", "top_p is 1.1: "),
        ({"style": "vivid"}, "style", "Extra inputs are not permitted"),
        ({"\ud800": 1}, "body", "unable to parse raw data as a unicode string"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(client, changed, param, message):
    text = json.dumps({"prompt": "1", **changed})
    found = client.post(GENERATE, content=text, headers={"Content-Type": "application/json"})
    assert message in told(found, 400, param)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"a"', "{}", "[" * 30000, '{"n": ' + "9" * 5000 + "}", "\xff\x00"]
)
def test_bodies_that_are_no_request_are_refused(client, text):
    found = client.post(GENERATE, content=text, headers={"Content-Type": "application/json"})
    assert told(found, 400, "prompt" if text == "{}" else "body")


def test_forms_and_plain_text_are_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post(GENERATE, content='{"prompt": "1"}', headers={"Content-Type": kind}).status_code == 400


def test_large_bodies_are_refused_read_or_not(client):
    message = "the body must have at most 65536 bytes"
    assert told(client.post(GENERATE, json={"prompt": "a" * 70000}), 413) == message
    parts = (b"a" * 5000 for _ in range(20))
    assert told(client.post(GENERATE, content=parts, headers={"Content-Type": "application/json"}), 413) == message


def test_models_health_page_and_what_is_not_there(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model == client.get("/v1/models/small").json() and model["id"] == "small"
    assert told(client.get("/v1/models/other"), 404, "model") == "model is 'other'; it must be 'small'"
    assert client.get("/health").json() == {"status": "ok"}
    page = client.get("/")
    assert "/v1/images/generations" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
    assert told(client.get("/v2"), 404) and told(client.get(GENERATE), 405)


def test_a_key_guards_what_draws():
    key = "0123456789abcdef"
    with web.TestClient(web.app(key=key)) as guarded:
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer ü"}, {"Authorization": key}):
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            assert "must bear the key" in told(guarded.post(GENERATE, json={"prompt": "1"}, headers=encoded), 401)
            assert guarded.get("/v1/models", headers=encoded).status_code == 401
        assert guarded.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert guarded.get("/health").status_code == guarded.get("/metrics").status_code == 200


class Idle(web.EngineSource):
    """An engine that nobody ticks but the test."""

    async def start(self) -> None:
        """It stands still."""


def test_all_images_of_a_request_wait_or_none():
    drawer = engine(max_waiting=2)
    with web.TestClient(web.create_app(served(drawer), Idle(drawer))) as full:
        found = full.post(GENERATE, json={"prompt": "1", "n": 3})
        assert "2 images wait already, as many as may" in told(found, 429)
        assert int(found.headers["retry-after"]) >= 1
        assert drawer.load.waiting == 0 and drawer.load.cancelled == 2
        drawer.close()
        assert told(full.post(GENERATE, json={"prompt": "1"}), 503) == "the engine takes no more requests"
        refused = {m.labels["status"]: m.value for m in samples(full) if m.name == "amskv_refused_total"}
        assert refused == {"429": 1, "503": 1}


def test_an_image_that_never_fits_is_refused_with_the_numbers():
    with web.TestClient(web.app(engine(images=0.5))) as small:
        assert "pages at its widest step; the pool has" in told(
            small.post(GENERATE, json={"prompt": "1"}), 400, "guidance"
        )
        assert small.post(GENERATE, json={"prompt": "1", "guidance": 0}).status_code == 200


@pytest.mark.parametrize("kind", [ZeroDivisionError, ValueError])  # the latter is nobody's wrong field
def test_an_engine_that_fails_is_told(monkeypatch, kind):
    drawer = engine()

    def fail(*_):
        raise kind("inside")

    monkeypatch.setattr(drawer._model, "step", fail)
    with web.TestClient(web.app(drawer), raise_server_exceptions=False) as broken:
        assert told(broken.post(GENERATE, json={"prompt": "1"}), 500) == "the server failed; its log says why"
        ((name, data),) = events(broken.post(GENERATE, json={"prompt": "1", "stream": True}).text)
        assert name == "error" and data["error"]["message"] == "the image could not be drawn"


class Ending(web.EngineSource):
    """Its images end before they are there."""

    async def begin(self, request):
        drawing = await super().begin(request)

        class Cut:
            cancel = drawing.cancel

            async def __aiter__(self):
                async for event in drawing:
                    if hasattr(event, "steps"):
                        yield event

        return Cut()


def test_a_source_that_ends_without_an_image_ends_the_answer():
    drawer = engine()
    with web.TestClient(web.create_app(served(drawer), Ending(drawer)), raise_server_exceptions=False) as cut:
        assert told(cut.post(GENERATE, json={"prompt": "1"}), 500)
        *_, (name, data) = events(cut.post(GENERATE, json={"prompt": "1", "stream": True, "partial_images": 2}).text)
        assert name == "error" and data["error"]["message"] == "the image could not be drawn"


def samples(client):
    return [m for family in web.text_string_to_metric_families(client.get("/metrics").text) for m in family.samples]


def test_metrics_tell_the_engines_load():
    drawer = engine()
    with web.TestClient(web.app(drawer)) as watched:
        watched.post(GENERATE, json={"prompt": "1", "n": 2})
        until(lambda: not drawer.load.active)
        found = {(m.name, *sorted(m.labels.items())): m.value for m in samples(watched)}
        booked = [value for key, value in found.items() if key[0] == "amskv_pool_pages_booked"]
    own = ("engine", "0")
    assert booked == [0] * STEPS
    assert found["amskv_images_total", own, ("outcome", "drawn")] == 2
    assert found["amskv_pool_pages", own] == drawer.pool.units
    assert found["amskv_tick_seconds_count", own] == drawer.load.ticks
    assert found["amskv_tick_seconds_sum", own] == drawer.load.busy > 0
    assert found["amskv_image_seconds_count",] == 2


def ask(address, **body):
    """A connection that has sent a request."""
    host, port = address.split(":")
    text = json.dumps({"prompt": "1", **body})
    client = socket.create_connection((host, int(port)))
    head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    client.sendall(f"POST {GENERATE} HTTP/1.1\r\n{head}\r\n\r\n{text}".encode())
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(monkeypatch, stream):
    drawer, gone = engine(), []
    step = drawer._model.step

    def slow(*arguments):
        if drawer.load.ticks == 1:
            until(lambda: gone and drawer.load.cancelled)
        step(*arguments)

    monkeypatch.setattr(drawer._model, "step", slow)
    with web.server(web.app(drawer)) as address:
        with ask(address, stream=stream, partial_images=4 if stream else 0):
            until(lambda: drawer.load.ticks == 1)
        gone.append(True)
        until(lambda: drawer.pool.used == 0)
        assert drawer.load.cancelled == 1 and drawer.load.drawn == 0


@pytest.mark.parametrize("version", ["2.0", "2.4"])  # of ASGI: with the later one, a send tells that nobody is there
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_before_the_first_step_leaves_nothing(stream, version):
    drawer = engine()  # at rest: what is asked for waits
    body = json.dumps({"prompt": "1", "n": 3, "stream": stream}).encode()
    heard = [{"type": "http.request", "body": body}]

    async def receive():
        return heard.pop(0) if heard else {"type": "http.disconnect"}

    async def send(message):
        raise OSError("nobody is there")

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": version}, "method": "POST", "path": GENERATE,
        "raw_path": GENERATE.encode(), "root_path": "", "query_string": b"", "headers": headers, "scheme": "http",
    }  # fmt: skip
    with contextlib.suppress(Exception):
        asyncio.run(web.app(drawer)(scope, receive, send))
    assert drawer.load.waiting == 0 and drawer.load.cancelled == 3


def test_stopping_finishes_what_is_asked():
    drawer = engine(images=1)
    with web.server(web.app(drawer)) as address:
        client = ask(address, n=10)
        until(lambda: drawer.load.active)
    with client, client.makefile("rb") as answer:
        assert b"200 OK" in answer.readline()
    assert drawer.load.drawn == 10 and drawer.pool.used == 0
