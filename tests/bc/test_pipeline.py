"""Quantization and compensation of whole tiny models, against hooks and sums written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bc
from bc import fitting
from bc.chains import sites
from bc.compensation import BiasCompensation, compensation_of
from bc.errors import QuantizationError, UserError
from bc.grid import Grid, quantize_weight
from bc.models import family_of
from bc.pipeline import Engine, calibrate, compensate, float_means
from bc.quantizers import create
from bc.settings import Bits, Compensation
from tests.bc.test_gptq import oracle as gptq_oracle
from tests.conftest import MAKERS, VOCABULARY, tiny_model

FAMILIES = list(MAKERS)
GRANULARITIES = ["channel", "sink", "positional"]
CPU = torch.device("cpu")
LAST = {"opt": "fc2", "opt_350m": "fc2", "bloom": "mlp.dense_4h_to_h", "llama": "mlp.down_proj"}


def random_ids(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


IDS, OTHER = random_ids(5, 12, 10), random_ids(4, 9, 11)
PADDED = {
    "input_ids": IDS[:3],
    "attention_mask": torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [0] * 1 + [1] * 11]),
}


def settings_of(*scope: str, granularity: str = "positional", stream: str = "float") -> Compensation:
    return Compensation(scope, granularity, stream, dtype="float32")  # type: ignore[arg-type]


def quantized(model: nn.Module, settings: str | Compensation, samples: Any = IDS, bits: str = "w3", **more: Any):
    """A compensated copy of a float model, and its report."""
    twin = copy.deepcopy(model)
    report = bc.quantize(twin, "rtn", bits, settings, samples, device="cpu", batch_size=2, **more)
    return twin, report


@contextmanager
def recording(modules: Iterable[nn.Module]):
    """Inputs (args, kwargs) and outputs of modules in the next forward."""
    seen: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen[module] = (args, kwargs, output if isinstance(output, Tensor) else output[0])

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def forward(model: nn.Module, sample: Tensor | dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**(sample if isinstance(sample, dict) else {"input_ids": sample}), use_cache=False).logits


def tokens_of(value: Tensor, batch: int) -> Tensor:
    """(batch, tokens, channels), also where a model flattens its tokens."""
    return value.reshape(batch, -1, value.shape[-1])


def region_ends(model: nn.Module, block: nn.Module, scope: str) -> tuple[nn.Module, nn.Module]:
    """Entry and exit of a part of a block, written out by hand for every family."""
    if scope == "block":
        return block, block
    names = {
        "opt": ("self_attn", "fc1", "fc2"),
        "bloom": ("self_attention", "mlp", "mlp"),
        "llama": ("self_attn", "mlp", "mlp"),
    }
    attention, entry, end = (block.get_submodule(n) for n in names[model.config.model_type])
    return (attention, attention) if scope == "attention" else (entry, end)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return {
        "opt": lambda m: m.model.decoder.layers,
        "bloom": lambda m: m.transformer.h,
        "llama": lambda m: m.model.layers,
    }[model.config.model_type](model)


def group_means(difference: Tensor, granularity: str) -> Tensor:
    """Means of (samples, tokens, channels) over what shares a bias row."""
    if granularity == "channel":
        return difference.mean((0, 1))
    if granularity == "sink":
        return torch.stack([difference[:, 0].mean(0), difference[:, 1:].mean((0, 1))])
    return difference.mean(0)


# Walks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_float_means_equal_hooks_on_the_model(name):
    model = tiny_model(name)
    means = float_means(model, IDS, Engine(CPU, 2))
    family = family_of(model)
    for i, block in enumerate(blocks_of(model)):
        for group in family.linears:
            members = [block.get_submodule(path) for path in group]
            with recording(members) as seen:
                forward(model, IDS)
            inputs = [tokens_of(seen[m][0][0], len(IDS)) for m in members]
            assert all(torch.equal(x, inputs[0]) for x in inputs)  # a group shares its input
            sums = means[f"{family.blocks}.{i}.{group[0]}"]
            assert sums.count.tolist() == [len(IDS)] * IDS.shape[1]
            assert torch.allclose(sums.total.float() / len(IDS), inputs[0].mean(0), atol=1e-5)
    assert len(means) == 3 * len(family.linears)


@pytest.mark.parametrize("name", FAMILIES)
def test_float_means_leave_padding_out_and_mix_lengths(name):
    model = tiny_model(name)
    member = blocks_of(model)[1].get_submodule(LAST[name])
    total, count = torch.zeros(12, member.in_features), torch.zeros(12)
    for sample in (PADDED, OTHER[:1], OTHER[1:]):
        with recording([member]) as seen:
            forward(model, sample)
        ids = sample["input_ids"] if isinstance(sample, dict) else sample
        x = tokens_of(seen[member][0][0], len(ids))
        for row in range(len(ids)):
            pad = int((sample["attention_mask"][row] == 0).sum()) if isinstance(sample, dict) else 0
            for t in range(pad, x.shape[1]):
                total[t - pad] += x[row, t]
                count[t - pad] += 1
    means = float_means(model, [PADDED], Engine(CPU, 2))
    rest = float_means(model, [*OTHER], Engine(CPU, 3))
    site = f"{family_of(model).blocks}.1.{LAST[name]}"
    found, more = means[site], rest[site]
    assert torch.equal(found.count[:9] + more.count, count[:9].double()) and torch.equal(
        found.count[9:], count[9:].double()
    )
    found.total[:9] += more.total
    assert torch.allclose(found.total.float(), total, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_calibrating_does_not_change_the_model(name, quantizer):
    model = tiny_model(name)
    before, logits = copy.deepcopy(model.state_dict()), forward(model, IDS)
    results = calibrate(model, create(quantizer, Bits(3)), IDS, Engine(CPU, 2))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(forward(model, IDS), logits)
    assert list(results) == [n for n, _ in sites(model, family_of(model))]
    assert not any(isinstance(m, BiasCompensation) for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_gptq_takes_its_moments_from_the_quantized_stream(name):
    """Block by block: moments on the model whose earlier blocks are quantized, written out with hooks."""
    model, bits = tiny_model(name), 3
    results = calibrate(model, create("gptq", Bits(bits)), IDS, Engine(CPU, 2))
    twin, family = copy.deepcopy(model), family_of(model)
    checked = 0
    for i, block in enumerate(blocks_of(twin)):
        members = {p: block.get_submodule(p) for g in family.linears for p in g}
        with recording(members.values()) as seen:
            forward(twin, IDS)
        for path, member in members.items():
            x = seen[member][0][0].reshape(-1, member.in_features).double()
            expected = torch.from_numpy(gptq_oracle(member.weight, x.T @ x / len(x), bits)).float()
            found = results[f"{family.blocks}.{i}.{path}"].weight.dequantize()
            rows = torch.isclose(found, expected, atol=1e-4).all(1)
            assert rows.float().mean() > 0.95  # a rare tie may fall either way and change the rest of its row
            checked += 1
        for path, member in members.items():
            member.weight.data = results[f"{family.blocks}.{i}.{path}"].weight.dequantize()
    assert checked == len(results)


def test_gptq_leaves_padding_out():
    """Samples whose padding holds other tokens give the same weights."""
    model = tiny_model("llama")
    changed = {**PADDED, "input_ids": torch.where(PADDED["attention_mask"] == 0, 50, PADDED["input_ids"])}
    a, b = (calibrate(model, create("gptq", Bits(3)), [s], Engine(CPU, 2)) for s in (PADDED, changed))
    assert all(torch.equal(a[k].weight.dequantize(), b[k].weight.dequantize()) for k in a)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", ["w3", "w4g8"])
def test_rtn_equals_linears_replaced_by_hand(name, bits):
    model = tiny_model(name)
    result, report = quantized(model, "off", None, bits)
    twin, parsed = copy.deepcopy(model), Bits.parse(bits)
    replaced = 0
    for block in blocks_of(twin):
        for parent in list(block.modules()):
            for key, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    weight = quantize_weight(child.weight, Grid(parsed.weight, group_size=parsed.group_size))
                    made = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    made.weight.data = weight.dequantize()
                    if child.bias is not None:
                        made.bias.data = child.bias.data
                    setattr(parent, key, made)
                    replaced += 1
    assert replaced == len(report.sites)
    assert torch.equal(forward(result, IDS), forward(twin, IDS))
    assert not torch.allclose(forward(result, IDS), forward(model, IDS), atol=0.1)
    assert report.bias_parameters == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_outside_the_blocks_stays_float(name):
    model = tiny_model(name)
    result, _ = quantized(model, "off", None)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, result.state_dict()[k])}
    assert changed == {f"{n}.weight" for n, _ in sites(model, family_of(model))}


# Layer scope, float stream --------------------------------------------------------------------------------------------


def layer_pairs(model: nn.Module, result: nn.Module, samples: Tensor):
    """Site, float output, quantized output without and with its bias on the site's float input, by hand."""
    family = family_of(model)
    names = [n for n, _ in sites(model, family)]
    exact, ours = dict(sites(model, family)), dict(sites(result, family))
    with recording(exact.values()) as seen:
        forward(model, samples)
    for name in names:
        x = tokens_of(seen[exact[name]][0][0], len(samples))
        goal = tokens_of(seen[exact[name]][2], len(samples))
        site, child = ours[name], compensation_of(ours[name])
        own = exact[name].bias if exact[name].bias is not None else 0
        bare = x @ site.weight.T + own
        after = x @ site.weight.T + (site.bias if site.bias is not None else 0)  # with what was folded
        if child is not None:
            table = child.bias.float()
            late = {"positional": table[1:].mean(0), "sink": 0 if child.folded else table[-1]}[child.granularity]
            fitted = len(table) if child.folded or child.granularity == "positional" else len(table) - 1
            after = after + torch.stack([table[t] if t < fitted else late + 0 * table[0] for t in range(x.shape[1])])
        yield name, goal, bare, after


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_layer_errors_in_the_report_equal_brute_force_and_fall(name, granularity):
    model = tiny_model(name)
    result, report = quantized(model, settings_of("layer", granularity=granularity), held_out=OTHER)
    reports = {s.site: s for s in report.sites}
    for part, samples in (("calibration", IDS), ("held_out", OTHER)):
        for site, goal, bare, after in layer_pairs(model, result, samples):
            sums = getattr(reports[site], part)
            assert sums.elements == goal.numel()
            summary = sums.summary()
            for key, value in (
                ("mse_before", (goal - bare).square().mean()),
                ("mse_after", (goal - after).square().mean()),
                ("l1_before", (goal - bare).abs().mean()),
                ("l1_after", (goal - after).abs().mean()),
                ("relative_after", (goal - after).square().sum() / goal.square().sum()),
            ):
                assert summary[key] == pytest.approx(float(value), rel=1e-3, abs=1e-9)
            if part == "calibration":
                assert summary["mse_after"] < summary["mse_before"]
                assert group_means(goal - after, granularity).abs().max() < 1e-5
    before, after = report.error("calibration")
    assert after < before


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_left_padding_in_the_calibration_samples(granularity):
    """Fitting on padded samples is fitting on the samples alone, each at its own length."""
    for name in FAMILIES:
        model = tiny_model(name)
        lengths = PADDED["attention_mask"].sum(1).tolist()
        alone = [ids[-n:] for ids, n in zip(PADDED["input_ids"], lengths, strict=True)]
        settings = settings_of("layer", "block", granularity=granularity)
        a, report = quantized(model, settings, [PADDED])
        b, expected = quantized(model, settings, alone)
        for (key, x), (other, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
            assert key == other and torch.allclose(x, y, atol=2e-5), (name, key)
        assert torch.allclose(forward(a, IDS), forward(b, IDS), atol=1e-3)
        outputs = next(sites(model, family_of(model)))[1].out_features
        for found in (report, expected):
            assert found.sites[0].calibration.elements == sum(lengths) * outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_biases_do_not_depend_on_given_means(name):
    model = tiny_model(name)
    results = calibrate(model, create("rtn", Bits(3)), None)
    settings = settings_of("layer")
    a, b = copy.deepcopy(model), copy.deepcopy(model)
    compensate(a, results, settings, IDS, Engine(CPU, 2))
    compensate(b, results, settings, None, Engine(CPU, 2), means=float_means(model, IDS, Engine(CPU, 2)))
    assert torch.allclose(forward(a, IDS), forward(b, IDS), atol=1e-5)


# Larger scopes, float stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", [("attention",), ("mlp",), ("block",), ("layer", "block"), ("layer", "mlp")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_parts_mean_output_is_met_on_its_float_input(name, scope, granularity):
    model = tiny_model(name)
    result, report = quantized(model, settings_of(*scope, granularity=granularity))
    part = scope[-1]
    for i, (source, target) in enumerate(zip(blocks_of(model), blocks_of(result), strict=True)):
        (entry, end), (fed, out) = region_ends(model, source, part), region_ends(result, target, part)
        with recording([entry, end]) as seen:
            forward(model, IDS)
        args, kwargs, _ = seen[entry]
        handle = fed.register_forward_pre_hook(lambda m, a, k, x=(args, kwargs): x, with_kwargs=True)
        with recording([out]) as found:
            forward(result, IDS)
        handle.remove()
        difference = tokens_of(seen[end][2] - found[out][2], len(IDS))
        assert group_means(difference, granularity).abs().max() < 2e-5
        assert difference.abs().max() > 1e-3
        rows = [s for s in report.sites if s.scope == part and f".{i}" in s.site]
        assert len(rows) == 1
        summary = rows[0].calibration.summary()
        assert summary["mse_after"] == pytest.approx(float(difference.square().mean()), rel=1e-3)
        assert summary["mse_after"] < summary["mse_before"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scope", [("model",), ("layer", "model"), ("layer", "block", "model")])
def test_model_scope_meets_the_mean_logits(name, granularity, scope):
    model = tiny_model(name)
    result, report = quantized(model, settings_of(*scope, granularity=granularity))
    difference = forward(model, IDS) - forward(result, IDS)
    assert group_means(difference, granularity).abs().max() < 2e-5
    assert difference.abs().max() > 1e-2
    assert [s.site for s in report.sites if s.scope == "model"] == ["lm_head"]


# Quantized stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scope", [("layer",), ("layer", "block"), ("attention", "mlp"), ("block",)])
def test_quantized_stream_meets_the_float_means_inside_the_final_model(name, granularity, scope):
    """In the finished model on the calibration samples, every compensated output has the float model's mean."""
    model = tiny_model(name)
    result, report = quantized(model, settings_of(*scope, granularity=granularity, stream="quantized"))
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    if "layer" in scope:
        ours = dict(sites(result, family_of(model)))
        pairs |= {n: (m, ours[n]) for n, m in sites(model, family_of(model))}
    for i, (source, target) in enumerate(zip(blocks_of(model), blocks_of(result), strict=True)):
        for part in (s for s in scope if s != "layer"):
            pairs[f"{part} {i}"] = (region_ends(model, source, part)[1], region_ends(result, target, part)[1])
    with recording(m for m, _ in pairs.values()) as exact:
        forward(model, IDS)
    with recording(m for _, m in pairs.values()) as found:
        forward(result, IDS)
    assert len(pairs) == len([s for s in report.sites if s.scope in scope])
    for key, (a, b) in pairs.items():
        difference = tokens_of(exact[a][2] - found[b][2], len(IDS))
        assert group_means(difference, granularity).abs().max() < 5e-5, key
    for site in (s for s in report.sites if s.scope in scope):
        summary = site.calibration.summary()
        assert summary["mse_after"] <= summary["mse_before"] * (1 + 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_errors_of_the_quantized_stream_are_those_of_the_finished_model(name):
    model = tiny_model(name)
    result, report = quantized(model, settings_of("layer", stream="quantized"), held_out=OTHER)
    exact, ours = dict(sites(model, family_of(model))), dict(sites(result, family_of(model)))
    reports = {s.site: s for s in report.sites}
    for part, samples in (("calibration", IDS), ("held_out", OTHER)):
        with recording(exact.values()) as a, recording(ours.values()) as b:
            forward(model, samples)
            forward(result, samples)
        for site in exact:
            error = float((a[exact[site]][2] - b[ours[site]][2]).square().mean())
            assert getattr(reports[site], part).summary()["mse_after"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized_stream_lowers_the_error_of_the_logits(name):
    model = tiny_model(name)
    goal = forward(model, IDS)
    errors = {
        key: float((goal - forward(quantized(model, settings)[0], IDS)).square().mean())
        for key, settings in (("off", "off"), ("quantized", settings_of("layer", "model", stream="quantized")))
    }
    assert errors["quantized"] < errors["off"]


# The paper's setting, storage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_papers_preset(name):
    """One bias for each position and channel, on every Linear and every block, in half precision."""
    model = tiny_model(name)
    result, report = quantized(model, "paper")
    tokens, expected = IDS.shape[1], 0
    for block in blocks_of(result):
        found = compensation_of(block)
        assert found is not None and found.bias.shape == (tokens, 32) and found.bias.dtype == torch.float16
        expected += tokens * 32
        for module in block.modules():
            if isinstance(module, nn.Linear):
                child = compensation_of(module)
                assert child is not None and child.bias.shape == (tokens, module.out_features)
                expected += tokens * module.out_features
    assert report.bias_parameters == expected
    assert [s.scope for s in report.sites].count("block") == 3
    assert compensation_of(result.lm_head) is None


def hand_count(model: nn.Module, bits: int, group: int) -> tuple[int, int, int]:
    """(weights, bits of codes + scales + zero points, output channels) of the quantized modules."""
    weights = total = outputs = 0
    for block in blocks_of(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                groups = 1 if group == -1 else -(-columns // group)
                weights += rows * columns
                total += rows * columns * bits + rows * groups * (32 + bits)
                outputs += rows
    return weights, total, outputs


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("bits", "group"), [(3, -1), (4, 5)])
def test_bits_per_weight_against_a_hand_count(name, bits, group):
    model = tiny_model(name)
    label = f"w{bits}" + (f"g{group}" if group > 0 else "")
    weights, total, outputs = hand_count(model, bits, group)
    own = 0 if name == "llama" else outputs * 32  # float32 biases of the Linears themselves
    for preset, extra, parameters in (
        ("off", 0, 0),
        ("channel", 0 if own else outputs * 32, 0 if own else outputs),  # folded; LLaMA gets biases it had not
        ("sink", outputs * 16 if own else 2 * outputs * 16, outputs if own else 2 * outputs),  # one row of two folds
        ("positional", 12 * outputs * 16, 12 * outputs),
        ("paper", 12 * (outputs + 3 * 32) * 16, 12 * (outputs + 3 * 32)),
    ):
        _, report = quantized(model, preset, bits=label)
        assert report.weights == weights
        assert report.storage_bits == total + own + extra, preset
        assert report.bits_per_weight == pytest.approx((total + own + extra) / weights)
        assert report.bias_parameters == parameters, preset


@pytest.mark.parametrize("name", FAMILIES)
def test_a_channel_bias_folds(name):
    model = tiny_model(name)
    result, report = quantized(model, "channel")
    assert not any(isinstance(m, BiasCompensation) for m in result.modules())
    assert all(s.folded and s.granularity == "channel" for s in report.sites)


@pytest.mark.parametrize(("name", "folds"), [("opt", True), ("opt_350m", True), ("llama", True), ("bloom", False)])
def test_a_channel_bias_of_a_part_that_ends_in_a_linear_folds_into_it(name, folds):
    """BLOOM's parts end in the sum with what went past them."""
    model = tiny_model(name)
    settings = Compensation(("attention", "mlp"), "channel")
    result, report = quantized(model, settings)
    parts = [site for site in report.sites if site.scope in ("attention", "mlp")]
    assert len(parts) == 6
    assert all(part.folded is folds for part in parts)
    assert any(isinstance(m, BiasCompensation) for m in result.modules()) is not folds


# The engine's settings do not change results --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_activations_and_batch_size_do_not_matter(name, stream):
    model = tiny_model(name)
    settings = settings_of("layer", "block", "model", stream=stream)
    results = calibrate(model, create("gptq", Bits(3)), IDS, Engine(CPU, 2))
    found = {}
    for batch_size, store in ((2, "host"), (2, "disk"), (2, "device"), (1, "host"), (3, "disk")):
        twin = copy.deepcopy(model)
        report = compensate(twin, results, settings, IDS, Engine(CPU, batch_size, store), report_held_out=OTHER)
        found[batch_size, store] = (forward(twin, OTHER), report.error())
    logits, error = found[2, "host"]
    for (batch_size, _), (other, e) in found.items():
        assert torch.equal(other, logits) if batch_size == 2 else torch.allclose(other, logits, atol=1e-4)
        assert e == pytest.approx(error, rel=1e-4)


def test_stores_give_the_same_quantized_weights():
    model = tiny_model("opt")
    a, b = (calibrate(model, create("gptq", Bits(3)), IDS, Engine(CPU, 2, store)) for store in ("host", "disk"))
    assert all(torch.equal(a[k].weight.dequantize(), b[k].weight.dequantize()) for k in a)


def test_a_list_of_samples_is_the_same_as_a_tensor():
    model = tiny_model("llama")
    a, _ = quantized(model, "sink", IDS)
    b, _ = quantized(model, "sink", list(IDS))
    assert torch.equal(forward(a, OTHER), forward(b, OTHER))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_models(name, dtype):
    model = tiny_model(name).to(dtype)
    for preset in ("channel", "paper"):
        result, report = quantized(model, preset)
        assert all(p.dtype == dtype for p in result.parameters())
        assert forward(result, IDS).dtype == dtype and bool(torch.isfinite(forward(result, IDS)).all())
        before, after = report.error("calibration")
        assert after < before


# Refusals -------------------------------------------------------------------------------------------------------------


def test_double_quantization_is_refused_before_any_work():
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", IDS, device="cpu")
    state = copy.deepcopy(model.state_dict())
    for call in (
        lambda m: bc.quantize(m, "rtn", "w4", "off", device="cpu"),
        lambda m: calibrate(m, create("gptq", Bits(4)), IDS),
        lambda m: bc.quantize(copy.deepcopy(m), "rtn", "w4", "off", device="cpu"),
    ):
        with pytest.raises(UserError, match="quantized already"):
            call(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["self_attn.v_proj", "mlp.down_proj"])
def test_a_weight_that_is_not_finite_is_named_and_the_model_left_alone(quantizer, bad, path):
    model = tiny_model("llama")
    blocks_of(model)[1].get_submodule(path).weight.data[3, 5] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=f"^model.layers.1.{path}: "):
        bc.quantize(model, quantizer, "w4", "off", IDS, device="cpu")
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_activations_that_are_not_finite_are_named():
    model = tiny_model("opt")
    blocks_of(model)[1].final_layer_norm.weight.data[0] = float("inf")
    with pytest.raises(QuantizationError, match=r"layers\.1\.fc1"):
        bc.quantize(model, "gptq", "w4", "off", IDS, device="cpu")
    with pytest.raises(QuantizationError, match=r"layers\.1\.fc1"):
        bc.quantize(model, "rtn", "w4", "sink", IDS, device="cpu")


def test_a_model_left_half_done_by_an_error_is_not_taken_for_a_float_one(monkeypatch):
    model = tiny_model("llama")
    results = calibrate(model, create("rtn", Bits(3)), None)
    calls = []

    def fails_later(*args: Tensor) -> Tensor:
        calls.append(1)
        return torch.full((1, len(args[0])), float("nan") if len(calls) > 10 else 0.0)

    monkeypatch.setattr(fitting, "linear_bias", fails_later)
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\."):
        compensate(model, results, settings_of("layer", granularity="channel"), IDS)
    monkeypatch.undo()
    with pytest.raises(UserError, match="quantized already"):
        compensate(model, results, settings_of("layer", granularity="channel"), IDS)


@pytest.mark.parametrize("samples", [torch.empty(0, 12, dtype=torch.long), []])
@pytest.mark.parametrize(("quantizer", "preset"), [("gptq", "off"), ("rtn", "sink")])
def test_no_samples_is_one_clear_line(samples, quantizer, preset):
    with pytest.raises(UserError, match="sample"):
        bc.quantize(tiny_model("opt"), quantizer, "w4", preset, samples, device="cpu")


@pytest.mark.parametrize(("quantizer", "preset"), [("gptq", "off"), ("rtn", "sink"), ("rtn", "paper")])
def test_missing_samples_are_asked_for(quantizer, preset):
    with pytest.raises(UserError, match="calibration"):
        bc.quantize(tiny_model("opt"), quantizer, "w4", preset, device="cpu")


def test_samples_of_one_axis_are_refused():
    with pytest.raises(UserError, match="shape"):
        bc.quantize(tiny_model("opt"), "gptq", "w4", "off", IDS[0], device="cpu")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"quantizer": "gtpq"}, "gptq"),
        ({"bits": "4bit"}, "bits"),
        ({"bits": "w1"}, "bits.weight"),
        ({"bits": "w9"}, "bits.weight"),
        ({"bits": "w4a8"}, "bits.activation"),
        ({"bc": "sinks"}, "sink"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"dampening": 0.1}, "damp"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, field, monkeypatch):
    model = tiny_model("opt")
    monkeypatch.setattr(model, "forward", lambda *a, **k: pytest.fail("the model was run"))
    settings: dict[str, Any] = {"quantizer": "gptq", "bits": "w4", "device": "cpu", "calibration": IDS}
    with pytest.raises(UserError, match=field) as caught:
        bc.quantize(model, **{**settings, **arguments})
    assert "\n" not in str(caught.value)


def test_the_report_flattens_for_a_table():
    _, report = quantized(tiny_model("llama"), "sink")
    row = report.sites[0].row()
    assert row["site"] == "model.layers.0.self_attn.q_proj" and row["granularity"] == "sink"
    assert row["calibration_mse_before"] > row["calibration_mse_after"]
    assert row["held_out_mse_before"] is None  # not measured is not zero
    assert report.error() is None


def test_gptq_notes_reach_the_report():
    model = tiny_model("llama")
    report = bc.quantize(model, "gptq", "w4", "sink", IDS, device="cpu")
    assert all(s.notes == {"damping": 0.01, "damping_retries": 0} for s in report.sites)
