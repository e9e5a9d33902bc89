"""Affine grids against brute force: every element is compared with every level of its grid, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bc.errors import UserError
from bc.grid import (
    MSE_CANDIDATES,
    MSE_LOWEST,
    Grid,
    QuantizedWeight,
    affine_range,
    decode,
    encode,
    fake_quantize,
    finite,
    fit_range,
    group_index,
    quantize_weight,
    weight_parameters,
)

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
bit_widths = st.integers(2, 8)
TINY = 1e-38  # below this, float32 is subnormal and steps lose their precision


def oracle_range(values: np.ndarray, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of one range in float64, from the definition."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    if scale == 0:
        scale = 1.0
    zero = 2 ** (bits - 1) if symmetric else int(np.clip(np.round(-low / scale), 0, 2**bits - 1))
    return scale, zero


def nearest_distance(x: np.ndarray, scale: float, zero: float, bits: int) -> np.ndarray:
    """Distance of each value to the nearest of all 2^bits levels."""
    levels = scale * (np.arange(2**bits, dtype=np.float64) - zero)
    return np.abs(x.astype(np.float64)[..., None] - levels).min(-1)


def regions(shape: tuple[int, int], granularity: str, group_size: int) -> list[tuple[slice, slice]]:
    """The parts of a matrix that share a scale."""
    if granularity == "tensor":
        return [(slice(None), slice(None))]
    size = shape[1] if group_size == -1 else group_size
    return [(slice(r, r + 1), slice(c, c + size)) for r in range(shape[0]) for c in range(0, shape[1], size)]


def check_nearest(values: np.ndarray, grid: Grid) -> None:
    """The quantized matrix is on its grid, and no level is nearer to any element."""
    quantized = quantize_weight(torch.from_numpy(values), grid)
    result = quantized.dequantize().numpy().astype(np.float64)
    assert result.shape == values.shape and np.isfinite(result).all()
    for number, part in enumerate(regions(values.shape, grid.granularity, grid.group_size)):
        scale = float(quantized.scale.reshape(-1)[number])
        zero = float(quantized.zero_point.reshape(-1)[number])
        assert zero == int(zero) and 0 <= zero <= 2**grid.bits - 1  # zero is a level: it is represented exactly
        nearest = nearest_distance(values[part], scale, zero, grid.bits)
        slack = 1e-5 * np.abs(values[part]) + 2e-5 * scale + TINY
        assert (np.abs(result[part] - values[part]) <= nearest + slack).all()
        steps = result[part] / scale + zero
        assert np.abs(steps - np.round(steps)).max() < 1e-2
        if grid.clip == "minmax":
            expected_scale, expected_zero = oracle_range(values[part], grid.bits, grid.symmetric)
            assert scale == pytest.approx(expected_scale, rel=1e-5, abs=TINY)
            assert abs(zero - expected_zero) <= 1  # a tie may fall either way in float32
            assert (np.abs(result[part] - values[part]) <= scale * 0.5 + slack).all()  # the range is covered


@settings(max_examples=150, deadline=None)
@given(matrices, bit_widths, st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_whole_rows_go_to_the_nearest_level(values, bits, symmetric, clip):
    check_nearest(values, Grid(bits, symmetric, -1, "row", clip))


@settings(max_examples=150, deadline=None)
@given(matrices, bit_widths, st.booleans(), st.integers(1, 10), st.sampled_from(["minmax", "mse"]))
def test_groups_go_to_the_nearest_level(values, bits, symmetric, group_size, clip):
    check_nearest(values, Grid(bits, symmetric, group_size, "row", clip))


@settings(max_examples=80, deadline=None)
@given(matrices, bit_widths, st.booleans(), st.sampled_from(["minmax", "mse"]))
def test_whole_tensors_go_to_the_nearest_level(values, bits, symmetric, clip):
    check_nearest(values, Grid(bits, symmetric, -1, "tensor", clip))


@settings(max_examples=100, deadline=None)
@given(matrices, bit_widths, st.booleans())
def test_zeros_stay_exactly_zero(values, bits, symmetric):
    values[:, 0] = 0
    quantized = quantize_weight(torch.from_numpy(values), Grid(bits, symmetric, 3)).dequantize()
    assert (quantized[torch.from_numpy(values) == 0] == 0).all()


@settings(max_examples=100, deadline=None)
@given(matrices, bit_widths, st.booleans())
def test_mse_clip_is_never_worse_than_minmax_in_any_row(values, bits, symmetric):
    x = torch.from_numpy(values)
    errors = {
        clip: (fake_quantize(x, *fit_range(x, bits, symmetric, clip), bits) - x).square().sum(1)
        for clip in ("minmax", "mse")
    }
    assert (errors["mse"] <= errors["minmax"]).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_clip_finds_the_best_of_the_documented_ranges(bits, symmetric):
    x = np.random.default_rng(0).standard_t(3, (20, 64)).astype(np.float32)
    scale, zero = (t.numpy() for t in fit_range(torch.from_numpy(x), bits, symmetric, "mse"))
    improved = 0
    for row in range(len(x)):
        errors = []
        for shrink in np.linspace(1, MSE_LOWEST, MSE_CANDIDATES + 1):
            s, z = oracle_range(x[row] * shrink, bits, symmetric)
            errors.append((nearest_distance(x[row], s, z, bits) ** 2).sum())
        found = (nearest_distance(x[row], float(scale[row, 0]), float(zero[row, 0]), bits) ** 2).sum()
        assert found == pytest.approx(min(errors), rel=1e-4)
        improved += min(errors) < 0.999 * errors[0]
    assert improved > 10  # the search was needed


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_torchs_own_fake_quantization_agrees(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(6, 32, generator=generator) + 0.3
    scale, zero = weight_parameters(x, Grid(bits, symmetric))
    expected = torch.fake_quantize_per_channel_affine(x, scale[:, 0], zero[:, 0], 0, 0, 2**bits - 1)
    found = fake_quantize(x, scale, zero, bits)
    tie = ((x / scale).abs() % 1 - 0.5).abs() < 1e-4  # either neighbour is right
    assert torch.allclose(found[~tie], expected[~tie], atol=1e-6)
    assert torch.allclose((found - x).abs(), (expected - x).abs(), atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("value", [3.7, -0.011, 1e-20, 65504.0])
def test_a_constant_row_is_exact_on_an_asymmetric_grid(bits, value):
    weight = torch.full((2, 7), value)
    for grid in (Grid(bits), Grid(bits, group_size=3), Grid(bits, granularity="tensor"), Grid(bits, clip="mse")):
        assert torch.allclose(quantize_weight(weight, grid).dequantize(), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_all_zeros(symmetric, clip, granularity):
    quantized = quantize_weight(torch.zeros(3, 5), Grid(4, symmetric, -1, granularity, clip))
    assert torch.equal(quantized.dequantize(), torch.zeros(3, 5))
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_column(symmetric):
    weight = torch.tensor([[1.5], [-2.0], [0.0]])
    quantized = quantize_weight(weight, Grid(8, symmetric))
    assert quantized.scale.shape == (3, 1)
    assert torch.allclose(quantized.dequantize(), weight, rtol=5e-3, atol=0)


def test_a_shorter_last_group_has_its_own_range():
    weight = torch.tensor([[100.0, -100.0, 50.0, 0.01, 0.03]])
    quantized = quantize_weight(weight, Grid(4, group_size=3))
    assert quantized.scale.shape == (1, 2)
    assert quantized.scale[0, 1] == pytest.approx(0.03 / 15)
    assert torch.allclose(quantized.dequantize()[:, 3:], weight[:, 3:], atol=1e-6)


def test_the_symmetric_scale_is_the_documented_one():
    scale, zero = affine_range(torch.tensor([-3.0]), torch.tensor([1.0]), 4, True)
    assert scale.item() == pytest.approx(3 / 7.5) and zero.item() == 8
    codes = encode(torch.tensor([-3.0, 3.0]), scale, zero, 4)
    assert codes.tolist() == [0, 15]  # −8 and 7


def test_an_all_positive_row_is_not_clipped_by_a_symmetric_grid():
    weight = torch.full((1, 4), 0.112)
    assert quantize_weight(weight, Grid(4, symmetric=True)).dequantize() == pytest.approx(
        weight.numpy(), rel=0.5 / 7.5 + 1e-5
    )


@pytest.mark.parametrize(
    ("columns", "size", "expected"),
    [
        (5, 2, [0, 0, 1, 1, 2]),
        (3, -1, [0, 0, 0]),
        (3, 3, [0, 0, 0]),
        (3, 10, [0, 0, 0]),
        (3, 1, [0, 1, 2]),
        (1, 1, [0]),
    ],
)
def test_group_index(columns, size, expected):
    assert group_index(columns, size).tolist() == expected


def test_groups_are_separate_matrices():
    """Changing one group's weights leaves the other groups as they were."""
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    changed = weight.clone()
    changed[:, 3:6] *= 50
    grid = Grid(3, group_size=3)
    a, b = quantize_weight(weight, grid).dequantize(), quantize_weight(changed, grid).dequantize()
    keep = [0, 1, 2, 6, 7, 8, 9]
    assert torch.equal(a[:, keep], b[:, keep])


@pytest.mark.parametrize("bits", range(2, 9))
def test_storage_bits(bits):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert quantize_weight(weight, Grid(bits)).storage_bits() == 60 * bits + 6 * (32 + bits)
    assert quantize_weight(weight, Grid(bits, group_size=4)).storage_bits() == 60 * bits + 18 * (32 + bits)
    assert quantize_weight(weight, Grid(bits, True, 4)).storage_bits() == 60 * bits + 18 * 32
    assert quantize_weight(weight, Grid(bits, granularity="tensor")).storage_bits() == 60 * bits + 32 + bits


def test_a_group_index_that_is_not_trivial_is_paid_for():
    base = quantize_weight(torch.randn(2, 6), Grid(4, group_size=3))
    shuffled = QuantizedWeight(
        base.codes, base.scale, base.zero_point, 4, False, torch.tensor([1, 0, 1, 0, 1, 0]), trivial_groups=False
    )
    assert shuffled.storage_bits() == base.storage_bits() + 6 * 16
    by_hand = base.scale[:, [1, 0, 1, 0, 1, 0]] * (base.codes - base.zero_point[:, [1, 0, 1, 0, 1, 0]])
    assert torch.equal(shuffled.dequantize(), by_hand)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_in_float32(dtype):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = quantize_weight(weight, Grid(4, group_size=3))
    assert result.dequantize().dtype == torch.float32 and result.scale.dtype == torch.float32
    assert torch.equal(result.dequantize(), quantize_weight(weight.float(), Grid(4, group_size=3)).dequantize())


def test_inputs_are_not_changed():
    weight = torch.randn(4, 8)
    copy = weight.clone()
    for grid in (Grid(3, group_size=3, clip="mse"), Grid(3, granularity="tensor", clip="mse"), Grid(3, symmetric=True)):
        quantize_weight(weight, grid)
    assert torch.equal(weight, copy)


def test_codes_and_values_are_inverse():
    scale, zero = torch.tensor([0.25]), torch.tensor([3.0])
    codes = torch.arange(16.0)
    assert torch.equal(encode(decode(codes, scale, zero), scale, zero, 4), codes)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"bits": 1}, "bits.weight"),
        ({"bits": 9}, "bits.weight"),
        ({"bits": 16}, "bits.weight"),
        ({"bits": 4, "group_size": 0}, "bits.group_size"),
        ({"bits": 4, "group_size": -2}, "bits.group_size"),
        ({"bits": 4, "granularity": "column"}, "granularity"),
        ({"bits": 4, "granularity": "tensor", "group_size": 4}, "bits.group_size"),
        ({"bits": 4, "clip": "l1"}, "clip"),
    ],
)
def test_errors_name_the_field_in_one_line(arguments, field):
    with pytest.raises(UserError, match=field) as caught:
        Grid(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_finds_one_value_that_is_not(dtype: torch.dtype, value: float) -> None:
    values = torch.linspace(-3, 3, 130).to(dtype).reshape(10, 13)
    assert finite(values) and finite(values[:0])
    for index in range(values.numel()):
        spoilt = values.clone()
        spoilt.view(-1)[index] = value
        assert not finite(spoilt)
