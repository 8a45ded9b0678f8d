def pytest_addoption(parser):
    parser.addoption("--var-repo", help="a clone of the public VAR code, to patch its own class as well")
