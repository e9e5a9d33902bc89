"""Plain signs: the scale is the least-squares one, storage counts what is stored, BiLLM beats it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bc.errors import QuantizationError, UserError
from bc.quantizers import create
from bc.settings import Bits


def draw(rows: int = 12, columns: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [-1, 8, 12])
def test_every_scale_is_that_of_least_squares(group_size):
    weight = draw()
    result = create("sign", Bits(1, group_size=group_size)).quantize_weight(weight, None).weight
    size = 40 if group_size == -1 else group_size
    expected = np.zeros((12, 40))
    for row in range(12):
        for start in range(0, 40, size):
            w = weight[row, start : start + size].double().numpy()
            signs = np.where(w >= 0, 1.0, -1.0)[:, None]
            alpha = np.linalg.lstsq(signs, w, rcond=None)[0]
            expected[row, start : start + size] = (signs @ alpha).ravel()
    np.testing.assert_allclose(result.dequantize().numpy(), expected, rtol=1e-3)  # scales are fp16
    assert result.storage_bits() == 12 * 40 + 16 * 12 * -(-40 // size)


def test_zeros_and_half_weights():
    result = create("sign", Bits(1)).quantize_weight(torch.zeros(3, 5), None).weight
    assert torch.equal(result.dequantize(), torch.zeros(3, 5))
    weight = draw().half()
    found = create("sign", Bits(1)).quantize_weight(weight, None).weight.dequantize()
    assert found.dtype == torch.float32
    assert torch.equal(found, create("sign", Bits(1)).quantize_weight(weight.float(), None).weight.dequantize())


def test_binarization_with_salient_columns_is_far_better():
    """In the norm of the inputs' second moment: under half the error in each of 20 problems."""
    for seed in range(20):
        weight, x = draw(24, 128, seed), draw(400, 128, seed + 100)
        x[:, :4] *= 6
        hessian = x.T @ x / 400
        errors = {}
        for name in ("sign", "billm"):
            change = create(name, Bits(1)).quantize_weight(weight, hessian).weight.dequantize() - weight
            errors[name] = float(torch.trace(change @ hessian @ change.T))
        assert errors["billm"] < 0.5 * errors["sign"]


def test_refusals():
    with pytest.raises(UserError, match=r"bits\.weight: 2 does not go with quantizer 'sign'"):
        create("sign", Bits(2))
    with pytest.raises(UserError, match="sign"):
        create("sign", Bits(1), center=True)
    with pytest.raises(QuantizationError, match="half precision"):
        create("sign", Bits(1)).quantize_weight(torch.full((2, 2), 1e6), None)
