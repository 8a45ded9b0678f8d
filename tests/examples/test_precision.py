"""What bits are worth: the models of rounding are what they say, and the committed rows what the docs say."""

import json

import pytest
import torch

from amskv_kernels.models import ConcatKVCache
from amskv_kernels.ops.quantise import dequantise, quantise
from examples import precision, rounding
from examples.subjects import subject

RESULT = subject("digits").results / "precision.json"
D = 64


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 37, 3, D, generator=torch.Generator().manual_seed(seed))


def rms(x: torch.Tensor, back: torch.Tensor) -> float:
    return float((back - x).square().mean().sqrt())


@pytest.mark.parametrize(("bits", "size"), [(4, 16), (4, 32), (6, 32), (8, 64)])
def test_a_group_comes_back_within_half_a_step(bits, size):
    x = rows()
    back = rounding.groups(bits, size)(x)
    most = x.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, -1, size).flatten(-2)
    assert ((back - x).abs() <= most / (2 ** (bits - 1) - 1) * 0.502 + 1e-6).all()
    assert back.unflatten(-1, (-1, size)).flatten(0, 3).sort().values.diff().ne(0).sum(-1).max() < 2**bits


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16], ids=str)
def test_scales_of_two_bytes_keep_every_element_within_half_a_step(scales):
    x = rows()
    back = rounding.rows_of_int8_with(scales)(x)
    step = (x.abs().amax(-1, keepdim=True) / 127).to(scales).float()
    assert ((back - x).abs() <= step * 0.501).all()
    assert not torch.equal(back, rounding.rows_of_int8(x))


def test_a_fitted_scale_is_never_worse_for_its_group():
    x = rows()
    plain, fitted = ((rounding.groups(4, 16, fit)(x) - x).unflatten(-1, (-1, 16)).norm(dim=-1) for fit in (False, True))
    assert (fitted <= plain + 1e-6).all()
    assert fitted.mean() < 0.98 * plain.mean()


def test_a_rotation_alone_changes_nothing_and_spreads_an_outlier():
    x = rows()
    torch.testing.assert_close(rounding.rotated(lambda y: y)(x), x, rtol=1e-5, atol=1e-5)
    x[..., 5] *= 30
    plain = rounding.groups(4, 32)
    assert rms(x, rounding.rotated(plain)(x)) < rms(x, plain(x))


def test_means_and_channels_take_what_all_tokens_share():
    x = rows() * 0.1 + torch.randn(3, D, generator=torch.Generator().manual_seed(1)) * 3
    plain = rounding.groups(4, 16)
    assert rms(x, rounding.centred(plain)(x)) < 0.2 * rms(x, plain(x))
    by_channel = rounding.channels(4, 32)(x)
    assert by_channel.shape == x.shape, "the last span is shorter"
    assert rms(x, by_channel) < 0.2 * rms(x, plain(x))


def test_more_bits_are_closer():
    x = rows()
    found = {each.name: rms(x, each.k(x)) + rms(x, each.v(x)) for each in rounding.four_bits(D, 47)}
    for scales in ("fp16", "bf16"):
        assert found["bf16"] < found[f"int8, scales in {scales}"] < found["int6 in groups of 32"]
    assert found["bf16"] < found["int6 in groups of 32"] < found["int4 in groups of 16"] < found["int4 in groups of 32"]
    assert found["bf16"] < found["fp8 e4m3, a scale per row"] < found["int4 in groups of 16"]
    assert all(4 < each.bits <= 16 for each in rounding.four_bits(D, 47))


def test_the_history_is_rounded_and_the_current_rows_are_not():
    how = rounding.Rounding("int8", 8.5, rounding.rows_of_int8, rounding.rows_of_int8)
    rounded, exact = rounding.Rounded(how), ConcatKVCache()
    q, k, v = rows(1), rows(2), rows(3)
    torch.testing.assert_close(rounded.attend(0, q, k, v, 0.1), exact.attend(0, q, k, v, 0.1))
    held = [dequantise(*quantise(x)) for x in (k, v)]
    other = ConcatKVCache()
    other.attend(0, q, *held, 0.1)
    q, k, v = rows(4), rows(5), rows(6)
    torch.testing.assert_close(rounded.attend(0, q, k, v, 0.1), other.attend(0, q, k, v, 0.1))


def test_the_committed_rows_stay_within_their_bytes_and_say_what_the_docs_say():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    found = {(row["policy"], row["pages"], row["share"]): row for row in result["rows"]}
    assert all(row["retained_share"] <= row["share"] + 1e-9 for row in found.values() if row["share"])
    assert all(len(row["psnr_each"]) == result["images"] for row in found.values())
    full = found["full", precision.INT8, None]
    assert full["bits"] == 8.5
    assert full["psnr_db"] >= 50
    assert full["retained_share"] == pytest.approx(424 / 680 * 17 / 48)
    below = [row for row in found.values() if row["bits"] <= 6.5 and "int4" in row["pages"]]
    assert below
    assert all(row["psnr_db"] < 40 for row in below), "one that reaches 40 dB is worth kernels"
    for share in precision.SHARES:
        assert (
            found["LeastLoss", precision.INT8, share]["psnr_db"] > found["LeastLoss", precision.HALF, share]["psnr_db"]
        )
