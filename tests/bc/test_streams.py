"""Fused passes and the calibration stream, against separate passes and sums by hand."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import bc
from bc.chains import chain_of
from bc.compensation import compensation_of, linear_bias
from bc.errors import UserError
from bc.models import family_of
from bc.passes import second_moments
from bc.pipeline import Collection, Engine, calibrate, compensate, float_means
from bc.quantizers import create
from bc.settings import Bits, Compensation
from tests.bc.test_pipeline import CPU, FAMILIES, IDS, PADDED, blocks_of, forward, recording, settings_of, tokens_of
from tests.conftest import tiny_model

BATCHES = 3  # of IDS, two samples each
BLOCKS = 3
CAPTURE = 1  # forward that ends at the first block's door
ENGINE = Engine(CPU, 2)


def gptq(bits: int = 3):
    return create("gptq", Bits(bits))


def count_forwards(model: nn.Module) -> Counter[str]:
    """Forwards of the blocks that begin from now on: of the model's own (``own``) and of copies (``copy``); and those
    of the last Linear of a block that end (``last``)."""
    found: Counter[str] = Counter()
    for block, unit in zip(blocks_of(model), chain_of(model).units, strict=True):
        # a deep copy of a block has the same hooks
        block.register_forward_pre_hook(lambda m, args, b=block: found.update(["own" if m is b else "copy"]))
        unit.sites[-1].module.register_forward_hook(lambda m, args, output: found.update(["last"]))
    return found


# Counted forwards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("scope", "float_forwards", "quantized_forwards"),
    [
        (("layer",), BLOCKS, 0),
        (("block",), BLOCKS, BLOCKS),
        (("layer", "block"), BLOCKS, BLOCKS),
        (("layer", "model"), BLOCKS, BLOCKS),
        (("layer", "block", "model"), BLOCKS, 2 * BLOCKS),
        (("attention", "block"), 2 * BLOCKS, 2 * BLOCKS),
    ],
)
def test_a_float_forward_a_block_is_enough(name, scope, float_forwards, quantized_forwards):
    model = tiny_model(name)
    results = calibrate(model, create("rtn", Bits(3)), None)
    found = count_forwards(model)
    compensate(model, results, settings_of(*scope), IDS, ENGINE)
    assert (found["copy"], found["own"]) == (BATCHES * float_forwards, BATCHES * (CAPTURE + quantized_forwards))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_block_ends_where_nothing_more_is_asked(name):
    """The input of a block's last Linear is its last statistic: behind the last block there is no more to feed."""
    model = tiny_model(name)
    found = count_forwards(model)
    float_means(model, IDS, ENGINE)
    assert (found["own"], found["last"]) == (BATCHES * (CAPTURE + BLOCKS), BATCHES * (BLOCKS - 1))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("collect", "begun", "ended"),
    [
        (None, 2 * BLOCKS - 1, BLOCKS - 1),
        ("calibration", 2 * BLOCKS - 1, BLOCKS - 1),
        ("float", 2 * BLOCKS - 1 + BLOCKS - 1, 2 * (BLOCKS - 1)),
    ],
)
def test_gptq_runs_a_block_for_the_moments_and_for_the_next_block(name, collect, begun, ended):
    """Twice, the last one once; the float stream shares the first block's pass. Passes for moments end early."""
    model = tiny_model(name)
    found = count_forwards(model)
    calibrate(model, gptq(), IDS, ENGINE, collect=collect and Collection(stream=collect))
    assert (found["own"], found["last"]) == (BATCHES * (CAPTURE + begun), BATCHES * ended)


# One pass or several --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", [("layer", "block"), ("layer", "attention", "mlp", "block"), ("layer", "mlp")])
@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_one_pass_gives_what_separate_passes_give(name, scope, stream):
    """Given means, layers are fitted without a pass, and each larger part has a float pass of its own."""
    model = tiny_model(name)
    results = calibrate(model, create("rtn", Bits(3)), None)
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    compensate(a, results, settings_of(*scope, stream=stream), IDS, ENGINE)
    compensate(b, results, settings_of(*scope, stream=stream), IDS, ENGINE, means=float_means(model, IDS, ENGINE))
    pairs = list(zip(a.named_buffers(), b.named_buffers(), strict=True))
    assert len([key for (key, _), _ in pairs if key.endswith("compensation.bias")]) >= BLOCKS * len(scope)
    for (key, x), (other, y) in pairs:
        assert key == other and torch.allclose(x, y, rtol=1e-5, atol=2e-6), key


# The inputs that the quantizer saw ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", ["channel", "sink", "positional"])
def test_the_calibration_stream_is_what_the_quantizer_saw(name, granularity):
    """(W − Ŵ) times the mean input on the model whose earlier blocks are quantized, written out with hooks."""
    model = tiny_model(name)
    result = copy.deepcopy(model)
    settings = settings_of("layer", granularity=granularity, stream="calibration")
    bc.quantize(result, "gptq", "w3", settings, IDS, device="cpu", batch_size=2)
    twin, family = copy.deepcopy(model), family_of(model)
    for block, ours in zip(blocks_of(twin), blocks_of(result), strict=True):
        members = {path: block.get_submodule(path) for group in family.linears for path in group}
        with recording(members.values()) as seen:
            forward(twin, IDS)
        for path, member in members.items():
            x = tokens_of(seen[member][0][0], len(IDS))
            site = ours.get_submodule(path)
            rows = {
                "channel": x.mean((0, 1))[None],
                "sink": torch.stack([x[:, 0].mean(0), x[:, 1:].mean((0, 1))]),
                "positional": x.mean(0),
            }[granularity]
            expected = rows @ (member.weight - site.weight).T
            child = compensation_of(site)
            own = member.bias if member.bias is not None else torch.zeros(len(member.weight))
            found = torch.zeros_like(expected) if child is None else child.table().clone()
            found += 0 if site.bias is None else site.bias - own  # what was folded
            assert torch.allclose(found, expected, atol=2e-5), path
            assert expected.abs().max() > 1e-3
        for path, member in members.items():
            member.weight.data = ours.get_submodule(path).weight.data


def test_the_calibration_stream_leaves_padding_out():
    model = tiny_model("llama")
    lengths = PADDED["attention_mask"].sum(1).tolist()
    alone = [ids[-n:] for ids, n in zip(PADDED["input_ids"], lengths, strict=True)]
    sums = []
    for samples in ([PADDED], alone):
        collect = Collection(stream="calibration")
        calibrate(model, gptq(8), samples, ENGINE, collect=collect)
        sums.append(collect.sums)
    first = "model.layers.0.self_attn.q_proj"  # later inputs depend on how ties are rounded
    assert sums[0][first].count.sum() == sum(lengths)
    assert torch.allclose(sums[0][first].total, sums[1][first].total, atol=1e-5)


def test_the_calibration_stream_is_refused_where_there_is_none():
    model = tiny_model("opt")
    settings = settings_of("layer", stream="calibration")
    with pytest.raises(UserError, match=r"bc\.stream.*'rtn'.*billm, gptq") as caught:
        bc.quantize(model, "rtn", "w3", settings, IDS, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"bc\.stream.*collect"):
        compensate(model, calibrate(model, gptq(), IDS, ENGINE), settings, IDS, ENGINE)
    for scope, method in ((("layer", "block"), "bias"), (("search",), "bias"), (("layer",), "affine")):
        with pytest.raises(UserError, match=r"bc\.stream.*calibration.*bc\.stream=float") as caught:
            Compensation(scope, stream="calibration", method=method)
        assert "\n" not in str(caught.value)


def test_the_calibration_stream_needs_no_more_forwards():
    model = tiny_model("opt")
    found = count_forwards(model)
    bc.quantize(model, "gptq", "w3", settings_of("layer", stream="calibration"), IDS, device="cpu", batch_size=2)
    assert found["own"] == BATCHES * (CAPTURE + 2 * BLOCKS - 1 + CAPTURE)
    assert found["copy"] == BATCHES * BLOCKS  # on which the report measures errors


# Second moments and solving together ----------------------------------------------------------------------------------


def test_linears_that_share_an_input_share_one_moment():
    model = tiny_model("opt")
    unit = chain_of(model).units[0]
    found = second_moments(unit, ENGINE.capture(chain_of(model), IDS))
    assert list(found) == [group[0].name for group in unit.groups]


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("bits", ["w3", "w3g8", "w4g5"])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}, {"clip": "mse"}])
def test_solving_a_group_together_is_solving_one_by_one(name, bits, options):
    quantizer = create("gptq", Bits.parse(bits), **options)
    model = tiny_model(name)
    chain = chain_of(model)
    unit = chain.units[1]
    moments = second_moments(unit, ENGINE.capture(chain, IDS))
    group: tuple = unit.groups[0]
    weights: dict[str, Tensor] = {site.name: site.module.weight.data for site in group}
    assert len(weights) == 3
    together = quantizer.quantize_group(bc.quantizers.base.Group(weights, moments[group[0].name]))
    for path, weight in weights.items():
        alone = quantizer.quantize_weight(weight, moments[group[0].name])
        assert torch.equal(together[path].weight.codes, alone.weight.codes)
        assert torch.allclose(together[path].weight.dequantize(), alone.weight.dequantize(), rtol=1e-6, atol=1e-6)
        assert together[path].notes == alone.notes
        assert together[path].weight.storage_bits() == alone.weight.storage_bits()


def test_the_closed_form_needs_the_means_alone():
    """What the calibration stream rests on: the mean of (W − Ŵ) x is (W − Ŵ) times the mean of x."""
    generator = torch.Generator().manual_seed(0)
    w, w_hat, x = (torch.randn(*shape, generator=generator) for shape in ((6, 9), (6, 9), (40, 9)))
    expected = (x @ w.T - x @ w_hat.T).mean(0, keepdim=True)
    assert torch.allclose(linear_bias(w, w_hat, x.mean(0, keepdim=True)), expected, atol=1e-5)
