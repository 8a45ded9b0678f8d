def pytest_addoption(parser):
    parser.addoption("--var-repo", help="a clone of the public VAR code, to patch its own class as well")
    parser.addoption("--infinity-repo", help="a clone of the public Infinity code, to patch its own blocks as well")
