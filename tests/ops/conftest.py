"""What the tests of the Triton kernels share."""

import pytest

import amskv_kernels


@pytest.fixture
def forced():
    with amskv_kernels.backend("triton"):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    """Make launches choose as on a GPU of some architecture and size."""

    def play(arch: int, processors: int = 1) -> None:
        from amskv_kernels.ops.backends.triton import attn
        from amskv_kernels.ops.backends.triton.common import Device

        monkeypatch.setattr(attn, "describe", lambda _: Device(arch, processors))

    return play
