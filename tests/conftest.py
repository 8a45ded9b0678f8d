from pathlib import Path

import hypothesis
import pytest

# Time never decides a test: a busy machine draws its examples slowly.
hypothesis.settings.register_profile("project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption(
        "--repo", action="append", default=[], metavar="NAME=DIR",
        help="a clone of a family's public code, to patch its own classes as well: VAR=DIR; may be given several times",
    )  # fmt: skip
    parser.addoption("--malformed", type=int, default=200, help="requests that schemathesis makes of the endpoint")
    parser.addoption("--families-report", metavar="FILE", help="where test_clones.py writes what it finds")


@pytest.fixture(scope="session")
def two_ranks():
    """Two processes of one gloo group, see `Ranks`."""
    from ranks import Ranks

    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def clone(request):
    """The clone that was given for a family; the test is skipped where none was."""

    def of(name: str) -> Path:
        given = dict(each.split("=", 1) for each in request.config.getoption("--repo"))
        if name not in given:
            pytest.skip(f"no clone of the public code given (--repo {name}=DIR)")
        return Path(given[name])

    return of
