"""Bias Compensation against its definition: brute-force means, perturbations, paired forwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bc.compensation import (
    BiasCompensation,
    PositionSums,
    attach,
    bias_parameters,
    compensation_of,
    detach,
    fold,
    linear_bias,
    optimal_bias,
)
from bc.errors import QuantizationError, UserError
from bc.positions import PositionContext, token_positions
from bc.regularise import LowRank

GRANULARITIES = ["channel", "sink", "positional"]
LENGTH = 7

# What is averaged -----------------------------------------------------------------------------------------------------


def random_batches(seed: int = 0, channels: int = 5) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(values, positions, valid): batches of unequal size, unequal lengths, one with left padding."""
    generator = torch.Generator().manual_seed(seed)
    out: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
    for size, length in ((3, LENGTH), (1, LENGTH), (4, 4), (2, 1)):
        values = torch.randn(size, length, channels, generator=generator) * 3 + 1
        out.append((values, torch.arange(length)[None], None))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    positions, valid = token_positions(6, mask, 0, None, torch.device("cpu"))
    out.append((torch.randn(3, 6, channels, generator=generator) + 2, positions, valid))
    return out


def brute_rows(samples, granularity: str, k: int = 1, length: int = LENGTH) -> np.ndarray:
    """Every vector, put by hand into the row that its position belongs to, then averaged in float64."""
    rows = {"channel": 1, "sink": min(k + 1, length), "positional": length}[granularity]
    found: list[list[np.ndarray]] = [[] for _ in range(rows)]
    everything = []
    for values, positions, valid in samples:
        for b in range(len(values)):
            for t in range(values.shape[1]):
                if valid is not None and not valid[b, t]:
                    continue
                p = int(positions[b if len(positions) > 1 else 0, t])
                found[min(p, rows - 1)].append(values[b, t].double().numpy())
                everything.append(values[b, t].double().numpy())
    return np.stack([np.mean(f if f else everything, axis=0) for f in found])


def sums_of(samples, length: int = LENGTH) -> PositionSums:
    sums = PositionSums(length, samples[0][0].shape[-1])
    for values, positions, valid in samples:
        sums.add(values, positions, valid)
    return sums


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("k", [1, 2, 6, 7, 50])
def test_means_equal_brute_force(granularity, k):
    samples = random_batches()
    rows = sums_of(samples).mean(granularity, k)
    expected = brute_rows(samples, granularity, k)
    assert rows.dtype == torch.float32 and rows.shape == expected.shape
    assert np.allclose(rows.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_samples_weigh_the_same_in_batches_of_any_size(granularity):
    values = torch.randn(7, LENGTH, 3, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    whole = sums_of([(values, positions, None)]).mean(granularity)
    for size in (1, 2, 3, 4, 6):
        parts = sums_of([(v, positions, None) for v in values.split(size)]).mean(granularity)
        assert torch.allclose(parts, whole, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_merged_sums_equal_all_at_once(granularity, cut):
    samples = random_batches(1)
    first, second, whole = sums_of(samples[:cut]), sums_of(samples[cut:]), sums_of(samples)
    first.merge(second)
    assert torch.equal(first.count, whole.count)
    assert torch.allclose(first.mean(granularity), whole.mean(granularity), atol=1e-6)


def test_flattened_tokens_are_the_same_samples():
    values = torch.randn(3, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None]
    flat = sums_of([(values.reshape(-1, 4), positions, None)])
    assert torch.equal(flat.total, sums_of([(values, positions, None)]).total)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :3] = 0
    positions, valid = token_positions(LENGTH, mask, 0, None, values.device)
    assert valid is not None
    flat = sums_of([(values.reshape(-1, 4), positions, valid)])
    assert torch.equal(flat.total, sums_of([(values, positions, valid)]).total)


@pytest.mark.parametrize("granularity", ["channel", "sink", "positional"])
def test_stored_sums_are_rounded_once_and_then_taken_in_double_precision(granularity):
    values = 1e3 + torch.randn(7, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    batches = [(values, torch.arange(LENGTH)[None], None)]
    wide, stored, other = sums_of(batches), sums_of(batches).as_stored(), sums_of(batches).as_stored()
    wide.total = wide.total.float().double()
    assert stored.total.dtype == torch.float32
    assert torch.equal(stored.mean(granularity), wide.mean(granularity))
    stored.merge(other)
    wide.merge(wide)
    assert torch.equal(stored.mean(granularity), wide.mean(granularity))


def test_a_position_without_samples_gets_the_mean_of_all():
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    rows = sums_of([(values, torch.arange(3)[None], None)], length=5).mean("positional")
    assert torch.allclose(rows[3:], values.mean((0, 1)).expand(2, 4), atol=1e-6)


def test_no_samples_is_an_error():
    with pytest.raises(UserError, match="sample"):
        PositionSums(4, 2).mean("channel")


def test_half_values_are_summed_in_single_precision_or_better():
    values = torch.full((400, 2, 3), 300.0, dtype=torch.float16)  # a half sum would overflow at 65504
    rows = sums_of([(values, torch.arange(2)[None], None)], length=2).mean("positional")
    assert torch.allclose(rows, torch.full((2, 3), 300.0))


def test_a_large_offset_does_not_drown_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = 1000 + torch.randn(200, 3, 2, generator=generator)
    sums = PositionSums(3, 2)
    for part in values.split(7):
        sums.add(part, torch.arange(3)[None])
    assert np.allclose(sums.mean("positional").numpy(), values.double().mean(0).numpy(), rtol=1e-6)


# The optimum ----------------------------------------------------------------------------------------------------------


def pairs(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Float and quantized outputs, in batches of unequal size and length."""
    generator = torch.Generator().manual_seed(seed)
    exact = [torch.randn(s, t, 5, generator=generator) for s, t in ((4, LENGTH), (1, LENGTH), (2, 3))]
    quantized = [y + 0.3 * torch.randn(y.shape, generator=generator) + 0.2 for y in exact]
    return exact, quantized


def error_with(bias: torch.Tensor, granularity: str, exact: list[torch.Tensor], quantized: list[torch.Tensor]) -> float:
    """Squared error when row min(position, last) of the table is added; written without the module."""
    total = 0.0
    for y, y_hat in zip(exact, quantized, strict=True):
        rows = bias[[min(t, len(bias) - 1) for t in range(y.shape[1])]]
        total += float((y.double() - (y_hat.double() + rows.double())).square().sum())
    return total


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_optimal_bias_is_the_mean_difference(granularity):
    exact, quantized = pairs(0)
    samples = [(y - h, torch.arange(y.shape[1])[None], None) for y, h in zip(exact, quantized, strict=True)]
    assert np.allclose(optimal_bias(exact, quantized, granularity).numpy(), brute_rows(samples, granularity), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(GRANULARITIES), st.floats(0.01, 10.0), st.booleans())
def test_any_perturbation_raises_the_calibration_error(seed, granularity, size, single):
    exact, quantized = pairs(seed % 7)
    bias = optimal_bias(exact, quantized, granularity)
    direction = torch.randn(bias.shape, generator=torch.Generator().manual_seed(seed))
    if single:
        keep = torch.zeros(bias.numel())
        keep[seed % bias.numel()] = 1
        direction = direction.sign() * keep.reshape(bias.shape)
    direction *= size / direction.norm()
    best = error_with(bias, granularity, exact, quantized)
    assert error_with(bias + direction, granularity, exact, quantized) > best
    assert best < error_with(torch.zeros_like(bias), granularity, exact, quantized)


def test_finer_tables_fit_better_in_sample():
    exact, quantized = pairs(0)
    errors = [error_with(optimal_bias(exact, quantized, g), g, exact, quantized) for g in GRANULARITIES]
    assert errors[0] > errors[1] > errors[2]


def test_the_removed_error_is_the_square_of_the_bias():
    """E‖Y − Ŷ‖² − E‖Y − Ŷ − b‖² = ‖b‖² for the optimal b."""
    exact, quantized = pairs(0)
    bias = optimal_bias(exact, quantized, "channel")
    tokens = sum(y.shape[0] * y.shape[1] for y in exact)
    removed = error_with(torch.zeros_like(bias), "channel", exact, quantized) - error_with(
        bias, "channel", exact, quantized
    )
    assert removed / tokens == pytest.approx(float(bias.square().sum()), rel=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("own_bias", [True, False])
@pytest.mark.parametrize("other_input", [True, False])
def test_the_closed_form_equals_paired_forwards(granularity, own_bias, other_input):
    generator = torch.Generator().manual_seed(0)
    exact = nn.Linear(6, 5, bias=own_bias)
    quantized = copy.deepcopy(exact)
    quantized.weight.data = (exact.weight.data * 4).round() / 4
    inputs = [torch.randn(s, t, 6, generator=generator) + 1 for s, t in ((4, LENGTH), (1, LENGTH), (2, 3))]
    fed = [x + 0.1 * torch.randn(x.shape, generator=generator) if other_input else x for x in inputs]
    with torch.no_grad():
        expected = optimal_bias([exact(x) for x in inputs], [quantized(x) for x in fed], granularity)

    def mean(values: list[torch.Tensor]) -> torch.Tensor:
        return sums_of([(x, torch.arange(x.shape[1])[None], None) for x in values]).mean(granularity)

    found = linear_bias(exact.weight.data, quantized.weight.data, mean(inputs), mean(fed) if other_input else None)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)


# The module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9])
def test_rows_within_and_beyond_the_fitted_length(tokens):
    """Positional: the mean of the rows after the first; sink: the shared row; channel: the only row."""
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    output = torch.zeros(2, tokens, 3)
    expected = {
        "positional": torch.stack([table[t] if t < 4 else table[1:].mean(0) for t in range(tokens)]),
        "sink": torch.stack([table[min(t, 3)] for t in range(tokens)]),
    }
    for granularity, rows in expected.items():
        found = BiasCompensation(table, granularity, dtype=torch.float32)(output)
        assert torch.allclose(found, rows.expand(2, tokens, 3), atol=1e-6)
    found = BiasCompensation(table[:1], "channel", dtype=torch.float32)(output)
    assert torch.allclose(found, table[0].expand(2, tokens, 3))


def test_a_positional_table_of_one_row_serves_every_position():
    found = BiasCompensation(torch.tensor([[1.0, 2.0]]), "positional")(torch.zeros(1, 3, 2))
    assert torch.equal(found, torch.tensor([1.0, 2.0]).expand(1, 3, 2))


@pytest.mark.parametrize("granularity", ["sink", "positional"])
def test_positions_come_from_the_context(granularity):
    context = PositionContext()
    table = torch.arange(8.0).reshape(4, 2)
    module = BiasCompensation(table, granularity, context)
    context.set(torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]]), None)
    found = module(torch.zeros(2, 4, 2))
    assert torch.equal(found[0], table[[0, 0, 1, 2]]) and torch.equal(found[1], table)
    assert torch.equal(module(torch.zeros(8, 2)), found.reshape(8, 2))  # tokens flattened, as OPT may do
    assert torch.equal(module(torch.zeros(2, 1, 2)), found[:, -1:])  # logits of the last token only
    context.set(torch.tensor([[2]]), None)  # one step of generation, a batch of three
    assert torch.equal(module(torch.zeros(3, 1, 2)), table[2].expand(3, 1, 2))
    assert torch.equal(module(torch.zeros(3, 2)), table[2].expand(3, 2))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_output_is_not_changed_in_place(granularity):
    """A residual stream may alias the output that is compensated."""
    seen: list[torch.Tensor] = []

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            seen.append(y)
            return y

    module = Inner()
    attach(module, torch.ones(1 if granularity == "channel" else 3, 2), granularity)
    x = torch.ones(1, 3, 2)
    assert torch.equal(module(x), torch.full((1, 3, 2), 3.0))
    assert torch.equal(seen[0], torch.full((1, 3, 2), 2.0))
    identity = nn.Identity()
    attach(identity, torch.ones(1 if granularity == "channel" else 3, 2), granularity)
    identity(x)
    assert torch.equal(x, torch.ones(1, 3, 2))


def test_tuples_keep_their_other_elements():
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str, None]:
            return x, "weights", None

    module = Pair()
    attach(module, torch.full((1, 2), 0.5), "channel")
    first, *rest = module(torch.zeros(1, 3, 2))
    assert torch.equal(first, torch.full((1, 3, 2), 0.5)) and rest == ["weights", None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_outputs_dtype_stays(dtype):
    module = BiasCompensation(torch.ones(3, 2), "positional")
    assert module(torch.zeros(1, 5, 2, dtype=dtype)).dtype == dtype
    assert BiasCompensation(torch.ones(1, 2), "channel")(torch.zeros(4, 2, dtype=dtype)).dtype == dtype


def test_attach_adds_to_what_is_attached():
    module = nn.Linear(3, 2)
    x = torch.randn(2, 4, 3)
    raw = module(x)
    first, second = torch.randn(4, 2), torch.randn(4, 2)
    attach(module, first, "positional", dtype=torch.float32)
    attach(module, second, "positional", dtype=torch.float32)
    assert torch.allclose(module(x), raw + first + second, atol=1e-6)
    assert len(module._forward_hooks) == 1
    assert bias_parameters(module) == 8


def test_a_second_fit_of_the_remainder_reaches_the_optimum_again():
    """What a published code loses: the second bias is fitted around the first, and does not replace it."""
    exact, quantized = pairs(0)
    module = nn.Identity()
    attach(module, torch.randn(1, 5), "channel", dtype=torch.float32)
    attach(module, optimal_bias(exact, [module(y) for y in quantized], "channel"), "channel", dtype=torch.float32)
    again = optimal_bias(exact, [module(y) for y in quantized], "channel")
    assert again.abs().max() < 1e-5


@pytest.mark.parametrize(("shape", "granularity"), [((3, 2), "positional"), ((1, 2), "channel"), ((4, 2), "sink")])
def test_attach_refuses_another_shape_and_keeps_the_first(shape, granularity):
    module = nn.Linear(3, 2)
    attach(module, torch.ones(4, 2), "positional")
    with pytest.raises(UserError, match="granularity"):
        attach(module, torch.ones(shape), granularity)
    found = compensation_of(module)
    assert found is not None and torch.equal(found.bias, torch.ones(4, 2).half())


def test_detach_restores():
    module = nn.Linear(3, 2)
    other: list[int] = []
    module.register_forward_hook(lambda *_: other.append(1))
    x = torch.randn(2, 4, 3)
    raw, keys = module(x), set(module.state_dict())
    attach(module, torch.ones(4, 2), "positional")
    assert not torch.equal(module(x), raw)
    detach(module)
    assert torch.equal(module(x), raw)
    assert compensation_of(module) is None and bias_parameters(module) == 0
    assert set(module.state_dict()) == keys
    assert len(other) == 3  # hooks of others stay
    detach(module)  # nothing to do
    attach(module, torch.ones(4, 2), "positional")
    assert torch.allclose(module(x), raw + 1, atol=1e-6)


@pytest.mark.parametrize(("rows", "granularity"), [(1, "channel"), (2, "sink"), (5, "positional")])
def test_the_state_dict_holds_the_bias_in_its_shape(rows, granularity):
    module = nn.Sequential(nn.Linear(3, 2))
    attach(module[0], torch.randn(rows, 2), granularity)
    state = module.state_dict()
    assert state["0.compensation.bias"].shape == (rows, 2)
    assert state["0.compensation.bias"].dtype == torch.float16
    fresh = nn.Sequential(nn.Linear(3, 2))
    attach(fresh[0], torch.zeros(rows, 2), granularity)
    fresh.load_state_dict(state)
    x = torch.randn(2, 6, 3)
    assert torch.equal(fresh(x), module(x))
    assert not any("compensation" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_folding_a_linear_changes_no_output_and_costs_nothing(bias):
    module = nn.Linear(3, 2, bias=bias)
    x = torch.randn(2, 4, 3)
    attach(module, torch.randn(1, 2), "channel")
    before = module(x)
    assert bias_parameters(module) == 2
    assert fold(module)
    assert torch.allclose(module(x), before, atol=1e-6)
    assert compensation_of(module) is None and bias_parameters(module) == 0 and not module._forward_hooks
    assert not fold(module)  # nothing left


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [5, 4])
def test_folding_a_convolution_changes_no_output(bias, size):
    """Its channels are axis 1, also where the image happens to be as wide as there are channels."""
    module = nn.Conv2d(3, 4, 1, bias=bias)
    x = torch.randn(2, 3, size, size)
    raw, extra = module(x), torch.randn(1, 4)
    attach(module, extra, "channel", dtype=torch.float32)
    before = module(x)
    assert torch.allclose(before, raw + extra[0][None, :, None, None], atol=1e-6)
    assert fold(module)
    assert torch.allclose(module(x), before, atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("rows", "granularity"), [(2, "sink"), (4, "positional")])
def test_what_depends_on_the_position_does_not_fold(rows, granularity, own):
    module = nn.Linear(3, 2, bias=own)
    attach(module, torch.randn(rows, 2), granularity)
    assert fold(module) == (own and granularity == "sink")
    assert compensation_of(module) is not None


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_nobody_sees_the_output_change(rows):
    """Whatever a hook, a global hook or autograd has kept of a Linear's output stays as it was."""
    module, x = nn.Linear(3, 2), torch.randn(2, 5, 3)
    with torch.no_grad():
        plain = module(x)
    table = torch.randn(rows, 2)
    kept = []

    def keep(called, args, output):
        if called is module:
            kept.append(output)

    late = table[-1:].expand(5 - rows, 2)
    expected = plain + torch.cat([table, late])
    for register in (module.register_forward_hook, torch.nn.modules.module.register_module_forward_hook, None):
        handle = register(keep) if register else None
        attach(module, table, "sink" if rows < 5 else "positional", dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(module(x), expected, atol=1e-6)
            assert torch.allclose(module(x), expected, atol=1e-6)  # neither the weight nor the bias was changed
        assert all(torch.equal(value, plain) for value in kept) and len(kept) == (2 if register else 0)
        out = module(x.clone().requires_grad_())
        out.sum().backward()
        assert torch.allclose(out, expected, atol=1e-6)
        detach(module)
        if handle is not None:
            handle.remove()
        kept.clear()


@pytest.mark.parametrize(("leading", "rank"), [(1, 0), (3, 0), (0, 2), (1, 2), (3, 2)])
def test_the_row_that_positions_share_folds(leading, rank):
    """Into the bias that is there; outputs stay, also of tokens in the middle and past the fitted length."""
    torch.manual_seed(0)
    module, context = nn.Linear(3, 2), PositionContext()
    base = torch.randn(leading + 1, 2)
    table = LowRank(base, torch.randn(4, rank), torch.randn(rank, 2)) if rank else base
    attach(module, table, "lowrank" if rank else "sink", context, torch.float32)
    x, parts = torch.randn(2, 9, 3), [slice(0, 9), slice(2, 3), slice(1, 6), slice(8, 9)]

    def outputs():
        found = []
        for part in parts:
            context.set(torch.arange(9)[None, part], None)
            found.append(module(x[:, part]))
        return found

    before, size = outputs(), bias_parameters(module)
    assert fold(module) and not fold(module)
    assert bias_parameters(module) == size - 2
    for one, two in zip(before, outputs(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_modules_that_have_no_bias_of_their_own_do_not_fold():
    module = nn.LayerNorm(2)
    attach(module, torch.randn(1, 2), "channel")
    assert not fold(module)
    assert compensation_of(module) is not None


@pytest.mark.parametrize("granularity", ["sink", "positional"])
def test_a_deep_copy_is_independent(granularity):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    context = PositionContext.of(model)
    attach(model[0], torch.randn(4, 2), granularity, context)
    twin = copy.deepcopy(model)
    a, b = compensation_of(model[0]), compensation_of(twin[0])
    assert a is not None and b is not None and a is not b
    assert b.context is PositionContext.of(twin) and b.context is not context
    x = torch.randn(2, 3, 3)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(twin(x), expected)
        b.bias.zero_()
        assert torch.equal(model(x), expected)
        assert not torch.equal(twin(x), expected)
        detach(twin[0])
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_bias_that_cannot_be_stored_is_an_error(value):
    bias = torch.zeros(2, 3)
    bias[1, 2] = value
    module = nn.Linear(3, 3)
    with pytest.raises(QuantizationError):
        attach(module, bias, "positional")
    assert compensation_of(module) is None and not module._forward_hooks


def test_a_bias_too_large_for_half_fits_single_precision():
    bias = torch.full((1, 2), 1e6)
    with pytest.raises(QuantizationError, match="float32"):
        BiasCompensation(bias, "channel")
    assert torch.equal(BiasCompensation(bias, "channel", dtype=torch.float32).bias, bias)


def test_sums_that_overflow_keep_the_first_bias():
    module = nn.Linear(3, 2)
    attach(module, torch.full((1, 2), 60000.0), "channel")
    with pytest.raises(QuantizationError):
        attach(module, torch.full((1, 2), 60000.0), "channel")
    assert compensation_of(module) is not None


# Positions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "mask", "past", "expected", "valid"),
    [
        (3, None, 0, [[0, 1, 2]], None),
        (2, None, 5, [[5, 6]], None),
        (3, [[1, 1, 1], [1, 1, 1]], 0, [[0, 1, 2]], None),
        (1, [[1, 1, 1, 1]], 3, [[3]], None),
        (4, [[0, 0, 1, 1], [1, 1, 1, 1]], 0, [[0, 0, 0, 1], [0, 1, 2, 3]], [[False] * 2 + [True] * 2, [True] * 4]),
        (1, [[0, 0, 1, 1], [1, 1, 1, 1]], 3, [[1], [3]], None),
        (3, [[1, 1, 0]], 0, [[0, 1, 1]], [[True, True, False]]),
    ],
)
def test_token_positions(tokens, mask, past, expected, valid):
    found, real = token_positions(tokens, torch.tensor(mask) if mask else None, past, None, torch.device("cpu"))
    assert found.tolist() == expected
    assert (real.tolist() if real is not None else None) == valid


def test_explicit_positions():
    ids = torch.tensor([[4, 5], [0, 1]])
    assert token_positions(2, None, 0, ids, ids.device)[0].tolist() == ids.tolist()
    full = torch.zeros(2, 1, 2, 2)  # a four-dimensional mask says nothing about padding
    assert token_positions(2, full, 0, ids, ids.device)[0].tolist() == ids.tolist()
