"""GPTQ against a slow oracle: Optimal Brain Quantization in column order, with a new inverse for every column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bc.errors import QuantizationError, UserError
from bc.grid import Grid, quantize_weight
from bc.quantizers import create
from bc.quantizers.base import Group
from bc.quantizers.gptq import gptq, inverse_factor
from bc.settings import Bits


def oracle_grid(values: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Min-max scale and zero point of each row, float64."""
    low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    return scale, zero


def oracle(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int = -1,
    *,
    symmetric: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> np.ndarray:
    """Quantized weight, float64: columns in order; each rounding error is spread over the columns that remain.

    With F the columns not yet quantized, the optimal update after column q took the error e is −e / [H_F⁻¹]_qq times
    the row q of H_F⁻¹ (Frantar and Alistarh, Optimal Brain Compression, 2022).
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    columns = w.shape[1]
    size = columns if group_size == -1 else group_size
    dead = np.diag(h) == 0
    h[dead, dead] = np.diag(h)[~dead].mean()
    w[:, dead] = 0
    original = w.copy()
    order = list(np.argsort(-np.diag(h), kind="stable")) if act_order else list(range(columns))
    h = h + damping * np.diag(h).mean() * np.eye(columns)
    out = np.zeros_like(w)
    grids: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for step, column in enumerate(order):
        if static_groups or size >= columns:
            number = column // size
            if number not in grids:
                grids[number] = oracle_grid(original[:, number * size : (number + 1) * size], bits, symmetric)
        else:
            number = step // size
            if number not in grids:
                grids[number] = oracle_grid(w[:, order[step : step + size]], bits, symmetric)
        scale, zero = grids[number]
        codes = np.clip(np.round(w[:, column] / scale) + zero, 0, 2**bits - 1)
        out[:, column] = scale * (codes - zero)
        remaining = order[step:]
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        error = (w[:, column] - out[:, column]) / inverse[0, 0]
        w[:, remaining] -= np.outer(error, inverse[0])
    return out


def problem(seed: int, rows: int, columns: int, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing + 0.2
    return torch.randn(rows, columns, generator=generator), x.T @ x / tokens


def facing_up(weight: torch.Tensor) -> torch.Tensor:
    """Rows whose largest magnitude is positive: a negative one lies on a tie of the symmetric grid, where either code
    is right and the results part."""
    return weight * weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()


def agree(result: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.allclose(result.numpy(), expected, rtol=1e-3, atol=1e-4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_8_by_6_matrix(bits, symmetric):
    for seed in range(5):
        weight, hessian = problem(seed, 8, 6)
        if symmetric:
            weight = facing_up(weight)
        quantized, tried = gptq(weight, hessian, Grid(bits, symmetric))
        assert tried == [0.01]
        assert agree(quantized.dequantize(), oracle(weight, hessian, bits, symmetric=symmetric))


@pytest.mark.parametrize("columns", [12, 14, 17])
@pytest.mark.parametrize("group_size", [-1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [4, 128])
def test_the_slow_oracle_agrees(columns, group_size, static_groups, act_order, block_size):
    """Groups of 3 with blocks of 4 start inside a block and cross its end; 14 and 17 leave shorter last groups."""
    options = {"static_groups": static_groups, "act_order": act_order}
    for seed in range(3):
        weight, hessian = problem(seed, 6, columns)
        result, _ = gptq(weight, hessian, Grid(3, group_size=group_size), 0.01, block_size, **options)
        assert agree(result.dequantize(), oracle(weight, hessian, 3, group_size, **options))


@pytest.mark.parametrize("group_size", [-1, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns(group_size, act_order):
    """A dead input gets weight zero, before any scale is taken, and does not disturb the others."""
    weight, hessian = problem(0, 6, 14)
    dead = [0, 4, 13]
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, dead] = 1000.0
    result, _ = gptq(weight, hessian, Grid(4, group_size=group_size), block_size=4, act_order=act_order)
    found = result.dequantize()
    assert (found[:, dead] == 0).all()
    assert result.scale.max() < 10
    assert agree(found, oracle(weight, hessian, 4, group_size, act_order=act_order))


def test_the_unit_of_h_does_not_matter_beside_dead_columns():
    weight, hessian = problem(1, 16, 6)
    hessian[2], hessian[:, 2] = 0, 0
    plain, _ = gptq(weight, hessian, Grid(4))
    scaled, _ = gptq(weight, hessian * 2.0**-20, Grid(4))
    assert torch.equal(plain.codes, scaled.codes)


def test_all_inputs_dead():
    result, _ = gptq(torch.randn(3, 5), torch.zeros(5, 5), Grid(4))
    assert torch.equal(result.dequantize(), torch.zeros(3, 5))


@pytest.mark.parametrize("group_size", [-1, 3, 7, 16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_the_block_size_does_not_change_the_result(group_size, act_order, clip):
    weight, hessian = problem(3, 10, 40)
    grid = Grid(3, group_size=group_size, clip=clip)
    reference, _ = gptq(weight, hessian, grid, block_size=40, act_order=act_order)
    for block_size in (1, 2, 3, 7, 16, 39, 1000):
        result, _ = gptq(weight, hessian, grid, block_size=block_size, act_order=act_order)
        assert torch.equal(result.codes, reference.codes)
        assert torch.allclose(result.scale, reference.scale, rtol=1e-4)
        assert torch.equal(result.zero_point, reference.zero_point)


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
def test_damping(damping):
    weight, hessian = problem(1, 6, 12)
    result, tried = gptq(weight, hessian, Grid(3), damping)
    assert tried == [damping]
    assert agree(result.dequantize(), oracle(weight, hessian, 3, damping=damping))


def test_one_column_and_a_diagonal_moment_are_rounding_to_nearest():
    for weight, hessian in (
        (torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([[2.0]])),
        (torch.randn(5, 9, generator=torch.Generator().manual_seed(0)), torch.diag(torch.arange(1.0, 10.0))),
    ):
        for group_size in (-1, 4):
            grid = Grid(3, group_size=group_size)
            result, _ = gptq(weight, hessian, grid, block_size=4)
            assert torch.equal(result.dequantize(), quantize_weight(weight, grid).dequantize())


def test_codes_lie_on_the_same_grid_as_rtn():
    weight, hessian = problem(0, 8, 24)
    result, _ = gptq(weight, hessian, Grid(3))
    reference = quantize_weight(weight, Grid(3))
    assert torch.equal(result.scale, reference.scale) and torch.equal(result.zero_point, reference.zero_point)
    assert result.codes.dtype == torch.uint8 and int(result.codes.max()) <= 7


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
def test_no_worse_than_rtn_in_the_norm_of_the_moment(bits, act_order):
    """tr(ΔW H ΔWᵀ) on the same grid: better in every one of 50 random problems, and by far in the mean."""
    ratios = []
    for seed in range(50):
        weight, hessian = problem(seed, 16, 24, tokens=40)
        result, _ = gptq(weight, hessian, Grid(bits), act_order=act_order)
        ours, nearest = (q.dequantize() - weight for q in (result, quantize_weight(weight, Grid(bits))))
        ratios.append(float(torch.trace(ours @ hessian @ ours.T) / torch.trace(nearest @ hessian @ nearest.T)))
    assert sum(r < 1 for r in ratios) == 50
    assert np.mean(ratios) < 0.65


def test_act_order_visits_large_inputs_first():
    """Their columns are rounded to nearest from (nearly) untouched weights: the very first exactly."""
    weight, hessian = problem(0, 6, 12)
    hessian[7] *= 10
    hessian[:, 7] *= 10
    result, _ = gptq(weight, hessian, Grid(3), act_order=True)
    assert torch.equal(result.dequantize()[:, 7], quantize_weight(weight, Grid(3)).dequantize()[:, 7])


def test_dynamic_groups_in_visiting_order_store_their_index():
    weight, hessian = problem(0, 6, 12)
    for act_order, static, trivial in ((False, False, True), (True, True, True), (True, False, False)):
        result, _ = gptq(weight, hessian, Grid(3, group_size=3), act_order=act_order, static_groups=static)
        assert result.trivial_groups is trivial
        if trivial:
            assert result.group.tolist() == [c // 3 for c in range(12)]
        else:
            order = torch.argsort(hessian.diagonal(), descending=True)
            assert [int(result.group[c]) for c in order] == [c // 3 for c in range(12)]


def test_inputs_are_not_changed():
    weight, hessian = problem(0, 6, 12)
    hessian[3], hessian[:, 3] = 0, 0
    before = weight.clone(), hessian.clone()
    for act_order in (False, True):
        gptq(weight, hessian, Grid(3, group_size=5), act_order=act_order)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_the_factor_is_the_one_of_the_inverse():
    _, hessian = problem(0, 6, 12)
    upper, tried = inverse_factor(hessian.double(), 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)
    assert tried == [0.01]


def indefinite(columns: int, lowest: float) -> torch.Tensor:
    """Symmetric, unit diagonal, least eigenvalue ``lowest``: every pair correlated by the same negative amount."""
    off = (1 - lowest) / (1 - columns)
    return torch.eye(columns) * (1 - off) + off


@pytest.mark.parametrize(("lowest", "expected"), [(-0.005, [0.01]), (-0.05, [0.01, 0.1]), (-0.5, [0.01, 0.1, 1.0])])
def test_a_failed_factorization_raises_the_damping_and_records_it(lowest, expected):
    hessian = indefinite(6, lowest)
    assert torch.linalg.eigvalsh(hessian)[0].item() == pytest.approx(lowest, abs=1e-5)
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    result, tried = gptq(weight, hessian, Grid(3))
    assert tried == pytest.approx(expected)
    assert agree(result.dequantize(), oracle(weight, hessian, 3, damping=expected[-1]))
    assert not torch.equal(result.dequantize(), quantize_weight(weight, Grid(3)).dequantize())  # never RTN
    notes = create("gptq", Bits(3)).quantize_weight(weight, hessian).notes
    assert notes["damping"] == pytest.approx(expected[-1]) and notes["damping_retries"] == len(expected) - 1


def test_no_damping_that_works_is_an_error():
    with pytest.raises(QuantizationError, match="damping"):
        gptq(torch.randn(8, 6), indefinite(6, -1.5), Grid(3))


def test_a_singular_moment_works_with_damping():
    """Fewer tokens than columns."""
    weight, hessian = problem(0, 8, 24, tokens=5)
    assert torch.linalg.matrix_rank(hessian) < 10
    result, _ = gptq(weight, hessian, Grid(4))
    assert agree(result.dequantize(), oracle(weight, hessian, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_an_error(bad):
    weight, hessian = problem(0, 8, 6)
    for damaged in ("weight", "hessian"):
        w, h = weight.clone(), hessian.clone()
        (w if damaged == "weight" else h)[2, 3] = bad
        with pytest.raises(QuantizationError):
            gptq(w, h, Grid(4))


def test_no_moment_is_an_error():
    with pytest.raises(QuantizationError):
        create("gptq", Bits(4)).quantize_weight(torch.randn(3, 4), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype):
    weight, hessian = problem(0, 8, 6)
    result, _ = gptq(weight.to(dtype), hessian, Grid(4))
    assert result.dequantize().dtype == torch.float32
    assert agree(result.dequantize(), oracle(weight.to(dtype), hessian, 4))


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_the_moment_changes_nothing(factor):
    weight, hessian = problem(0, 8, 12)
    a, _ = gptq(weight, hessian, Grid(3))
    b, _ = gptq(weight, hessian * factor, Grid(3))
    assert torch.equal(a.codes, b.codes)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"damping": 0.0}, "damping"),
        ({"damping": -0.1}, "damping"),
        ({"damping": 1.5}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": "high"}, "damping"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"act_order": 1}, "act_order"),
        ({"clip": "l1"}, "clip"),
        ({"percdamp": 0.01}, "percdamp"),
    ],
)
def test_option_errors_name_the_option(options, field):
    with pytest.raises(UserError, match=field) as caught:
        create("gptq", Bits(4), **options)
    assert "\n" not in str(caught.value)


def test_options_reach_the_algorithm():
    weight, hessian = problem(2, 8, 12)
    weight = torch.cat([facing_up(part) for part in weight.split(5, 1)], 1)
    result = create("gptq", Bits(3, 16, 5), symmetric=True, act_order=True, static_groups=True, damping=0.05)
    expected = oracle(weight, hessian, 3, 5, symmetric=True, act_order=True, static_groups=True, damping=0.05)
    assert agree(result.quantize_weight(weight, hessian).weight.dequantize(), expected)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}, {"clip": "mse"}])
@pytest.mark.parametrize("bits", ["w3", "w3g8"])
def test_linears_of_one_input_together_are_as_one_by_one(bits: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(7)
    weights = {name: torch.randn(rows, 24, generator=generator) for name, rows in (("q", 6), ("k", 1), ("v", 10))}
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    quantizer, hessian = create("gptq", Bits.parse(bits), **options), x.T @ x / len(x)
    found = quantizer.quantize_group(Group(weights, hessian))
    assert list(found) == list(weights)
    for name, weight in weights.items():
        alone, together = quantizer.quantize_weight(weight, hessian), found[name]
        assert together.notes == alone.notes
        assert torch.equal(together.weight.group, alone.weight.group)  # type: ignore[union-attr]
        torch.testing.assert_close(together.weight.dequantize(), alone.weight.dequantize(), atol=1e-6, rtol=1e-6)  # type: ignore[union-attr]
        assert together.weight.storage_bits() == alone.weight.storage_bits()  # type: ignore[union-attr]
