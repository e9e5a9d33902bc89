"""The choice among settings within a budget of bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bc
from bc.choice import FURTHER, Trial, candidates, choose, further
from bc.errors import QuantizationError, UserError
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers import create
from bc.quantizers.base import SiteResult
from bc.settings import Bits, Compensation
from bc.vision import wrap
from tests.bc.vision.conftest import make
from tests.conftest import VOCABULARY, tiny_model

ENGINE = Engine(torch.device("cpu"), 3)
AUTO = Compensation(("auto",), "channel")
Case = tuple[nn.Module, Tensor, dict[str, SiteResult]]


@pytest.fixture(params=["llama", "vit"])
def case(request: pytest.FixtureRequest) -> Case:
    generator = torch.Generator().manual_seed(5)
    if request.param == "llama":
        model: Any = tiny_model("llama")
        samples = torch.randint(4, VOCABULARY, (5, 12), generator=generator)
        return model, samples, calibrate(model, create("rtn", Bits.parse("w3")), samples, ENGINE)
    model, few = make("vit")
    model, samples = wrap(model), torch.randn(5, *few.shape[1:], generator=generator)
    return model, samples, calibrate(model, create("minmax", Bits.parse("w4a4")), samples, ENGINE)


def chosen(case: Case, budget: float, best: float) -> tuple[Compensation, list[Trial]]:
    """The choice by a score that is highest where the model's biases are nearest to a number of values."""
    model, samples, results = case
    seen: list[int] = []

    def score(twin: nn.Module) -> tuple[float, ...]:
        size = sum(b.numel() for name, b in twin.named_buffers() if ".compensation." in f".{name}")
        seen.append(size)
        return (-abs(size - best),)

    settings = Compensation(AUTO.scope, AUTO.granularity, budget=budget)
    winner, trials = choose(model, results, settings, samples, ENGINE, score)
    assert len(seen) == len(trials)
    return winner, trials


def test_every_candidate_is_tried_where_all_are_allowed(case: Case) -> None:
    _, trials = chosen(case, 1e6, 0)
    wanted = candidates(Compensation(AUTO.scope, AUTO.granularity, budget=1e6), vision=hasattr(case[0], "blocks"))
    assert [trial.settings for trial in trials[: len(wanted)]] == wanted
    assert not trials[0].settings.enabled
    best = sorted(trials[1 : len(wanted)], key=lambda trial: trial.score, reverse=True)
    if not hasattr(case[0], "blocks"):
        more = [replace(trial.settings, stream="blended") for trial in best[:FURTHER]]
        assert [trial.settings for trial in trials[len(wanted) :]] == more
        return
    more = [trial.settings for trial in trials[len(wanted) :]]
    assert len(more) == FURTHER and all("readout" in settings.scope for settings in more)
    first = next(trial.settings for trial in best if "readout" not in trial.settings.scope)
    assert set(more[0].scope) == (set(first.scope) | {"readout"}) - {"model"}
    assert replace(more[0], scope=()) == replace(first, scope=())


def test_the_best_are_tried_with_a_readout_once_each() -> None:
    """Scopes that differ in the logits' bias alone are the same with a readout, which replaces it."""
    scopes: list[tuple[str, ...]] = [("layer", "model"), ("layer",), ("readout",), ("block",), (), ("mlp",), ("stage",)]
    trials = [Trial(Compensation(scope), (-float(i),), 4.0) for i, scope in enumerate(scopes)]
    found = further(trials, vision=True)
    assert [s.scope for s in found] == [("layer", "readout"), ("block", "readout"), ("mlp", "readout")]


def test_a_budget_is_kept_and_what_is_beyond_it_is_not_tried(case: Case) -> None:
    model, samples, results = case
    before = copy.deepcopy(model.state_dict())
    _, everything = chosen(case, 1e6, 1e9)
    sizes = sorted({trial.bits_per_weight for trial in everything})
    limit = (sizes[1] + sizes[2]) / 2 - sizes[0]
    winner, trials = chosen(case, limit, 1e9)
    direct = compensate(copy.deepcopy(model), results, winner, samples, ENGINE).bits_per_weight
    assert direct <= everything[0].bits_per_weight + limit
    tried = {replace(trial.settings, budget=1e6) for trial in trials}
    for trial in everything:
        within = trial.bits_per_weight <= everything[0].bits_per_weight + limit
        if trial.settings.granularity in ("positional", "shrink"):
            assert (trial.settings in tried) == within
        else:
            assert trial.settings in tried
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_kept_where_nothing_helps(case: Case) -> None:
    winner, _ = chosen(case, 1e6, -1.0)
    assert not winner.enabled  # the first of those without values of their own


def test_a_candidate_without_valid_biases_is_out_of_the_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The head's errors are beyond half precision: everything that corrects them fails, and the rest goes on."""
    model, few = make("vit")
    model, samples = wrap(model), torch.randn(5, *few.shape[1:], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        model.head.weight.mul_(1e9)  # type: ignore[union-attr, operator]
    results = calibrate(model, create("minmax", Bits.parse("w4a4")), samples, ENGINE)
    winner, trials = choose(model, results, replace(AUTO, budget=1e6), samples, ENGINE, lambda twin: (1.0,))
    assert not winner.enabled
    failed = [trial for trial in trials if trial.failure]
    assert failed and all(str(trial.failure).startswith("head: a ") and not trial.score for trial in failed)
    assert "out of the choice: head: a bias of" in caplog.text
    with pytest.raises(QuantizationError, match="head: a bias of"):
        monkeypatch.setattr("bc.choice.unions", lambda: [("layer",), ("layer", "block")])
        choose(model, results, Compensation(("search",)), samples, ENGINE, lambda twin: (1.0,))


def test_a_model_without_a_head_is_chosen_for_as_well() -> None:
    model, few = make("vit")
    model.reset_classifier(0)  # type: ignore[operator]
    model, images = wrap(model), torch.randn(5, *few.shape[1:], generator=torch.Generator().manual_seed(5))
    goal = copy.deepcopy(model)(images)
    options: dict[str, Any] = {"score": lambda twin: -float((twin(images) - goal).square().mean()), "device": "cpu"}
    report = bc.quantize(model, "minmax", "w3a4", Compensation(AUTO.scope, budget=1e6), images, **options)
    assert report.settings is not None and report.settings.enabled
    assert not {"model", "readout"} & set(report.settings.scope)


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("scope", [("layer",), ("layer", "block"), ("block",), ("layer", "model")])
def test_low_rank_keeps_to_the_budget(case: Case, scope: tuple[str, ...], stream: str) -> None:
    """All that it stores counts; what one site leaves is another's."""
    model, samples, results = case
    none = compensate(copy.deepcopy(model), results, Compensation(), None, ENGINE)

    def bits(budget: float) -> float:
        settings = Compensation(scope, "lowrank", stream, budget=budget)  # type: ignore[arg-type]
        report = compensate(copy.deepcopy(model), results, settings, samples, ENGINE)
        return report.bits_per_weight - none.bits_per_weight

    # A shared row is the least that there is; only a Linear or convolution that has a bias need not store it.
    least = bits(1e-9)
    found = [bits(least + more) for more in (0.1, 0.5, 2.0)]
    assert all(extra <= least + more for extra, more in zip(found, (0.1, 0.5, 2.0), strict=True))


@pytest.fixture
def judged(case: Case) -> tuple[nn.Module, Tensor, list[float], Any]:
    """A float model, samples, and a score by a number of its own that keeps what it gave."""
    model, samples, _ = case
    goal, given = copy.deepcopy(model)(samples[-1:]), []

    def score(twin: nn.Module) -> float:
        given.append(-float((logits_of(twin(samples[-1:])) - logits_of(goal)).square().mean()))
        return given[-1]

    return model, samples, given, score


def logits_of(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found


@torch.no_grad()
def test_quantize_chooses_by_a_score(judged: tuple[nn.Module, Tensor, list[float], Any]) -> None:
    """The model that comes back is the one that scored best within the budget; the report says which it is."""
    model, samples, given, score = judged
    quantizer, bits = ("minmax", "w4a4") if hasattr(model, "blocks") else ("rtn", "w3")
    settings = Compensation(AUTO.scope, AUTO.granularity, budget=1e6)
    report = bc.quantize(model, quantizer, bits, settings, samples[:4], score=score, device="cpu", batch_size=3)
    assert len(given) > 10 and any(given)
    assert report.settings is not None and not report.settings.searched
    assert score(model) == pytest.approx(max(given[:-1]), rel=1e-4)


def test_quantize_chooses_by_the_perplexity_of_held_out_windows() -> None:
    model: Any = tiny_model("llama")
    ids = torch.randint(4, VOCABULARY, (7, 12), generator=torch.Generator().manual_seed(5))
    twins = {name: copy.deepcopy(model) for name in ("off", "channel", "sink", "positional")}
    settings = Compensation(AUTO.scope, AUTO.granularity, budget=1e6)
    bc.quantize(model, "rtn", "w3", settings, ids[:4], held_out=ids[4:], device="cpu")
    for name, twin in twins.items():
        bc.quantize(twin, "rtn", "w3", name, ids[:4], device="cpu")
    least = min(bc.perplexity(twin, ids[4:], device="cpu") for twin in twins.values())
    assert bc.perplexity(model, ids[4:], device="cpu") <= least * (1 + 1e-5)


def test_quantize_chooses_by_the_divergence_on_held_out_images() -> None:
    """None of a few settings that it tries is nearer to the float model on the images that fit nothing."""
    model, few = make("vit")
    model, images = wrap(model), torch.randn(9, *few.shape[1:], generator=torch.Generator().manual_seed(5))
    goal = copy.deepcopy(model)(images[5:]).softmax(1)

    def divergence(twin: nn.Module) -> float:
        return float((goal * (goal.log() - twin(images[5:]).softmax(1).log())).sum(1).mean())

    twins = {name: copy.deepcopy(model) for name in ("off", "channel", "sink", "affine", "readout")}
    settings = Compensation(AUTO.scope, AUTO.granularity, budget=1e6)
    report = bc.quantize(model, "minmax", "w4a4", settings, images[:5], held_out=images[5:], device="cpu")
    assert report.settings is not None and not report.settings.searched
    for name, twin in twins.items():
        bc.quantize(twin, "minmax", "w4a4", name, images[:5], device="cpu")
        assert divergence(model) <= divergence(twin) * (1 + 1e-5), name


@pytest.mark.parametrize("preset", ["auto", "search"])
def test_a_choice_that_cannot_be_made_is_refused_first(case: Case, preset: str) -> None:
    model, samples, _ = case
    vision = hasattr(model, "blocks")
    quantizer, bits, what = ("minmax", "w4a4", "images") if vision else ("rtn", "w3", "windows")
    with pytest.raises(UserError, match=rf"^held_out: .*{what}.* or a score"):
        bc.quantize(model, quantizer, bits, preset, samples)
    with pytest.raises(UserError, match=r"^calibration: "):
        bc.quantize(model, quantizer, bits, preset, None, score=lambda twin: 0.0)
