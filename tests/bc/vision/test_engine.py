"""The engine on vision models: statistics, biases of every scope and stream, against hooks on whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bc
from bc import quantizers
from bc.activation_grids import Noisy, Symmetric, TwinGELU
from bc.activations import quantizers_of
from bc.chains import VisionChain
from bc.checkpoint import load_weights, save_weights
from bc.choice import choose, unions
from bc.compensation import compensation_of
from bc.errors import QuantizationError, UserError
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers.base import SiteResult
from bc.settings import GRANULARITIES, Bits, Compensation
from bc.site_calibration import output_gradients
from bc.vision import sites, units, wrap
from tests.bc.vision.conftest import make

Case = tuple[nn.Module, Tensor]
CPU = torch.device("cpu")
ENGINE = Engine(CPU, 3)
EXACT = {"dtype": "float32"}


def ready(kind: str) -> Case:
    model, images = make(kind)
    return wrap(model), images


def images_for(images: Tensor, count: int = 7) -> Tensor:
    """More images of the same kind; the last batch of three is smaller."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *images.shape[1:], generator=generator)


def quantized(model: nn.Module, images: Tensor, name: str = "minmax", bits: str = "w4a4") -> dict[str, SiteResult]:
    return calibrate(model, quantizers.create(name, Bits.parse(bits)), images, ENGINE)


def outputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What modules return in one forward of the whole model, by plain hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _m, _args, output: found.__setitem__(name, output.detach())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    found[""] = model(images).detach()
    for handle in handles:
        handle.remove()
    return found


def channel_mean(output: Tensor, kind: str) -> Tensor:
    """Mean over everything but the channels, written out for each kind."""
    if kind == "conv":
        return output.mean((0, 2, 3))
    if kind == "matmul":
        return output.mean((0, 2)).flatten()
    return output.reshape(-1, output.shape[-1]).mean(0)


def place_mean(output: Tensor) -> Tensor:
    return output.mean(0)


@pytest.mark.parametrize("granularity", ["channel", "positional"])
def test_quantized_stream_meets_the_float_means_at_every_site(wrapped: Case, granularity: str) -> None:
    model, few = wrapped
    images = images_for(few)
    results = quantized(model, images)
    twin = copy.deepcopy(model)
    compensate(twin, results, Compensation(("layer",), granularity, "quantized", **EXACT), images, ENGINE)
    names = [site.name for site in sites(model)]
    exact, ours = outputs(model, images, names), outputs(twin, images, names)
    for site in sites(model):
        a, b = exact[site.name], ours[site.name]
        one, two = (
            (channel_mean(a, site.kind), channel_mean(b, site.kind))
            if granularity == "channel"
            else (place_mean(a), place_mean(b))
        )
        torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4, msg=lambda text, n=site.name: f"{n}: {text}")


def fed_outputs(model: nn.Module, twin: nn.Module, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Output of a module and of its quantized twin on the module's own float input, mask and all."""
    caught: dict[str, Any] = {}

    def keep(_m: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        caught.update(args=args, kwargs=kwargs, output=output.detach())

    handle = model.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    model(images)
    handle.remove()
    return caught["output"], twin.get_submodule(name)(*caught["args"], **caught["kwargs"]).detach()


@pytest.mark.parametrize("scope", [("layer",), ("attention",), ("mlp",), ("block",), ("layer", "attention", "block")])
def test_float_stream_meets_the_means_of_each_part_on_its_float_input(wrapped: Case, scope: tuple[str, ...]) -> None:
    model, few = wrapped
    images = images_for(few)
    twin = copy.deepcopy(model)
    compensate(twin, quantized(model, images), Compensation(scope, "positional", **EXACT), images, ENGINE)
    names = [site.name for site in sites(model)] if "layer" in scope else []
    for unit in units(model):
        names += [f"{unit.name}.{unit.regions[s].entry}".rstrip(".") for s in unit.regions if s in scope]
    assert names
    if len(scope) > 1:  # a proj is fed to a part that has a bias too: only the largest part is unbiased for sure
        names = [unit.region_name("block") for unit in units(model) if "block" in unit.regions]
    for name in dict.fromkeys(names):
        goal, got = fed_outputs(model, twin, images, name)
        torch.testing.assert_close(place_mean(got), place_mean(goal), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("granularity", ["channel", "positional"])
def test_model_scope_meets_the_mean_logits_and_costs_nothing(wrapped: Case, stream: str, granularity: str) -> None:
    model, few = wrapped
    images = images_for(few)
    twin = copy.deepcopy(model)
    settings = Compensation(("layer", "model"), granularity, stream, **EXACT)
    report = compensate(twin, quantized(model, images), settings, images, ENGINE)
    torch.testing.assert_close(twin(images).mean(0), model(images).mean(0), atol=1e-5, rtol=1e-4)
    heads = [site for site in report.sites if site.scope == "model"]
    assert heads and all(site.folded and site.bias_parameters == 0 for site in heads)


@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_stages_and_downsamples_of_swin(stream: str) -> None:
    model, few = ready("swin")
    images = images_for(few)
    twin = copy.deepcopy(model)
    settings = Compensation(("downsample", "stage"), "positional", stream, **EXACT)
    report = compensate(twin, quantized(model, images), settings, images, ENGINE)
    stages = [name for name, _ in model.layers.named_children()]
    assert [s.site for s in report.sites if s.scope == "stage"] == [f"layers.{i}" for i in stages]
    downs = [f"{unit.name}.reduction" for unit in units(model) if unit.kind == "downsample"]
    assert [s.site for s in report.sites if s.scope == "downsample"] == downs
    for name in [f"layers.{i}" for i in stages]:
        if stream == "float":
            goal, got = fed_outputs(model, twin, images, name)
        else:
            goal, got = outputs(model, images, [name])[name], outputs(twin, images, [name])[name]
        torch.testing.assert_close(place_mean(got), place_mean(goal), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["channel", "sink", "positional"])
def test_no_site_gets_worse_on_the_images_it_was_fitted_on(wrapped: Case, granularity: str) -> None:
    model, few = wrapped
    images = images_for(few)
    report = compensate(
        copy.deepcopy(model),
        quantized(model, images),
        Compensation(("layer",), granularity, **EXACT),
        images,
        ENGINE,
        report_calibration=images,
    )
    assert len(report.sites) == len(sites(model))
    for site in report.sites:
        assert site.calibration.square_after <= site.calibration.square_before * (1 + 1e-6), site.site


def test_channel_biases_of_linears_and_convolutions_fold(wrapped: Case) -> None:
    model, few = wrapped
    images = images_for(few)
    twin = copy.deepcopy(model)
    settings = Compensation(("layer",), "channel", kinds=("linear", "conv"))
    report = compensate(twin, quantized(model, images), settings, images, ENGINE)
    assert not any(compensation_of(module) for module in twin.modules())
    bare = {site.name for site in sites(model) if site.kind != "matmul" and site.module.bias is None}
    assert all(s.folded == ("matmul" not in s.site) for s in report.sites)
    assert report.bias_parameters == sum(
        twin.get_submodule(name).bias.numel() for name in bare
    )  # only a module that had no bias gets a new one


def test_kinds_choose_the_sites(wrapped: Case) -> None:
    model, few = wrapped
    images = images_for(few)
    results = quantized(model, images)
    for kind in ("conv", "linear", "matmul"):
        twin = copy.deepcopy(model)
        compensate(twin, results, Compensation(("layer",), "positional", kinds=(kind,)), images, ENGINE)
        chosen = {site.name for site in sites(twin) if compensation_of(site.module) or _changed(model, site)}
        assert chosen == {site.name for site in sites(model) if site.kind == kind}


def _changed(model: nn.Module, site: Any) -> bool:
    """Whether a site's own bias was changed by folding (a head has one position)."""
    own, other = getattr(site.module, "bias", None), getattr(model.get_submodule(site.name), "bias", None)
    return own is not None and (other is None or not torch.equal(own, other))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "swin"])
def test_every_granularity_brings_each_site_nearer(kind: str, granularity: str) -> None:
    """On the images that it is fitted on; and the model then runs on others, with what folds folded."""
    model, few = ready(kind)
    images = images_for(few)
    settings = Compensation(("layer",), granularity, budget=64.0, dtype="float32")  # type: ignore[arg-type]
    report = compensate(model, quantized(model, images), settings, images, ENGINE, report_calibration=images)
    assert report.sites and not any(site.granularity not in (granularity, "channel") for site in report.sites)
    for site in report.sites:
        summary = site.calibration.summary()
        assert summary["mse_after"] <= summary["mse_before"] * (1 + 1e-6), site.site
    assert model(few).isfinite().all()


def test_sink_sets_class_tokens_apart_and_nothing_else() -> None:
    for kind, rows in (("vit", 2), ("deit_distilled", 3), ("swin", 1)):
        model, few = ready(kind)
        images = images_for(few)
        twin = copy.deepcopy(model)
        compensate(twin, quantized(model, images), Compensation(("layer",), "sink"), images, ENGINE)
        found = {s.name: compensation_of(s.module) for s in sites(twin) if s.kind == "matmul"}
        assert {len(child.bias) for child in found.values() if child is not None} == {rows}, kind
        assert compensation_of(twin.patch_embed.proj) is None  # one row: folded


@pytest.mark.parametrize("name", quantizers.of_kind("weight_activation"))
def test_results_survive_a_file_bit_for_bit(name: str, tmp_path: Any) -> None:
    model, few = ready("vit")
    images = images_for(few, 4)
    results = quantized(model, images, name)
    save_weights(tmp_path / "w.safetensors", results, {})
    again, _ = load_weights(tmp_path / "w.safetensors")
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    first = compensate(one, results, Compensation(), None, ENGINE)
    second = compensate(two, again, Compensation(), None, ENGINE)
    assert torch.equal(one(images), two(images))
    assert not torch.equal(one(images), model(images))
    assert first.storage_bits == second.storage_bits
    assert {k: r.notes for k, r in results.items()} == {k: r.notes for k, r in again.items()}


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_weight_quantizers_take_a_vision_models_linears(name: str) -> None:
    model, few = ready("swin")
    images = images_for(few)
    results = quantized(model, images, name, "w3")
    assert set(results) == {site.name for site in sites(model) if site.kind == "linear"}
    twin = copy.deepcopy(model)
    report = compensate(twin, results, Compensation(("layer",), "channel", **EXACT), images, ENGINE)
    assert {s.site for s in report.sites} == set(results)


def gradients(model: nn.Module, images: list[Tensor], metric: str, budget: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in output_gradients(VisionChain(model), metric, images, CPU, budget):
        found |= part
    return found


@pytest.mark.parametrize(("name", "options"), [("ptq4vit", {}), ("noisyquant", {"base": "ptq4vit"})])
@pytest.mark.parametrize(("kind", "grid"), [("vit", TwinGELU), ("swiglu", Symmetric)])
def test_twin_grids_are_for_gelu_alone(kind: str, grid: type, name: str, options: dict[str, Any]) -> None:
    model, images = ready(kind)
    method = quantizers.create(name, Bits.parse("w8a8"), metric="mse", **options)
    (found,) = calibrate(model, method, images, ENGINE)["blocks.0.mlp.fc2"].inputs
    found = found.base if isinstance(found, Noisy) else found
    assert type(found) is grid
    lowest = torch.tensor(-0.5)
    assert (found(lowest) < -0.2) == (grid is Symmetric), "clipped at GELU's least value"


def test_gradients_do_not_depend_on_the_number_of_passes_and_are_autograds(wrapped: Case) -> None:
    model, few = wrapped
    images = list(images_for(few, 5).split(3))
    whole, unit_by_unit = gradients(model, images, "fisher", 2**40), gradients(model, images, "fisher", 1)
    assert list(whole) == [site.name for site in sites(model)] == list(unit_by_unit)
    assert all(torch.equal(whole[name], unit_by_unit[name]) for name in whole)
    # the gradient at the logits of cross-entropy is softmax − one-hot: check it through the head's own output
    head = sites(model)[-1]
    scores = torch.cat([model(batch) for batch in images])
    share = 2 if "head_dist" in head.name else 1  # two heads are averaged
    target = scores.softmax(-1) - share * whole[head.name]
    assert torch.allclose(target.amax(1), torch.ones(5), atol=1e-5)
    assert torch.allclose(target.sum(1), torch.ones(5), atol=1e-5)
    self_kl = gradients(model, images, "self_kl", 2**40)
    assert max(g.abs().max() for g in self_kl.values()) < 1e-6 < max(g.abs().max() for g in whole.values())


def test_scope_search_tries_all_unions_and_keeps_the_best() -> None:
    model, few = ready("vit")
    images = images_for(few, 4)
    results, before = quantized(model, images), copy.deepcopy(model.state_dict())
    wanted = ("attention", "model")
    tried: list[int] = []

    def score(twin: nn.Module) -> tuple[float, ...]:
        tried.append(1)
        compensated = [compensation_of(m) is not None for m in twin.modules()]
        return (-abs(len(tried) - 1 - unions().index(wanted)), float(sum(compensated)))

    settings, trials = choose(model, results, Compensation(("search",), "positional"), images, ENGINE, score)
    assert len(tried) == 31 and len({t.settings for t in trials}) == 31
    assert settings == Compensation(wanted, "positional")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["minmax", "repq_vit", "noisyquant"])
def test_copies_of_a_model_share_no_activation_quantizer(name: str) -> None:
    model, few = ready("vit")
    images = images_for(few, 4)
    results = quantized(model, images, name)
    own = {id(q) for result in results.values() for q in result.inputs}
    places = [b.data_ptr() for result in results.values() for q in result.inputs for b in q.buffers()]
    for twin in (copy.deepcopy(model), copy.deepcopy(model)):
        compensate(twin, results, Compensation(()), None, ENGINE)
        found = [q for m in twin.modules() if (child := quantizers_of(m)) is not None for q in child.quantizers]
        assert len(found) == len(own) and not own & set(map(id, found))
        places += [b.data_ptr() for q in found for b in q.buffers()]
    assert len(places) == len(set(places)) > 3 * len(sites(model))


def test_the_public_functions_take_vision_models() -> None:
    model, few = make("deit_distilled")
    images = images_for(few)
    labels = model(images).argmax(1)
    found = bc.accuracy(model, [(images[:4], labels[:4]), (images[4:], (labels[4:] + 1) % 7)], device="cpu")
    assert found.samples == 7 and found.top1 == pytest.approx(100 * 4 / 7)
    report = bc.quantize(model, "minmax", "w8a8", "paper", images, device="cpu")
    assert report.bits_per_weight > 8 and {s.scope for s in report.sites} == {"layer", "model"}
    assert bc.accuracy(model, [(images, labels)], device="cpu").top1 > 50
    with pytest.raises(UserError, match=r"^model: it is quantized already"):
        bc.quantize(model, "minmax", "w8a8", "off", images, device="cpu")


def test_mistakes() -> None:
    model, few = ready("vit")
    images = images_for(few)
    with pytest.raises(UserError, match=r"bc.scope: there is no 'stage' in a .*; allowed: layer, attention, mlp"):
        bc.quantize(model, "minmax", "w4a4", Compensation(("stage",)), images, device="cpu")
    with pytest.raises(UserError, match=r"calibration: a .* is not allowed; give images"):
        bc.quantize(model, "minmax", "w4a4", "off", images[0], device="cpu")
    with pytest.raises(UserError, match="needs calibration samples"):
        bc.quantize(model, "minmax", "w4a4", "off", device="cpu")
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"^blocks\.0\.attn\.qkv"):
        bc.quantize(model, "minmax", "w4a4", "off", broken, device="cpu")
