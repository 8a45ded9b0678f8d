import hypothesis

# Time never decides a test: a busy machine draws its examples slowly.
hypothesis.settings.register_profile("project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption("--var-repo", help="a clone of the public VAR code, to patch its own class as well")
    parser.addoption("--infinity-repo", help="a clone of the public Infinity code, to patch its own blocks as well")
