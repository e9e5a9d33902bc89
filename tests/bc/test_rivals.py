"""Affine outputs, linear maps and data-free correction against least squares on materialised outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bc
from bc import quantizers
from bc.affine import ChannelMoments, fold_affine
from bc.chains import sites as model_sites
from bc.compensation import BiasCompensation
from bc.errors import UserError
from bc.grid import Grid, quantize_weight
from bc.linear_map import RIDGE, RidgeSums, explained, map_of
from bc.models import family_of
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers.base import SiteResult
from bc.settings import PRESETS, Bits, Compensation
from bc.vision import sites, units
from tests.bc.vision.test_engine import fed_outputs, images_for, ready
from tests.conftest import tiny_model

ENGINE = Engine(torch.device("cpu"), 3)
IDS = torch.randint(0, 60, (6, 12), generator=torch.Generator().manual_seed(0))


def test_affine_is_the_least_squares_line_of_every_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(7, 5, 4, generator=generator)
    y_hat = 0.8 * y + 0.3 * torch.randn(y.shape, generator=generator) + 0.5
    valid = torch.rand(7, 5, generator=generator) > 0.2
    moments = ChannelMoments(4)
    for part in (slice(0, 2), slice(2, 7)):
        moments.add(y[part], y_hat[part], valid[part])
    scale, shift = moments.solve()
    for c in range(4):
        design = torch.stack([y_hat[valid][:, c], torch.ones(int(valid.sum()))], 1).double()
        a, b = torch.linalg.lstsq(design, y[valid][:, c, None].double()).solution[:, 0].tolist()
        assert scale[c].item() == pytest.approx(a, rel=1e-5) and shift[c].item() == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_affine_folds_into_weight_and_bias(granularity: str) -> None:
    module = nn.Linear(6, 5).requires_grad_(False)
    result = SiteResult(quantize_weight(module.weight.data, Grid(3, granularity=granularity)))  # type: ignore[arg-type]
    assert result.weight is not None
    module.weight.data = result.weight.dequantize()
    x, scale, shift = torch.randn(9, 6), torch.tensor([1.5, 0.5, -0.2, 1.0, 2.0]), torch.randn(5)
    expected = module(x) * scale + shift
    again = fold_affine(module, result, scale, shift)
    torch.testing.assert_close(module(x), expected)
    assert again.weight is not None
    torch.testing.assert_close(again.weight.dequantize(), module.weight.data)


def test_a_constant_output_is_only_shifted() -> None:
    moments = ChannelMoments(1)
    moments.add(torch.randn(3, 4, 1) + 2, torch.full((3, 4, 1), 0.5))
    assert moments.solve()[0].item() == 1.0


@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_affine_lowers_every_sites_error_below_the_channel_bias(stream: str) -> None:
    model, few = ready("vit")
    images = images_for(few)
    results = calibrate(model, quantizers.create("minmax", Bits.parse("w3a4")), images, ENGINE)
    before = {name: copy.deepcopy(result.weight) for name, result in results.items()}
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = compensate(twin, results, Compensation(("layer",), stream=stream, method="affine"), images, ENGINE)
    kinds = ("linear", "conv")
    compensate(plain, results, Compensation(("layer",), stream=stream, kinds=kinds, dtype="float32"), images, ENGINE)
    assert report.bias_parameters == 0
    if stream == "float":
        for site in (site for site in sites(model) if site.kind != "matmul"):
            goal, ours = fed_outputs(model, twin, images, site.name)
            _, other = fed_outputs(model, plain, images, site.name)
            assert (goal - ours).square().mean() <= (goal - other).square().mean() * (1 + 1e-5), site.name
    for name, weight in before.items():  # the shared artefact is left as it was
        if weight is not None:
            assert torch.equal(weight.dequantize(), results[name].weight.dequantize())  # type: ignore[union-attr]


@pytest.mark.parametrize("leading", [1, 2])
def test_affine_with_sinks_is_least_squares_on_the_other_positions(leading: int) -> None:
    """Against `lstsq` on the materialised outputs of the first block's first Linears, which see the same input."""
    model = tiny_model("llama")
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w2")), None, ENGINE)
    twin = copy.deepcopy(model)
    settings = Compensation(("layer",), "sink", sink_positions=leading, method="affine", dtype="float32")
    compensate(twin, results, settings, IDS, ENGINE)
    own, ours = model.model.layers[0].self_attn.v_proj, twin.model.layers[0].self_attn.v_proj
    seen: list[Tensor] = []
    own.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(IDS)
    x = seen[0]
    y, plain = own(x), x @ results["model.layers.0.self_attn.v_proj"].weight.dequantize().T  # type: ignore[union-attr]
    for channel in range(y.shape[-1]):
        late = plain[:, leading:, channel].reshape(-1, 1)
        line = torch.cat([late, torch.ones_like(late)], 1).double()
        a, b = torch.linalg.lstsq(line, y[:, leading:, channel].reshape(-1, 1).double()).solution.flatten().float()
        torch.testing.assert_close(
            ours(x)[:, leading:, channel], a * plain[:, leading:, channel] + b, atol=1e-4, rtol=1e-3
        )
    torch.testing.assert_close(ours(x)[:, :leading].mean(0), y[:, :leading].mean(0), atol=1e-4, rtol=1e-3)
    assert ours.compensation.bias.shape == (leading + 1, y.shape[-1]) and ours.bias is None


def ridge(x: Tensor, error: Tensor) -> Tensor:
    """The same by least squares on materialised rows, the penalty as further rows."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    penalty = (RIDGE * (design.T @ design).diagonal()[:-1].mean()).sqrt()
    extra = penalty * torch.eye(design.shape[1], dtype=torch.float64)
    extra[-1] = 0
    target = torch.cat([error.double(), torch.zeros(len(extra), error.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(torch.cat([design, extra]), target).solution


def test_ridge_is_least_squares_and_its_residual_is_right() -> None:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(60, 5, generator=generator), torch.randn(60, 3, generator=generator)
    error = x @ torch.randn(5, 3, generator=generator) + 0.1 * noise + 1
    one, two = RidgeSums(5, 3), RidgeSums(5, 3)
    one.add(x[:30], error[:30])
    two.add(x[30:], error[30:])
    weights = one.plus(two).solve()
    torch.testing.assert_close(weights, ridge(x, error))
    design = torch.cat([x, torch.ones(60, 1)], 1).double()
    rest = (error.double() - design @ weights)[30:].square().sum().item()
    assert two.residual(weights) == pytest.approx(rest, rel=1e-6)
    assert explained(one, two) > 0.9
    pure = [RidgeSums(5, 3), RidgeSums(5, 3)]
    for half, part in zip(pure, (slice(0, 30), slice(30, 60)), strict=True):
        half.add(x[part], noise[part])
    assert explained(*pure) < 0 or explained(pure[1], pure[0]) < 0


def test_linear_map_stands_behind_each_block_that_it_explains() -> None:
    model, few = ready("vit")
    images = images_for(few, 24)
    results = calibrate(model, quantizers.create("minmax", Bits.parse("w2a8")), images, ENGINE)
    twin, bare = copy.deepcopy(model), copy.deepcopy(model)
    settings = Compensation(("block",), method="linear", dtype="float32")
    report = compensate(twin, results, settings, images, ENGINE, report_calibration=images)
    compensate(bare, results, Compensation(), images, ENGINE)
    mapped = [unit.name for unit in units(twin) if unit.kind == "block" and map_of(unit.module)]
    assert mapped
    for name in mapped:
        goal, got = fed_outputs(model, bare, images, name)
        block = model.get_submodule(name)
        caught: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _m, args, kept=caught: kept.append(args[0]))
        model(images)
        handle.remove()
        expected = ridge(caught[0].flatten(0, 1), (goal - got).flatten(0, 1))
        found = map_of(twin.get_submodule(name))
        assert found is not None
        torch.testing.assert_close(found.weight.double(), expected[:-1].T, atol=1e-4, rtol=1e-3)
        site = next(s for s in report.sites if s.site == name)
        assert site.bias_parameters == found.size and site.granularity == "linear"
        assert site.calibration.square_after < site.calibration.square_before


def test_classic_needs_no_data_and_is_the_norms_bias() -> None:
    model = tiny_model("opt")
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    twin = copy.deepcopy(model)
    compensate(twin, results, PRESETS["classic"], None, ENGINE)
    block, ours = model.model.decoder.layers[0], twin.model.decoder.layers[0]
    beta = block.self_attn_layer_norm.bias
    q, q_hat = block.self_attn.q_proj, ours.self_attn.q_proj
    torch.testing.assert_close(q_hat.bias - q.bias, (q.weight - q_hat.weight) @ beta, atol=1e-3, rtol=1e-3)
    assert torch.equal(ours.fc2.bias, block.fc2.bias)  # no norm before it


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("bc", ["shrink", "lowrank", "affine", "affine-sink", "linear", "sink0"])
@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_language_models_take_every_option(name: str, bc: str, stream: str) -> None:
    model = tiny_model(name)
    special = {
        "sink0": Compensation(("layer",), "sink", sink_positions=0),
        "affine-sink": Compensation(("layer",), "sink", method="affine"),
    }
    settings = special.get(bc) or PRESETS[bc]
    settings = Compensation(**{**vars(settings), "stream": stream})
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w2")), None, ENGINE)
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    compensate(plain, results, Compensation(), None, ENGINE)
    report = compensate(twin, results, settings, IDS, ENGINE, report_calibration=IDS)
    assert torch.isfinite(twin(IDS).logits).all()
    goal = model(IDS).logits
    ours, off = ((m(IDS).logits - goal).square().mean() for m in (twin, plain))
    assert ours < off or (ours == off and not any(map_of(module) for module in twin.modules()))
    if stream == "float":
        for site in report.sites:
            assert site.calibration.square_after <= site.calibration.square_before * (1 + 1e-4), site.site


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(("ids", "sinks"), [(IDS[:, :1], 1), (IDS, 99), (IDS[:1, :3], 3)])
def test_affine_outputs_where_no_position_is_behind_the_sinks(name: str, ids: Tensor, sinks: int) -> None:
    """As many sinks as leave a position for the scale."""
    model = tiny_model(name)
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    settings = Compensation(("layer",), "sink", sink_positions=sinks, method="affine")
    compensate(model, results, settings, ids, ENGINE)
    tables = [m.table() for m in model.modules() if isinstance(m, BiasCompensation)]
    assert all(len(table) == ids.shape[1] for table in tables)
    assert bool(tables) == (ids.shape[1] > 1)
    assert model(ids).logits.isfinite().all()


def test_methods_refuse_what_they_cannot_do() -> None:
    with pytest.raises(UserError, match=r"bc.scope: layer\+block does not go with bc.method=affine; set \[layer\]"):
        Compensation(("layer", "block"), method="affine")
    with pytest.raises(UserError, match=r"bc.granularity: 'sink' does not go with bc.method=linear"):
        Compensation(("block",), "sink", method="linear")
    with pytest.raises(UserError, match=r"bc.granularity: 'positional' .* set channel or sink"):
        Compensation(("layer",), "positional", method="affine")
    with pytest.raises(UserError, match=r"bc.sink_positions: 0 does not go with bc.method=affine"):
        Compensation(("layer",), "sink", sink_positions=0, method="affine")
    with pytest.raises(UserError, match=r"bc.stream: the data-free bias"):
        Compensation(("layer",), stream="quantized", method="classic")
    model = tiny_model("opt")
    results = calibrate(model, quantizers.create("billm", Bits.parse("w1")), IDS, ENGINE)
    with pytest.raises(UserError, match=r"bc.method: affine needs weights with scales, not a BinaryWeight"):
        compensate(model, results, PRESETS["affine"], IDS, ENGINE)
    with pytest.raises(UserError, match=r"bc.method: affine needs weights with scales by row, which 'billm' has not"):
        bc.quantize(tiny_model("opt"), "billm", "w1", "affine", IDS)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("granularity", ["channel", "sink"])
def test_the_errors_before_an_affine_setting_are_those_without_it(name: str, granularity: Any) -> None:
    """And the biases that it makes are counted: of llama's Linears, which have none."""
    model = tiny_model(name)
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    bare, twin = copy.deepcopy(model), copy.deepcopy(model)
    settings = Compensation(("layer",), granularity, method="affine")
    plain = compensate(bare, results, Compensation(), IDS, ENGINE, report_calibration=IDS)
    report = compensate(twin, results, settings, IDS, ENGINE, report_calibration=IDS)
    for mine, other in zip(report.sites, plain.sites, strict=True):
        assert mine.calibration.square_before == pytest.approx(other.calibration.square_after, rel=1e-4)
        assert mine.calibration.square_after < 0.99 * mine.calibration.square_before
    linears = [module for _, module in model_sites(twin, family_of(twin))]
    made = sum(len(m.bias) for m in linears if m.bias is not None) if name == "llama" else 0
    kept = sum(m.size for m in twin.modules() if isinstance(m, BiasCompensation))
    assert report.bias_parameters == made + kept
    assert bool(made) == (name == "llama" and granularity == "channel")


@pytest.mark.parametrize("bits", ["w1", "w1g5"])
def test_affine_outputs_of_signs(bits: str) -> None:
    """They have scales and no zero points."""
    model = tiny_model("opt")
    twin = copy.deepcopy(model)
    report = bc.quantize(twin, "sign", bits, "affine", IDS, device="cpu")
    bc.quantize(model, "sign", bits, "off", device="cpu")
    one, two = (dict(model_sites(m, family_of(m))) for m in (model, twin))
    for name, module in one.items():
        ratio = two[name].weight / module.weight
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=2e-3, atol=1e-4)  # a factor by row
    assert report.bits_per_weight > 1


def test_settings_that_cover_nothing_are_refused() -> None:
    for name, settings, message in (
        ("opt", Compensation(("layer",), kinds=("conv", "matmul")), r"bc.kinds: there is no conv or matmul in a OPT"),
        (
            "opt",
            Compensation(("auto",), kinds=("conv",)),
            r"bc.kinds: there is no conv in a OPT.*; name one or more",
        ),
        ("llama", PRESETS["classic"], r"bc.method: 'classic' takes the biases of LayerNorms .* a Llama\w+ has none"),
    ):
        with pytest.raises(UserError, match=message):
            bc.quantize(tiny_model(name), "rtn", "w4", settings, IDS, held_out=IDS, device="cpu")
    with pytest.raises(UserError, match=r"bc.kinds: a matmul has no weight that bc.method=affine could scale"):
        Compensation(("layer",), method="affine", kinds=("matmul",))
