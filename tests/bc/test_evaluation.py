"""Perplexity against a computation by hand, whole and streamed."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import bc
from bc import evaluation
from bc.diagnosis import first_not_finite
from bc.errors import UserError
from bc.evaluation import evaluate_accuracies, evaluate_accuracy, evaluate_perplexity
from bc.pipeline import Engine
from bc.settings import Compensation
from tests.conftest import MAKERS, VOCABULARY, tiny_model

CPU = torch.device("cpu")
WINDOWS = torch.randint(4, VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(5))


def by_hand(model: nn.Module, windows: torch.Tensor) -> float:
    """exp of the mean over windows of the mean of −log softmax at the next token, float64."""
    losses = []
    for window in windows:
        with torch.no_grad():
            scores = model(input_ids=window[None], use_cache=False).logits[0].double().numpy()
        mine = []
        for t in range(len(window) - 1):
            row = scores[t] - scores[t].max()
            mine.append(np.log(np.exp(row).sum()) - row[int(window[t + 1])])
        losses.append(np.mean(mine))
    return float(np.exp(np.mean(losses)))


@pytest.mark.parametrize("name", list(MAKERS))
def test_perplexity_equals_a_hand_computation(name):
    model = tiny_model(name)
    expected = by_hand(model, WINDOWS)
    assert expected != pytest.approx(VOCABULARY, rel=0.01)
    for batch_size in (1, 2, 5, 100):
        assert bc.perplexity(model, WINDOWS, device="cpu", batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


def test_transformers_own_loss_agrees():
    model = tiny_model("llama")
    with torch.no_grad():
        loss = model(input_ids=WINDOWS, labels=WINDOWS).loss.item()
    assert evaluate_perplexity(model, WINDOWS) == pytest.approx(float(np.exp(loss)), rel=1e-5)


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("preset", ["off", "channel", "sink", "paper"])
def test_the_streamed_path_equals_the_whole_model(name, preset, monkeypatch):
    model = tiny_model(name)
    bc.quantize(model, "rtn", "w3", preset, WINDOWS[:, :9], device="cpu")
    whole = evaluate_perplexity(model, WINDOWS, Engine(CPU, 2))
    monkeypatch.setattr(evaluation, "_fits", lambda *_: False)
    for batch_size, store in ((1, "host"), (2, "host"), (2, "disk"), (3, "device")):
        streamed = evaluate_perplexity(model, WINDOWS, Engine(CPU, batch_size, store))
        assert streamed == pytest.approx(whole, rel=1e-5)
    monkeypatch.undo()
    assert evaluate_perplexity(model, WINDOWS, Engine(CPU, 2)) == whole  # nothing is left behind


def test_the_streamed_path_with_a_bias_on_the_logits(monkeypatch):
    model = tiny_model("opt_350m")
    bc.quantize(model, "rtn", "w3", Compensation(("layer", "model"), "positional"), WINDOWS, device="cpu")
    whole = evaluate_perplexity(model, WINDOWS)
    monkeypatch.setattr(evaluation, "_fits", lambda *_: False)
    assert evaluate_perplexity(model, WINDOWS) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_window_longer_than_the_models_positions_is_refused(name):
    model = tiny_model(name)
    ids = torch.zeros(1, 65, dtype=torch.long)
    with pytest.raises(UserError, match=r"65.*64"):
        evaluate_perplexity(model, ids)
    evaluate_perplexity(model, ids[:, :64])


def test_a_model_without_a_longest_position_takes_any_window():
    ids = torch.randint(4, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
    assert evaluate_perplexity(tiny_model("bloom"), ids) > 1


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (0, 5), (5,), (1, 2, 3)])
def test_windows_that_cannot_be_scored_are_refused(shape):
    with pytest.raises(UserError, match="windows"):
        evaluate_perplexity(tiny_model("opt"), torch.zeros(shape, dtype=torch.long))


def test_logits_that_are_not_numbers_are_an_error():
    model = tiny_model("opt")
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^lm_head: the output holds NaN"):
        evaluate_perplexity(model, WINDOWS)


def test_the_place_is_named_where_numbers_cease_to_be_finite():
    model = tiny_model("llama")
    assert first_not_finite(model, [partial(model, input_ids=WINDOWS)]) is None
    model.model.layers[1].mlp.down_proj.weight.data[:] = float("inf")
    with pytest.raises(FloatingPointError, match=r"^model\.layers\.1\.mlp\.down_proj: the output"):
        evaluate_perplexity(model, WINDOWS)
    images = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3))
    images[1].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^1: the output"):
        evaluate_accuracy(images, [(torch.ones(2, 3, 2, 2), torch.zeros(2, dtype=torch.long))])
    assert not any(module._forward_hooks for module in [*model.modules(), *images.modules()])


def test_a_hopeless_model_has_infinite_perplexity():
    model = tiny_model("llama")
    model.model.norm.weight.data *= 1e6
    assert evaluate_perplexity(model, WINDOWS) == float("inf")


def test_a_sure_model_has_perplexity_one():
    """Every token is followed by itself plus one, and the model knows it."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(50.0))

        def forward(self, input_ids, use_cache=False):
            logits = self.scale * nn.functional.one_hot((input_ids + 1) % 10, 10)
            return type("Output", (), {"logits": logits})()

    windows = (torch.arange(8)[None] + torch.arange(3)[:, None]) % 10
    assert evaluate_perplexity(Counter(), windows) == pytest.approx(1, abs=1e-6)
    assert evaluate_perplexity(Counter(), windows.flip(1)) > 1e20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_are_scored_in_single_precision(dtype):
    model = tiny_model("llama").to(dtype)
    assert evaluate_perplexity(model, WINDOWS) == pytest.approx(by_hand(model, WINDOWS), rel=2e-2)


# Several models in one pass -------------------------------------------------------------------------------------------


def classifiers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        name: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 7)).requires_grad_(False)
        for name in ("float", "w4", "half")
    }
    found["half"].bfloat16()
    return found


def labelled(sizes: tuple[int, ...] = (5, 5, 2)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 2, 2, generator=draw), torch.randint(0, 7, (n,), generator=draw)) for n in sizes]


@pytest.mark.parametrize("together", [True, False])
def test_one_pass_gives_what_separate_passes_give(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_fits", lambda *_: together)
    models, batches, decoded = classifiers(), labelled(), []

    def decoding():
        for number, batch in enumerate(batches):
            decoded.append(number)
            yield batch

    found = bc.accuracies(models, decoding(), device="cpu")
    assert decoded == [0, 1, 2]
    assert found == {name: bc.accuracy(model, batches, device="cpu") for name, model in models.items()}
    assert len({accuracy.loss for accuracy in found.values()}) == 3
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    scores = models["w4"](images)
    assert list(found["w4"].right) == (scores.argmax(1) == labels).tolist()
    assert found["w4"].loss == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)


def test_several_models_are_moved_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    models, moved = classifiers(), []
    on_device = evaluation.on_device

    def moving(device, *modules):
        moved.append(len(modules))
        return on_device(device, *modules)

    monkeypatch.setattr(evaluation, "on_device", moving)
    evaluate_accuracies(models, labelled())
    assert moved[0] == 3 and not any(moved[1:])
    moved.clear()
    monkeypatch.setattr(evaluation, "_fits", lambda *_: False)
    evaluate_accuracies(models, labelled())
    assert moved == [0] + 9 * [1]


def test_of_several_models_the_one_with_nan_is_named() -> None:
    models = classifiers()
    next(iter(models["w4"].parameters()))[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^w4: 1: the output"):
        evaluate_accuracies(models, labelled())


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(UserError, match="models: there are none"):
        evaluate_accuracies({}, labelled())
    with pytest.raises(UserError, match="there are no images"):
        evaluate_accuracies(classifiers(), [])
