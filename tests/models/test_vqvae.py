"""The VQ-VAE: tokens are greedy residual codes, inputs their partial sums."""

from __future__ import annotations

import pytest
import torch
from small_models import OBLONG, SCHEDULES, pair

from amskv_kernels.models.vqvae import phi_of_scales
from amskv_kernels.schedule import ScaleSchedule


def test_phi_of_the_released_schedule() -> None:
    # scales 2 and 7 lie exactly between two of the four, and 64-bit rounding decides
    assert phi_of_scales(10) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_of_scales(1) == (0,)
    assert sorted(set(phi_of_scales(14))) == [0, 1, 2, 3]


@SCHEDULES
def test_tokens_are_the_greedy_residual_codes(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    h, w = schedule.sizes[-1]
    images = torch.rand(2, 3, 2 * h, 2 * w)
    with torch.no_grad():
        tokens, rest = vae.tokens(images), vae.features(images)
        assert tokens.shape == (2, schedule.total) and tokens.dtype == torch.int64
        for k, part in enumerate(tokens.split(list(schedule.tokens), dim=1)):
            wanted = torch.nn.functional.adaptive_avg_pool2d(rest, schedule.sizes[k]).flatten(2).transpose(1, 2)
            distance = torch.cdist(wanted, vae.quantize.embedding.weight.expand(2, -1, -1))
            chosen = distance.gather(2, part[..., None])[..., 0]
            assert torch.allclose(chosen, distance.amin(2), atol=1e-4)
            rest = rest - vae.quantize.spread(k, part)
        assert torch.allclose(vae.latent(tokens), vae.features(images) - rest, atol=1e-5)


@SCHEDULES
def test_inputs_are_the_partial_sums_at_the_next_size(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    tokens = torch.randint(40, (3, schedule.total))
    with torch.no_grad():
        inputs = vae.inputs(tokens)
        assert inputs.shape == (3, schedule.total - 1, 6) and inputs.dtype == torch.float32
        fhat = torch.zeros(3, 6, *schedule.sizes[-1])
        parts = tokens.split(list(schedule.tokens), dim=1)
        for k, part in enumerate(parts[:-1]):
            fhat = fhat + vae.quantize.spread(k, part)
            at, n = schedule.offsets[k + 1] - 1, schedule.tokens[k + 1]
            assert torch.allclose(inputs[:, at : at + n], vae.quantize.next_map(k + 1, fhat), atol=1e-5)
        fhat = fhat + vae.quantize.spread(len(parts) - 1, parts[-1])
        assert torch.allclose(vae.decode(fhat), vae.decode(vae.latent(tokens)), atol=1e-5)


@SCHEDULES
def test_later_tokens_do_not_reach_earlier_inputs(schedule: ScaleSchedule) -> None:
    _, vae = pair(schedule)
    tokens = torch.randint(40, (1, schedule.total))
    changed = tokens.clone()
    at = schedule.offsets[2]
    changed[:, at:] = (changed[:, at:] + 1) % 40
    with torch.no_grad():
        one, other = vae.inputs(tokens), vae.inputs(changed)
    upto = schedule.offsets[3] - 1
    first = at - 1 + schedule.tokens[2]
    assert first == upto and torch.equal(one[:, :upto], other[:, :upto])
    assert not torch.equal(one[:, upto:], other[:, upto:])


def test_vqvae_refuses_wrong_sizes() -> None:
    _, vae = pair(OBLONG)
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 8, 8\); it must be \(B, 3, 8, 12\)"):
        vae.tokens(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tokens is torch\.int64"):
        vae.latent(torch.zeros(1, OBLONG.total + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens is torch\.float32"):
        vae.inputs(torch.zeros(1, OBLONG.total))
