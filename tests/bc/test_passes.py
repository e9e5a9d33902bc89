"""One pass gives what separate passes give, and no more forwards are run than are needed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bc
from bc.chains import chain_of
from bc.errors import UserError
from bc.passes import SecondMoment
from bc.pipeline import Collection, Engine, calibrate, compensate, float_means
from bc.quantizers import create
from bc.settings import Bits, Compensation
from tests.conftest import VOCABULARY, tiny_model

ENGINE = Engine(torch.device("cpu"), 2)
IDS = torch.randint(4, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(3))


class Counter:
    """Counts the forwards of blocks that are begun and those that reach their end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
        self.entered = self.left = 0
        kinds = {type(unit.module) for unit in chain_of(model).units}
        assert len(kinds) == 1
        block: Any = kinds.pop()
        original = block.forward

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.entered += 1
            output = original(module, *args, **kwargs)
            self.left += 1
            return output

        monkeypatch.setattr(block, "forward", counted)


def batches() -> int:
    return len(IDS) // ENGINE.batch_size


def layers(model: nn.Module) -> int:
    return len(chain_of(model).units)


@pytest.mark.parametrize(
    ("settings", "entered", "left"),
    [
        # layer alone: every block but the last as a whole, the last until its last Linear is reached
        (Compensation(("layer",), "positional"), lambda n: n, lambda n: n - 1),
        # and the block: a float and a quantized forward of each
        (Compensation(("layer", "block"), "positional"), lambda n: 2 * n, lambda n: 2 * n),
    ],
)
@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_forwards_are_as_few_as_can_be(
    settings: Compensation, entered: Any, left: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    counter = Counter(monkeypatch, model)
    compensate(model, results, settings, IDS, ENGINE)
    assert counter.entered == batches() * entered(layers(model))
    assert counter.left == batches() * left(layers(model))


def test_closed_form_with_means_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    means = float_means(model, IDS, ENGINE)
    counter = Counter(monkeypatch, model)
    compensate(model, results, Compensation(("layer",), "sink"), IDS, ENGINE, means=means)
    assert counter.entered == 0


def test_gptq_takes_two_forwards_a_block_and_one_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    counter = Counter(monkeypatch, model)
    calibrate(model, create("gptq", Bits.parse("w3")), IDS, ENGINE)
    blocks = layers(model)
    assert counter.entered == batches() * (2 * blocks - 1)
    assert counter.left == batches() * (blocks - 1)  # a pass for second moments ends at the last Linear's input


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_sums_collected_beside_gptq_are_the_float_models(name: str, halves: bool) -> None:
    model = tiny_model(name)
    collect = Collection(halves)
    together = calibrate(model, create("gptq", Bits.parse("w3")), IDS, ENGINE, collect=collect)
    alone = calibrate(model, create("gptq", Bits.parse("w3")), IDS, ENGINE)
    apart = float_means(model, IDS, ENGINE, halves=halves)
    assert collect.sums.keys() == apart.keys()
    for key, sums in apart.items():
        assert torch.equal(collect.sums[key].count, sums.count)
        torch.testing.assert_close(collect.sums[key].total, sums.total, atol=1e-4, rtol=1e-5)
        if halves:
            torch.testing.assert_close(collect.sums[key].second.total, sums.second.total, atol=1e-4, rtol=1e-5)  # type: ignore[union-attr]
    for key, result in alone.items():
        assert torch.equal(result.weight.codes, together[key].weight.codes)  # type: ignore[union-attr]


def test_sums_are_refused_where_there_is_no_pass_for_them() -> None:
    with pytest.raises(UserError, match=r"^collect: quantizer 'rtn' takes no second moments of all samples"):
        calibrate(tiny_model("llama"), create("rtn", Bits.parse("w3")), IDS, ENGINE, collect=Collection())


@pytest.mark.parametrize("setting", ["channel", "sink", "shrink"])
def test_quantize_gives_what_its_steps_give(setting: str) -> None:
    model = tiny_model("opt")
    stepwise = copy.deepcopy(model)
    results = calibrate(stepwise, create("gptq", Bits.parse("w3")), IDS, ENGINE)
    compensate(stepwise, results, Compensation.parse(setting), IDS, ENGINE)
    bc.quantize(model, "gptq", "w3", setting, IDS, device="cpu", batch_size=ENGINE.batch_size)
    torch.testing.assert_close(model(IDS).logits, stepwise(IDS).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("columns", [3, 512, 700, 1100])
def test_second_moment_against_the_whole_product(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    parts = [torch.randn(n, columns, generator=generator) for n in (5, 1, 8)]
    moment = SecondMoment(columns)
    for part in parts:
        moment.add(part)
    x: Tensor = torch.cat(parts).double()
    torch.testing.assert_close(moment.mean().double(), x.T @ x / len(x), atol=1e-5, rtol=1e-5)
