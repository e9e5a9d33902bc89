"""Round-to-nearest and the registry of quantizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bc.errors import UserError
from bc.quantizers import available, create, option_names
from bc.quantizers.base import Quantizer
from bc.settings import Bits


def by_hand(weight: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Each row and group on its own asymmetric min-max grid: the nearest of all levels, in float64."""
    out = np.empty_like(weight, dtype=np.float64)
    for r in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            part = weight[r, start : start + size].astype(np.float64)
            low, high = min(part.min(), 0), max(part.max(), 0)
            step = (high - low) / (2**bits - 1)
            levels = step * (np.arange(2**bits) - np.round(-low / step))
            out[r, start : start + size] = levels[np.abs(part[:, None] - levels).argmin(1)]
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 5, 8])
def test_weights_go_to_the_nearest_level(bits, group_size):
    weight = torch.randn(6, 17, generator=torch.Generator().manual_seed(bits))
    result = create("rtn", Bits(bits, 16, group_size)).quantize_weight(weight, None)
    expected = by_hand(weight.numpy(), bits, 17 if group_size == -1 else group_size)
    assert np.allclose(result.weight.dequantize().numpy(), expected, atol=1e-5)
    assert result.notes == {}


def test_options():
    weight = torch.randn(6, 17, generator=torch.Generator().manual_seed(0))
    plain = create("rtn", Bits(3)).quantize_weight(weight, None).weight.dequantize()
    for options in ({"symmetric": True}, {"clip": "mse"}, {"granularity": "tensor"}):
        changed = create("rtn", Bits(3), **options).quantize_weight(weight, None).weight.dequantize()
        assert not torch.equal(plain, changed)
    tensor = create("rtn", Bits(3), granularity="tensor").quantize_weight(weight, None).weight
    assert len(tensor.dequantize().unique()) <= 8
    assert tensor.storage_bits() == 6 * 17 * 3 + 32 + 3


def test_more_bits_never_hurt():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float((create("rtn", Bits(b)).quantize_weight(weight, None).weight.dequantize() - weight).square().mean())
        for b in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_registry_is_found_by_discovery():
    assert {"rtn", "gptq"} <= set(available())
    assert all(issubclass(c, Quantizer) and c.name == n for n, c in available().items())
    assert "symmetric" in option_names("rtn") and "damping" in option_names("gptq")


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("rtnn", {}, "rtn"),
        ("rtn", {"symmetrical": True}, "symmetric"),
        ("rtn", {"clip": "max"}, "clip"),
        ("rtn", {"symmetric": "yes"}, "symmetric"),
        ("rtn", {"granularity": "column"}, "granularity"),
    ],
)
def test_errors_name_what_is_wrong(name, options, field):
    with pytest.raises(UserError, match=field) as caught:
        create(name, Bits(4), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bits", "options", "field"),
    [
        ("rtn", Bits(1), {}, "bits.weight"),
        ("rtn", Bits(16), {}, "bits.weight"),
        ("gptq", Bits(1), {}, "bits.weight"),
        ("gptq", Bits(16), {}, "bits.weight"),
        ("rtn", Bits(4, 16, 8), {"granularity": "tensor"}, "bits.group_size"),
        ("rtn", Bits(4, 8), {}, "bits.activation"),
    ],
)
def test_bits_that_do_not_go_with_the_quantizer_are_refused_at_once(name, bits, options, field):
    """Not after the model was loaded and the calibration samples were run."""
    with pytest.raises(UserError, match=field):
        create(name, bits, **options)
