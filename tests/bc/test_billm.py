"""BiLLM: analytic scales, searches against brute force, error propagation against a direct solution, true storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bc.errors import QuantizationError, UserError
from bc.pipeline import calibrate, compensate
from bc.quantizers import create
from bc.quantizers.billm import (
    BiLLM,
    BinaryWeight,
    billm,
    binarize,
    binarize_block,
    break_points,
    salient_columns,
    split_error,
)
from bc.settings import Bits, Compensation
from tests.conftest import tiny_model

CENTERED = pytest.mark.parametrize("center", [False, True])


def problem(seed: int, rows: int = 24, columns: int = 48, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight with a few large columns, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, torch.randperm(columns, generator=generator)[:4]] *= 3
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns))
    return weight, x.T @ x / tokens


def loss(change: Tensor, hessian: Tensor) -> float:
    return ((change @ hessian) * change).sum().item()


def plus_minus(signs: Tensor) -> Tensor:
    return torch.where(signs, 1.0, -1.0)


# Scales and searches -------------------------------------------------------------------------------------------------


@CENTERED
def test_the_analytic_scale_is_optimal(center):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 30, generator=generator)
    mask = torch.rand(10, 30, generator=generator) > 0.4
    mask[3] = False
    mean, scale = binarize(weight, mask, center)
    signs = plus_minus(weight >= mean)

    def errors(scale: Tensor) -> Tensor:
        return ((weight - mean - scale * signs).square() * mask).sum(1)

    best = errors(scale)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        worse = errors(scale * factor) > best
        assert bool((worse | (mask.sum(1) == 0)).all())
    for row in (0, 5):  # and the closed form is that of least squares
        s, w = signs[row, mask[row]], (weight - mean)[row, mask[row]]
        assert scale[row].item() == pytest.approx((s @ w / (s @ s)).item(), rel=1e-5)
    assert scale[3].item() == mean[3].item() == 0
    assert bool((mean == 0).all()) is not center


@CENTERED
def test_a_residual_sign_never_hurts(center):
    weight, _ = problem(1)
    everything = torch.ones(48, dtype=torch.bool)
    everything[-1] = False  # a block leaves at least one column over
    options = BiLLM.Options(center=center)
    found = binarize_block(weight, everything, options).dequantize()[:, :-1]
    kept = weight[:, :-1]
    mean, scale = binarize(kept, torch.ones_like(kept, dtype=torch.bool), center)
    plain = (kept - mean - scale * plus_minus(kept >= mean)).square().sum(1)
    assert bool(((kept - found).square().sum(1) < plain).all())


@CENTERED
@pytest.mark.parametrize("by", ["block", "row"])
def test_the_break_point_is_the_best_of_its_grid(by, center):
    weight, _ = problem(2)
    options = BiLLM.Options(center=center, break_by=by, break_points=9)
    found = break_points(weight, options)
    for rows in [[r] for r in range(24)] if by == "row" else [list(range(24))]:
        w = weight[rows]
        errors = {}
        for fraction in np.linspace(0.1, 0.9, 9):
            point = np.float32(fraction) * w.abs().max().item()
            total = 0.0
            for values in w.double().numpy():
                for part in (values[np.abs(values) > point], values[np.abs(values) <= point]):
                    if len(part):
                        mean = part.mean() if center else 0.0
                        alpha = np.abs(part - mean).mean()
                        total += ((np.abs(part - mean) - alpha) ** 2).sum()
            errors[point] = total
        got = split_error(w, w.abs() > found[rows], center).sum().item()
        assert got == pytest.approx(min(errors.values()), rel=1e-4)
        assert found[rows[0]].item() == pytest.approx(min(errors, key=errors.__getitem__), rel=1e-5)


def test_one_break_point_a_row_is_at_least_as_good():
    weight, _ = problem(3)
    fine = {"break_points": 81}
    errors = {
        by: split_error(weight, weight.abs() > break_points(weight, BiLLM.Options(break_by=by, **fine)), False).sum()
        for by in ("block", "row")
    }
    plain = split_error(weight, torch.zeros_like(weight, dtype=torch.bool), False).sum()
    assert errors["row"] < errors["block"] < plain


@pytest.mark.parametrize("most", [0, 1, 7, 200])
def test_the_number_of_salient_columns_against_brute_force(most):
    weight, hessian = problem(4)
    score = hessian.diagonal() * weight.square().sum(0)
    chosen = salient_columns(weight, score, most)
    order = sorted(range(48), key=lambda j: -score[j].item())
    errors = {}
    for n in range(1, min(most, 47) + 1):
        errors[n] = 0.0
        for columns in (order[:n], order[n:]):
            part = weight[:, columns].abs()
            errors[n] += (part - part.mean(1, keepdim=True)).square().sum().item()
    best = min(errors, key=errors.__getitem__) if errors else 0
    assert set(chosen.nonzero()[:, 0].tolist()) == set(order[:best])


def test_columns_without_score_are_never_salient():
    weight, _ = problem(4)
    score = torch.zeros(48)
    assert not salient_columns(weight, score, 30).any()
    score[[3, 9]] = 1
    assert salient_columns(weight, score, 30).nonzero()[:, 0].tolist() in ([3], [3, 9])


# The whole -----------------------------------------------------------------------------------------------------------


def direct_update(weight: Tensor, quantized: Tensor, hessian: Tensor, done: int) -> Tensor:
    """The later columns that minimise the error with the first ones quantized: solves for them at once, in float64."""
    h = hessian.double()
    change = (weight - quantized)[:, :done].double()
    return weight[:, done:].double() + change @ h[:done, done:] @ torch.linalg.inv(h[done:, done:])


@CENTERED
@pytest.mark.parametrize("block_size", [5, 16, 48])
def test_against_a_direct_solution(block_size, center):
    """Block by block; after each, the later original columns are solved for at once from all that is quantized."""
    weight, hessian = problem(5)
    options = BiLLM.Options(block_size=block_size, center=center, max_salient=6)
    got, _ = billm(weight, hessian, options)

    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    quantized, current = torch.zeros_like(weight), weight.clone()
    for start in range(0, 48, block_size):
        stop = min(start + block_size, 48)
        part = current[:, start:stop]
        # variance of each input that the later ones do not explain
        variance = torch.stack([1 / torch.linalg.inv(damped[j:, j:].double())[0, 0] for j in range(start, stop)])
        salient = salient_columns(part, variance.float() * part.square().sum(0), options.max_salient)
        quantized[:, start:stop] = binarize_block(part, salient, options).dequantize()
        if stop < 48:
            current[:, stop:] = direct_update(weight, quantized, damped, stop).float()
    torch.testing.assert_close(got.dequantize(), quantized, atol=2e-3, rtol=2e-3)  # scales may round differently


def test_the_exact_update_is_better_than_the_diagonal_one():
    for seed in range(4):
        weight, hessian = problem(seed)
        errors = {}
        for propagation in ("exact", "diagonal"):
            found, _ = billm(weight, hessian, BiLLM.Options(block_size=16, propagation=propagation))
            errors[propagation] = loss(found.dequantize() - weight, hessian)
        assert errors["exact"] < errors["diagonal"]


@pytest.mark.parametrize("options", [{}, {"center": True}, {"break_by": "row"}, {"propagation": "diagonal"}])
def test_far_better_than_plain_signs(options):
    for seed in range(4):
        weight, hessian = problem(seed, rows=32, columns=96)
        result = create("billm", Bits(1), block_size=32, **options).quantize_weight(weight, hessian)
        plain = weight.abs().mean(1, keepdim=True) * weight.sign()
        assert loss(result.weight.dequantize() - weight, hessian) < 0.4 * loss(plain - weight, hessian)
        assert 1 < result.notes["bits_per_weight_signs"] < 1.5


@CENTERED
def test_storage_by_hand(center):
    weight, hessian = problem(6)
    result = create("billm", Bits(1), block_size=20, center=center).quantize_weight(weight, hessian)
    binary, salient = result.weight, result.notes["salient_columns"]
    signs, second, regions, columns = 24 * 48, 24 * salient, 24 * (48 - salient), 48
    scales = 24 * 3 * (7 if center else 4) * 16
    assert binary.storage_bits() == signs + second + regions + columns + scales
    assert result.notes["bits_per_weight_signs"] == pytest.approx((signs + second) / (24 * 48))
    assert binary.residual_signs.shape == (24, salient) and binary.sparse.shape == (24, 48 - salient)
    assert binary.scales.shape == (24, 3, 4) and binary.means.shape == (24, 3, 3 if center else 0)
    assert binary.scales.dtype == binary.means.dtype == torch.float16
    assert all(t.dtype == torch.bool for t in (binary.signs, binary.residual_signs, binary.sparse, binary.salient))
    assert binary.dequantize().shape == (24, 48) and binary.dequantize().dtype == torch.float32


def test_dequantize_by_hand():
    binary = BinaryWeight(
        signs=torch.tensor([[True, False, True, False, True]]),
        residual_signs=torch.tensor([[False, True]]),
        sparse=torch.tensor([[True, False, True]]),
        salient=torch.tensor([False, True, False, True, False]),
        scales=torch.tensor([[[1.0, 2.0, 4.0, 0.5], [3.0, 5.0, 8.0, 0.25]]]).half(),
        means=torch.tensor([[[0.125, 0.25, 0.0625], [0.0, 1.0, -1.0]]]).half(),
        block_size=3,
    )
    # sparse | salient − residual | concentrated ‖ salient + residual | sparse
    assert binary.dequantize().tolist() == [[2 + 0.25, -4 - 0.5 + 0.0625, 1 + 0.125, -8 + 0.25 - 1, 5 + 1]]
    binary.means = torch.zeros(1, 2, 0)
    assert binary.dequantize().tolist() == [[2.0, -4.5, 1.0, -7.75, 5.0]]


def test_dead_inputs_stay_close_to_their_weights():
    weight, hessian = problem(7)
    hessian[[5, 30]] = 0
    hessian[:, [5, 30]] = 0
    binary = create("billm", Bits(1), block_size=16).quantize_weight(weight, hessian).weight
    found = binary.dequantize()
    assert not binary.salient[[5, 30]].any()
    assert torch.equal(found[:, [5, 30]] >= 0, weight[:, [5, 30]] >= 0)
    assert bool(torch.isfinite(found).all())
    nothing = create("billm", Bits(1)).quantize_weight(weight, torch.zeros(48, 48)).weight
    assert bool(torch.isfinite(nothing.dequantize()).all())


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (4, 129), (2, 17)])
def test_odd_shapes(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    binary = create("billm", Bits(1), block_size=16).quantize_weight(weight, torch.eye(shape[1])).weight
    assert binary.dequantize().shape == shape
    if shape[1] == 1:
        torch.testing.assert_close(binary.dequantize(), weight, rtol=1e-3, atol=0)


def test_a_zero_matrix_stays_zero():
    binary = create("billm", Bits(1)).quantize_weight(torch.zeros(4, 8), torch.eye(8)).weight
    assert torch.equal(binary.dequantize(), torch.zeros(4, 8))


def test_refusals():
    with pytest.raises(UserError, match=r"bits.weight: 2 .*set bits=w1"):
        create("billm", Bits(2))
    with pytest.raises(UserError, match="group_size"):
        create("billm", Bits(1, group_size=64))
    for option in ({"block_size": 0}, {"damping": 0.0}, {"max_salient": -1}, {"break_points": 0}, {"break_by": "x"}):
        with pytest.raises(UserError, match=f"quantizer.billm.{next(iter(option))}"):
            create("billm", Bits(1), **option)
    weight, hessian = problem(0)
    method = create("billm", Bits(1))
    with pytest.raises(QuantizationError, match="second moment"):
        method.quantize_weight(weight, None)
    with pytest.raises(QuantizationError, match="not finite"):
        method.quantize_weight(weight * torch.nan, hessian)
    with pytest.raises(QuantizationError, match="half precision"):
        method.quantize_weight(weight * 1e6, hessian)


@pytest.mark.parametrize("options", [{}, {"center": True, "propagation": "diagonal"}])
def test_on_every_family_with_compensation(family_name, tiny, options, token_ids):
    results = calibrate(tiny, create("billm", Bits(1), block_size=16, max_salient=4, **options), token_ids)
    reference, model = tiny(input_ids=token_ids).logits, tiny_model(family_name)
    off = compensate(model, results, Compensation(), None)
    error = (model(input_ids=token_ids).logits - reference).square().mean()
    report = compensate(tiny, results, Compensation.parse("sink"), token_ids, report_calibration=token_ids)
    assert {s.site for s in report.sites} == set(results)
    before, after = report.error("calibration")
    assert after < before
    assert (tiny(input_ids=token_ids).logits - reference).square().mean() < error
    weights = sum(r.weight.signs.numel() for r in results.values())
    stored = sum(r.weight.storage_bits() for r in results.values()) / weights
    assert 2 < stored <= off.bits_per_weight < report.bits_per_weight
