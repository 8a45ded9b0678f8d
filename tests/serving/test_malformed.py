"""Requests that schemathesis makes of the OpenAPI page, most of them wrong: each gets an answer that is no 500."""

import collections

import hypothesis
import pytest
from small_engines import engine

schemathesis = pytest.importorskip("schemathesis")
web = pytest.importorskip("small_servers", reason="needs what the extra `serve` installs")


def test_no_request_is_a_servers_fault(request):
    calls, drawer = request.config.getoption("--malformed"), engine(max_waiting=1000)
    schema = schemathesis.openapi.from_asgi("/openapi.json", web.app(drawer))
    operation = schema["/v1/images/generations"]["POST"]
    kinds = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    seen: collections.Counter[int] = collections.Counter()

    @hypothesis.given(hypothesis.strategies.one_of(kinds))
    @hypothesis.settings(max_examples=calls, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("prompt"), str):
            case.body["prompt"] = "1"  # a text at random is no class: then no other field would matter
        response = case.call(timeout=600)  # a busy machine draws slowly
        seen[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"] and (response.status_code != 400 or error["param"])

    check()
    assert drawer.pool.used == 0
    print(dict(seen))
