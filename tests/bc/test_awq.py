"""AWQ: scaling is an identity in float, the search never loses to plain rounding, folding keeps the function."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from bc.calibration import output_of
from bc.chains import block_list, chain_of, sites
from bc.errors import QuantizationError, UserError
from bc.grid import Grid, QuantizedWeight, quantize_weight
from bc.models import family_of
from bc.models.base import Region
from bc.parts import Part, leading
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers import create
from bc.quantizers.awq import ScaledWeight, clip_ranges, column_scales, scaled_round
from bc.quantizers.base import Group
from bc.scaling import fold_input_scale, fold_scales, predecessors
from bc.settings import Bits, Compensation
from tests.conftest import MAKERS, VOCABULARY, tiny_model


def problem(seed: int, outliers: float, rows: int = 24, columns: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """Weights of two Linears and inputs with a few channels of large magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(rows, columns, generator=generator) for name in ("a", "b")}
    x = torch.randn(256, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:3]] *= outliers
    return weights, x


def group_of(weights: dict[str, Tensor], x: Tensor) -> Group:
    def loss(candidates: dict[str, Tensor]) -> float:
        errors = [linear(x, candidate - weights[path]) for path, candidate in candidates.items()]
        return torch.cat(errors, 1).square().mean().item()

    return Group(weights, inputs=x, loss=loss)


def plain_loss(group: Group, bits: Bits) -> float:
    assert group.loss is not None
    grid = Grid(bits.weight, False, bits.group_size)
    return group.loss({path: quantize_weight(w, grid).dequantize() for path, w in group.weights.items()})


# The search ----------------------------------------------------------------------------------------------------------


def test_scales_follow_magnitudes_and_dead_channels_count_as_typical_ones():
    magnitude = torch.tensor([1.0, 4.0, 16.0, 0.0])
    assert torch.equal(column_scales(magnitude, 0.0), torch.ones(4).half())
    got = column_scales(magnitude, 0.5).float()
    torch.testing.assert_close(got, torch.tensor([0.5, 1.0, 2.0, 7**0.5 / 2]), rtol=1e-3, atol=0)
    assert torch.equal(column_scales(torch.zeros(3), 0.7), torch.ones(3).half())
    extreme = column_scales(torch.tensor([1.0, 1e-30]), 1.0)
    assert (extreme[0] / extreme[1]).item() == pytest.approx(1e4, rel=1e-2)


@pytest.mark.parametrize("bits", ["w4", "w3", "w2g8", "w3g16"])
@pytest.mark.parametrize("outliers", [1.0, 8.0, 50.0])
@pytest.mark.parametrize("options", [{}, {"clip": False}, {"symmetric": True}])
def test_never_worse_than_plain_rounding(bits, outliers, options):
    for seed in range(3):
        group = group_of(*problem(seed, outliers))
        results = create("awq", Bits.parse(bits), **options).quantize_group(group)
        loss = group.loss({path: r.weight.dequantize() for path, r in results.items()})
        notes = results["a"].notes
        assert loss == pytest.approx(notes["loss"], rel=1e-5)
        assert loss <= notes["loss_rtn"] * (1 + 1e-6)
        if "symmetric" not in options:
            assert notes["loss_rtn"] == pytest.approx(plain_loss(group, Bits.parse(bits)), rel=1e-5)


def test_clearly_better_with_outlier_channels():
    for seed in range(5):
        group = group_of(*problem(seed, 50.0))
        notes = create("awq", Bits.parse("w3")).quantize_group(group)["a"].notes
        assert notes["alpha"] > 0
        assert notes["loss"] < 0.5 * notes["loss_rtn"]


def test_the_chosen_exponent_is_the_best_of_its_grid():
    group = group_of(*problem(3, 20.0))
    results = create("awq", Bits.parse("w3"), n_grid=7, clip=False).quantize_group(group)
    losses = []
    for step in range(7):
        scale = column_scales(group.inputs.abs().mean(0), step / 7)
        found = {path: scaled_round(w, scale, Grid(3)).dequantize() for path, w in group.weights.items()}
        losses.append(group.loss(found))
    assert results["a"].notes["loss"] == min(losses)
    assert results["a"].notes["alpha"] == losses.index(min(losses)) / 7
    assert torch.equal(results["a"].weight.column_scale, results["b"].weight.column_scale)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 8, 12])
def test_clipping_against_brute_force(group_size, symmetric):
    weights, x = problem(1, 5.0, rows=6, columns=20)
    weight, grid = weights["a"].clone(), Grid(3, symmetric, group_size)
    weight[:, 4] *= 6  # a range worth clipping
    found = clip_ranges(weight, x, grid).dequantize()
    size = 20 if group_size == -1 else group_size
    for start in range(0, 20, size):
        part, inputs = weight[:, start : start + size], x[:, start : start + size]
        largest = part.abs().amax(1, keepdim=True)
        errors, candidates = [], []
        for c in torch.linspace(1, 0.5, 11):
            # quantizing the cut weights gives their own range; its ends are those of the cut
            candidate = quantize_weight(torch.clamp(part, -c * largest, c * largest), Grid(3, symmetric)).dequantize()
            candidates.append(candidate)
            errors.append(linear(inputs, candidate - part).square().sum(0))
        best = torch.stack(errors).amin(0)
        got = linear(inputs, found[:, start : start + size] - part).square().sum(0)
        torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-4)
    plain = linear(x, quantize_weight(weight, grid).dequantize() - weight).square().sum()
    assert group_size != -1 or linear(x, found - weight).square().sum() < plain


# The result ----------------------------------------------------------------------------------------------------------


def test_storage_by_hand():
    weight = scaled_round(torch.randn(6, 20), torch.ones(20).half(), Grid(3, group_size=8))
    assert weight.storage_bits() == 120 * 3 + 18 * (32 + 3) + 20 * 16
    assert weight.on_grid().storage_bits() == weight.storage_bits() - 20 * 16
    assert not isinstance(weight, QuantizedWeight)  # or else it could be stored without its column scale
    assert weight.dequantize().dtype == torch.float32 and weight.dequantize().shape == (6, 20)


def test_the_scale_is_stored_as_used():
    group = group_of(*problem(0, 20.0))
    weight = create("awq", Bits.parse("w3g8")).quantize_group(group)["b"].weight
    assert isinstance(weight, ScaledWeight) and weight.column_scale.dtype == torch.float16
    codes, scale, zero = weight.codes.float(), weight.scale[:, weight.group], weight.zero_point[:, weight.group]
    assert torch.equal(weight.dequantize(), scale * (codes - zero) / weight.column_scale.float())


def test_refusals():
    with pytest.raises(UserError, match=r"bits.weight: 1 is out of range"):
        create("awq", Bits.parse("w1"))
    with pytest.raises(UserError, match="n_grid"):
        create("awq", Bits.parse("w4"), n_grid=0)
    with pytest.raises(UserError, match=r"quantizer\.awq\.tokens: 0"):
        create("awq", Bits.parse("w4"), tokens=0)
    with pytest.raises(QuantizationError, match="quantize_group"):
        create("awq", Bits.parse("w4")).quantize_weight(torch.ones(2, 2), None)
    weights, x = problem(0, 1.0)
    with pytest.raises(QuantizationError, match="inputs"):
        create("awq", Bits.parse("w4")).quantize_group(Group(weights))
    with pytest.raises(QuantizationError, match="NaN"):
        create("awq", Bits.parse("w4")).quantize_group(group_of(weights, x * torch.nan))


# What the engine gives it --------------------------------------------------------------------------------------------


def part_of(model, number: int, samples: Tensor) -> tuple[Part, torch.nn.Module, tuple[str, ...]]:
    paths, chain = family_of(model).linears[number], chain_of(model)
    stream, unit = Engine(batch_size=3).capture(chain, samples), chain.units[0]
    opens = unit.opens[number]
    return Part(unit.module, unit.regions[opens] if opens else None, stream, paths), unit.module, paths


def outputs_of(part: Part, region: Region, weights: dict[str, Tensor]) -> Tensor:
    """Outputs of a part, given its float inputs, when the whole block is run with other weights."""
    seen: list[Tensor] = []
    fed = [(goal.args, goal.kwargs) for goal in part.goals]
    entry, exit_ = part.block.get_submodule(region.entry), part.block.get_submodule(region.exit)
    handles = [
        entry.register_forward_pre_hook(lambda m, a, k: fed.pop(0), with_kwargs=True),
        exit_.register_forward_hook(lambda m, a, out: seen.append(output_of(out).double())),
    ]
    kept = {path: part.block.get_submodule(path).weight.data for path in weights}
    for path, weight in weights.items():
        part.block.get_submodule(path).weight.data = weight
    for b in range(len(part.stream)):
        part.stream.run(part.block, b)
    for path, weight in kept.items():
        part.block.get_submodule(path).weight.data = weight
    for handle in handles:
        handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("samples", [1, 6])  # fewer and more tokens than inputs
def test_the_loss_against_the_whole_block(tiny, number, samples, token_ids):
    """Of a part run by itself, or of Linears by their inputs' second moment: the error seen by running the block."""
    part, block, paths = part_of(tiny, number, token_ids[:samples])
    region = part.region or Region(paths[0], paths[-1])
    weights = {path: block.get_submodule(path).weight.clone() for path in paths}
    assert part.loss(weights) == pytest.approx(0, abs=1e-10)
    changed = {path: weight * 0.9 + 0.01 for path, weight in weights.items()}
    expected = (outputs_of(part, region, changed) - outputs_of(part, region, {})).square().mean().item()
    assert part.loss(changed) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(block.get_submodule(path).weight, weight) for path, weight in weights.items())


def test_only_as_many_samples_as_hold_the_tokens(token_ids):
    length = token_ids.shape[1]
    for tokens, samples in ((1, 1), (length, 1), (length + 1, 2), (10**6, len(token_ids))):
        for some in (token_ids, list(token_ids), [{"input_ids": ids} for ids in token_ids]):
            assert len(leading(some, tokens)) == samples
    quantizer = create("awq", Bits.parse("w3"), tokens=2 * length - 1)
    for batch_size in (1, 4):  # whatever the batches are
        model = tiny_model("llama")
        found = calibrate(model, quantizer, token_ids, Engine(batch_size=batch_size))
        wanted = calibrate(model, create("awq", Bits.parse("w3")), token_ids[:2])
        for name, result in found.items():
            assert result.notes["alpha"] == wanted[name].notes["alpha"]
            torch.testing.assert_close(result.weight.dequantize(), wanted[name].weight.dequantize())


# On models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["w3", "w4g16"])
def test_on_every_family_with_compensation(family_name, tiny, bits, token_ids):
    results = calibrate(tiny, create("awq", Bits.parse(bits)), token_ids)
    plain = calibrate(tiny, create("rtn", Bits.parse(bits)), None)
    reference = tiny(input_ids=token_ids).logits
    errors = {}
    for name, found in (("awq", results), ("rtn", plain)):
        model = tiny_model(family_name)
        compensate(model, found, Compensation(), None)
        errors[name] = (model(input_ids=token_ids).logits - reference).square().mean().item()
    assert errors["awq"] < errors["rtn"] * 1.1
    report = compensate(tiny, results, Compensation.parse("sink"), token_ids, report_calibration=token_ids)
    assert {s.site for s in report.sites} == set(results)
    before, after = report.error("calibration")
    assert after < before
    assert all("alpha" in s.notes and s.notes["loss"] <= s.notes["loss_rtn"] for s in report.sites)
    assert report.bits_per_weight > int(bits[1])


FOLDED = {
    "opt": ("self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"),
    "opt_350m": ("", "self_attn.v_proj", "", "fc1"),
    "bloom": ("input_layernorm", "self_attention.query_key_value", "post_attention_layernorm", ""),
    "llama": ("input_layernorm", "", "post_attention_layernorm", "mlp.up_proj"),
    "llama_mha": ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"),
}


def model_for_folding(name: str):
    if name != "llama_mha":
        return tiny_model(name)
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    return type(model)(config).eval().requires_grad_(False)


PLACES = [(name, number) for name, before in FOLDED.items() for number, path in enumerate(before) if path]


@cache
def in_double(name: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    model = model_for_folding(name).double()
    ids = torch.randint(4, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    return model, ids, model(input_ids=ids).logits


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PLACES), st.integers(0, 2), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 6))
def test_scaling_is_an_identity_in_float(place, index, seed, alpha, spread):
    """At every place of every family that allows it, for scales as the search makes them."""
    name, number = place
    model, ids, expected = in_double(name)
    model, family = copy.deepcopy(model), family_of(model)
    site = f"{family.blocks}.{index}.{family.linears[number][0]}"
    kept = model.get_submodule(site).weight.clone()
    draw = torch.rand(kept.shape[1], generator=torch.Generator().manual_seed(seed))
    scale = column_scales(10 ** (spread * draw - 3), alpha).double()
    assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    fold_input_scale(model, site, scale)
    torch.testing.assert_close(model.get_submodule(site).weight, kept * scale, atol=0, rtol=1e-6)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FOLDED)
def test_scaled_and_folded_model_is_the_float_model(name, token_ids):
    model, generator = model_for_folding(name), torch.Generator().manual_seed(4)
    family, reference = family_of(model), model(input_ids=token_ids).logits
    assert predecessors(model, family) == FOLDED[name]
    changed = 0
    for i, block in enumerate(block_list(model, family)):
        for paths, before in zip(family.linears, FOLDED[name], strict=True):
            site = f"{family.blocks}.{i}.{paths[-1]}"
            features = block.get_submodule(paths[0]).in_features
            scale = 4 ** (2 * torch.rand(features, generator=generator) - 1)
            if before:
                kept = block.get_submodule(paths[-1]).weight.clone()
                fold_input_scale(model, site, scale)
                torch.testing.assert_close(block.get_submodule(paths[-1]).weight, kept * scale)
                changed += 1
            else:
                with pytest.raises(UserError, match="cannot be folded"):
                    fold_input_scale(model, site, scale)
    assert changed == 3 * sum(map(bool, FOLDED[name]))
    torch.testing.assert_close(model(input_ids=token_ids).logits, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("clip", [False, True])
def test_folded_scales_keep_the_quantized_function(name, clip, token_ids):
    model = model_for_folding(name)
    reference = model(input_ids=token_ids).logits
    results = calibrate(model, create("awq", Bits.parse("w3g16"), clip=clip), token_ids)
    beside = copy.deepcopy(model)
    whole = compensate(beside, results, Compensation(), None)

    folded = fold_scales(model, results)
    torch.testing.assert_close(model(input_ids=token_ids).logits, reference, atol=1e-5, rtol=1e-5)
    if not clip:  # then it is plain rounding of the folded model
        for site, module in sites(model, family_of(model)):
            weight = folded[site].weight
            if isinstance(weight, QuantizedWeight):
                rounded = quantize_weight(module.weight, Grid(3, group_size=16)).dequantize()
                torch.testing.assert_close(weight.dequantize(), rounded, atol=1e-6, rtol=1e-6)
    report = compensate(model, folded, Compensation(), None)
    torch.testing.assert_close(
        model(input_ids=token_ids).logits, beside(input_ids=token_ids).logits, atol=1e-5, rtol=1e-5
    )
    assert report.bits_per_weight < whole.bits_per_weight
    plain = sum(isinstance(r.weight, QuantizedWeight) for r in folded.values())
    expected = sum(len(p) for p, b in zip(family_of(model).linears, FOLDED[name], strict=True) if b)
    assert plain == 3 * expected


def test_an_activation_that_is_not_homogeneous_is_not_folded_across():
    model = MAKERS["opt"](activation_function="gelu")
    assert predecessors(model, family_of(model))[3] == ""
