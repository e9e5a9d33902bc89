"""Activation grids against brute force: levels, boundaries, nearest values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bc.activation_grids import (
    GELU_MINIMUM,
    Affine,
    LogSqrt2,
    Noisy,
    ReparametrisedAffine,
    Symmetric,
    TwinGELU,
    TwinSoftmax,
    log_sqrt2,
    symmetric,
    twin_gelu,
    twin_softmax,
)
from bc.activations import ActivationQuantizer
from bc.quantizers.noisyquant import unit_noise
from bc.quantizers.repq_vit import channel_range, tails

BITS = range(2, 9)


def tensor(value: float) -> torch.Tensor:
    return torch.tensor(value)


def levels(quantizer: ActivationQuantizer, low: float, high: float) -> torch.Tensor:
    return quantizer(torch.linspace(low, high, 100_001)).unique()


@pytest.mark.parametrize("bits", BITS)
def test_number_of_levels(bits: int) -> None:
    assert len(levels(Symmetric(tensor(0.1), bits), -30, 30)) == 2**bits
    assert len(levels(Affine.over(tensor(-1.0), tensor(3.0), bits), -5, 5)) == 2**bits
    assert len(levels(TwinGELU(tensor(0.02), bits), -0.3, 4)) == 2**bits
    assert len(levels(TwinSoftmax(tensor(0.125), bits), 0, 1)) <= 2**bits
    assert len(LogSqrt2(tensor(0.9), bits)(torch.logspace(-60, 1, 100_001)).unique()) <= 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_is_nearest_of_its_levels(bits: int) -> None:
    scale = 0.25
    half = 2 ** (bits - 1)
    grid = torch.arange(-half, half) * scale
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * half * scale / 2
    nearest = grid[(x[:, None] - grid).abs().argmin(1)]
    torch.testing.assert_close(symmetric(x, tensor(scale), bits), nearest)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_minmax_of_positive_values_loses_at_most_half_a_step(bits: int) -> None:
    x = torch.linspace(0, 5, 301)
    scale = 5 / (2 ** (bits - 1) - 0.5)
    assert float((symmetric(x, tensor(scale), bits) - x).abs().max()) <= scale / 2 * 1.0001


@pytest.mark.parametrize("bits", BITS)
def test_twin_gelu_boundaries(bits: int) -> None:
    half = 2 ** (bits - 1)
    q = TwinGELU(tensor(0.25), bits)
    ends = torch.tensor([-GELU_MINIMUM, -10.0, 0.0, 0.25 * (half - 1), 1e4])
    expected = torch.tensor([-GELU_MINIMUM, -GELU_MINIMUM, 0.0, 0.25 * (half - 1), 0.25 * (half - 1)])
    assert torch.equal(q(ends), expected)
    negative = -GELU_MINIMUM * torch.arange(half + 1) / half
    torch.testing.assert_close(q(negative), negative, rtol=0, atol=1e-8)
    positive = 0.25 * torch.arange(half)
    torch.testing.assert_close(q(positive), positive, rtol=1e-6, atol=0)


def test_gelu_minimum() -> None:
    x = torch.linspace(-1, -0.5, 100_001, dtype=torch.float64)
    assert float(torch.nn.functional.gelu(x).min()) == pytest.approx(-GELU_MINIMUM, abs=1e-9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("i", range(20))
def test_twin_softmax_boundaries(bits: int, i: int) -> None:
    split, n = 2.0**-i, 2 ** (bits - 1) - 1
    q = TwinSoftmax(tensor(split), bits)
    ends = torch.tensor([0.0, split, 1.0])
    assert torch.equal(q(ends), ends)  # exactly, and without the split on top
    fine = torch.arange(n + 1) * split / n
    torch.testing.assert_close(q(fine), fine, rtol=1e-6, atol=0)
    coarse = torch.arange(n + 1) / n
    coarse = coarse[coarse > split]
    torch.testing.assert_close(q(coarse), coarse, rtol=1e-6, atol=0)
    assert float(q(torch.rand(1000)).max()) <= 1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_log_sqrt2_by_brute_force(bits: int) -> None:
    scale, last = 0.8, 2**bits - 1
    x = torch.logspace(-4, 0, 2000, dtype=torch.float64)
    for value, got in zip(
        x.tolist(), log_sqrt2(x, torch.tensor(scale, dtype=torch.float64), bits).tolist(), strict=True
    ):
        distance = [abs(math.log(value) - math.log(scale * math.sqrt(2) ** -k)) for k in range(last + 1)]
        k = int(np.argmin(distance))
        wanted = 0.0 if k == last else scale * math.sqrt(2) ** -k
        assert got == pytest.approx(wanted, rel=1e-12)


def test_log_sqrt2_keeps_zero_and_its_scale() -> None:
    assert log_sqrt2(torch.tensor([0.0, 0.7, 1.0]), tensor(0.7), 4).tolist() == pytest.approx([0.0, 0.7, 0.7])


def test_affine_range_and_storage() -> None:
    q = Affine.over(tensor(-1.0), tensor(2.0), 4)
    assert float(q.zero_point) == 5 and float(q.scale) == pytest.approx(0.2)
    torch.testing.assert_close(q(torch.tensor([-1.0, 0.0, 2.0, 9.0])), torch.tensor([-1.0, 0.0, 2.0, 2.0]))
    assert q.storage_bits() == 32 + 4
    channels = ReparametrisedAffine(torch.rand(7) + 0.1, torch.arange(7.0), 4)
    assert channels.storage_bits() == 32 + 4
    assert Symmetric(torch.ones(3, 1, 1), 4).storage_bits() == 96


def test_reparametrised_codes_are_the_channels_codes() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 9, 0.1, 3, 1, 20])
    q = ReparametrisedAffine(
        torch.rand(6, generator=generator, dtype=torch.float64) + 0.1,
        torch.tensor([3, -40, 7, 99, 0, 5], dtype=torch.float64),
        4,
    )
    moved = (x + q.shift) / q.ratio
    one = Affine(q.tensor_scale, q.tensor_zero, 4)
    torch.testing.assert_close(one(moved) * q.ratio - q.shift, q(x))


def test_noise_cancels_without_quantization() -> None:
    noise = torch.randint(-64, 64, (5,), generator=torch.Generator().manual_seed(0)) / 64
    x = torch.randint(-1024, 1024, (3, 4, 5), generator=torch.Generator().manual_seed(1)) / 64
    assert torch.equal(Noisy(ActivationQuantizer(), noise)(x), x)  # sums on a dyadic grid are exact
    free = torch.randn(3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(Noisy(ActivationQuantizer(), noise)(free), free, rtol=0, atol=1e-15)


def test_noise_is_removed_by_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    base = Symmetric(tensor(0.3), 4)
    noise = torch.rand(8, generator=generator) * 0.3
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((10, 8), (4, 8), (4,)))
    written_out = torch.nn.functional.linear(base(x + noise), weight, bias - weight @ noise)
    torch.testing.assert_close(torch.nn.functional.linear(Noisy(base, noise)(x), weight, bias), written_out)


def modules() -> list[ActivationQuantizer]:
    return [
        Symmetric(tensor(0.1), 4),
        Affine.over(tensor(-1.0), tensor(3.0), 4),
        TwinGELU(tensor(0.1), 4),
        TwinSoftmax(tensor(0.25), 4),
        LogSqrt2(tensor(1.0), 4),
        Noisy(Symmetric(tensor(0.1), 4), torch.rand(6)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_dtype_shape_and_idempotence(index: int) -> None:
    q = modules()[index]
    x = torch.rand(2, 5, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = q(x.to(dtype))
        assert out.dtype == dtype and out.shape == x.shape and bool(torch.isfinite(out).all())
    before = x.clone()
    out = q(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(q(out), out)
    restored = modules()[index]
    restored.load_state_dict(q.state_dict())
    assert torch.equal(restored(x), out)


@pytest.mark.parametrize("index", range(6))
def test_zero_stays_zero(index: int) -> None:
    if index < 5:
        assert torch.equal(modules()[index](torch.zeros(3, 6)), torch.zeros(3, 6))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.floats(0.001, 10), st.integers(0, 19), st.integers(0, 2**31))
def test_candidates_broadcast(bits: int, scale: float, i: int, seed: int) -> None:
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    scales = torch.tensor([scale, scale * 2]).reshape(2, 1, 1)
    for function, parameters in ((symmetric, scales), (twin_gelu, scales), (twin_softmax, 0 * scales + 2.0**-i)):
        together = function(x.unsqueeze(0), parameters, bits)
        assert torch.equal(together[1], function(x, parameters[1, 0, 0], bits))


def test_noise_depends_on_name_and_seed_alone() -> None:
    assert torch.equal(unit_noise("a", 50, 0), unit_noise("a", 50, 0))
    assert not torch.equal(unit_noise("a", 50, 0), unit_noise("b", 50, 0))
    assert not torch.equal(unit_noise("a", 50, 0), unit_noise("a", 50, 1))
    assert -1 <= float(unit_noise("a", 5000, 0).min()) < -0.99 and 0.99 < float(unit_noise("a", 5000, 0).max()) <= 1


def test_channels_away_from_zero() -> None:
    low, high = torch.tensor([[3.0], [-7.0], [5.0], [0.0]]), torch.tensor([[4.0], [-5.0], [5.0], [0.0]])
    scale, zero = channel_range(low, high, 4)
    q = ReparametrisedAffine(scale[:, 0], zero[:, 0], 4)
    for ends in (low, high):
        torch.testing.assert_close(q(ends[:, 0]), ends[:, 0], rtol=0.02, atol=0)
    assert float(q(torch.tensor([3.0, -5.0, 5.0, 0.0]))[2]) == 5


def test_tails_are_quantiles() -> None:
    x = torch.randn(5, 1003, generator=torch.Generator().manual_seed(0))
    for share in (1.0, 0.9999, 0.999, 0.99):
        low, high = tails(x, share)
        torch.testing.assert_close(low[:, 0], x.quantile(1 - share, dim=1))
        torch.testing.assert_close(high[:, 0], x.quantile(share, dim=1))
    assert tails(torch.ones(2, 1), 0.999)[0].tolist() == [[1], [1]]
