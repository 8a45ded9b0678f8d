"""The public OpenAI client draws from the endpoint, whole and in parts."""

import pytest
from small_engines import SCHEDULE

openai = pytest.importorskip("openai")
web = pytest.importorskip("small_servers", reason="needs what the extra `serve` installs")


@pytest.fixture(scope="module")
def client():
    with web.server(web.app(key="0123456789abcdef")) as address:
        yield openai.OpenAI(base_url=f"http://{address}/v1", api_key="0123456789abcdef", max_retries=0)


def test_it_draws(client):
    found = client.images.generate(prompt="owl", n=2, response_format="b64_json", extra_body={"seed": 3})
    assert [web.pixels(image.b64_json).shape for image in found.data] == [(3, 12, 12)] * 2
    assert found.size == "12x12" and found.usage.output_tokens == 2 * SCHEDULE.total


def test_it_streams(client):
    events = list(client.images.generate(prompt="3", stream=True, partial_images=3, extra_body={"seed": 3}))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    whole = client.images.generate(prompt="3", extra_body={"seed": 3})
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[-1].usage.output_tokens == SCHEDULE.total


def test_it_tells_what_is_wrong(client):
    with pytest.raises(openai.BadRequestError, match="it must be a class") as refused:
        client.images.generate(prompt="unicorn")
    assert refused.value.param == "prompt"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")
