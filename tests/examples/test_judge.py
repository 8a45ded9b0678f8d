"""The judge: it can be taught, and the Fréchet distance is the one of two Gaussians."""

import pytest
import scipy.linalg
import torch
from test_avatars import noise

from examples.avatars import attributes, judge


def test_distance_of_two_gaussians():
    """Against scipy's matrix root, of covariances that do not commute."""
    torch.manual_seed(0)
    a, b = (torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(2))
    b = b + 0.5
    (mean, own), (other_mean, other) = judge.moments(a), judge.moments(b)
    root = scipy.linalg.sqrtm((own @ other).numpy()).real
    wanted = float((mean - other_mean).square().sum() + (own + other).trace()) - 2 * root.trace()
    assert judge.frechet(mean, own, other_mean, other) == pytest.approx(wanted, rel=1e-9)
    assert judge.frechet(mean, own, mean, own) == pytest.approx(0, abs=1e-9)


def test_a_reader_learns_what_can_be_seen(monkeypatch):
    """Avatars that are one grey, brighter the higher the value of their background."""
    monkeypatch.setattr(judge, "ATTRIBUTES", {"background": attributes.ATTRIBUTES["background"]})
    data = noise(192)
    values = data.values[:, list(attributes.ATTRIBUTES).index("background")]
    grey = (values * 80).to(torch.uint8)[:, None, None, None].expand_as(data.images).contiguous()
    torch.manual_seed(0)
    found = judge.train(judge.Avatars(grey, values[:, None]), epochs=8)
    told = judge.worth(found, judge.Avatars(grey, values[:, None]))
    assert told["accuracy"]["background"] > 0.9
    features, read = found.look(grey.float() / 255)
    assert features.dtype == torch.float64 and float((read[:, 0] == values).double().mean()) > 0.9
    # The reference is these very images.
    assert found.distance(features) == pytest.approx(0, abs=1e-4)  # roots of a singular matrix
    assert found.distance(features + 1) == pytest.approx(features.shape[1], rel=1e-4)
