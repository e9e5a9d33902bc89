"""The readout against ridge regression, reduced-rank regression and choices made on materialised features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bc import quantizers
from bc.errors import UserError
from bc.linear_map import LinearMap, RidgeSums, map_of
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers.base import SiteResult
from bc.readout import PENALTIES, SHARE, halves, map_size, most_rank, solve
from bc.settings import PRESETS, Bits, Compensation
from bc.vision import sites
from tests.bc.vision.test_engine import images_for, ready
from tests.conftest import tiny_model

ENGINE = Engine(torch.device("cpu"), 3)
READOUT = Compensation(("readout",), dtype="float32", budget=1e6)
Rows = tuple[Tensor, Tensor]


def random_rows(count: int = 40, inputs: int = 6, outputs: int = 4) -> Rows:
    """Features and errors that they tell in part."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, inputs, generator=generator) + 1
    noise = torch.randn(count, outputs, generator=generator)
    return x, x @ torch.randn(inputs, outputs, generator=generator) + noise + 2


def ridge(x: Tensor, error: Tensor, penalty: float, rank: int | None = None) -> Tensor:
    """By least squares on materialised rows, the penalty as further rows; fitted values cut by their SVD."""
    x, error = x.double(), error.double()
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    size = (penalty * (x * x).sum(0).mean()).sqrt()
    extra = torch.cat([size * torch.eye(x.shape[1]), torch.zeros(x.shape[1], 1)], 1).double()
    target = torch.cat([error, torch.zeros(len(extra), error.shape[1], dtype=torch.float64)])
    found = torch.linalg.lstsq(torch.cat([design, extra]), target).solution
    if rank is None:
        return found
    body = found[:-1]
    right = torch.linalg.svd((x - x.mean(0)) @ body)[2][:rank]
    body = body @ right.T @ right
    return torch.cat([body, (error.mean(0) - x.mean(0) @ body)[None]])


def chosen(x: Tensor, error: Tensor, rank: int | None) -> tuple[Tensor, float]:
    """The weights for the penalty that errs least on the other half, even and odd samples, and that error."""
    best = (float("inf"), 0.0)
    for penalty in PENALTIES:
        total = 0.0
        for mine, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            weights = ridge(x[mine], error[mine], penalty, rank)
            total += (error[other] - x[other].double() @ weights[:-1] - weights[-1]).square().sum().item()
        best = min(best, (total, penalty))
    return ridge(x, error, best[1], rank), best[0]


@pytest.mark.parametrize("rank", [None, 1, 2, 4])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_map_is_the_ridge_regression_that_errs_least_on_the_other_half(rank: int | None, size: int) -> None:
    x, error = random_rows()
    weights = solve(halves(list(x.split(size)), list(error.split(size))), rank)
    assert weights is not None
    torch.testing.assert_close(weights, chosen(x, error, rank)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_map_of_the_rank_predicts_as_the_full_one_does(rank: int) -> None:
    """Reduced-rank regression: random maps of the rank, the intercept theirs, are farther from its predictions."""
    x, error = random_rows()
    sums = RidgeSums(6, 4)
    sums.add(x, error)
    full = sums.solve()
    found = sums.reduced(full, rank)
    assert torch.linalg.matrix_rank(found[:-1]) == rank
    rows = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    distance = (rows @ (full - found)).square().sum()
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        step = 0.05 * torch.randn(found.shape, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd((found + step)[:-1], full_matrices=False)
        other = torch.cat([(u[:, :rank] * s[:rank]) @ v[:rank], (found + step)[-1:]])
        assert (rows @ (full - other)).square().sum() >= distance
    torch.testing.assert_close(sums.reduced(full, 4), full)


def test_noise_gets_no_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 30, generator=generator)
    error = torch.randn(12, 3, generator=generator)
    error -= (error[::2].mean(0) + error[1::2].mean(0)) / 2
    total = error.double().square().sum().item()
    weights = solve(halves([x], [error]), None)
    assert (weights is None) == (chosen(x, error, None)[1] >= total)
    assert solve(halves([x], [torch.zeros(12, 3)]), None) is None
    assert solve(halves([x[:1]], [error[:1]]), None) is None  # one sample leaves nothing to judge it by


def heads_of(model: nn.Module) -> list[str]:
    return [site.name for site in sites(model) if site.role == "head"]


def read(model: nn.Module, images: Tensor, name: str) -> Rows:
    """What a head is fed, after its input's quantizer, and returns, by a plain hook."""
    found: list[Rows] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _m, args, out: found.append((args[0], out)))
    model(images)
    hook.remove()
    return found[0]


def prepared(kind: str, count: int = 60) -> tuple[nn.Module, Tensor, dict[str, SiteResult]]:
    model, few = ready(kind)
    images = images_for(few, count)
    return model, images, calibrate(model, quantizers.create("minmax", Bits.parse("w3a4")), images, ENGINE)


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("kind", ["vit", "deit", "swin"])
def test_the_readout_is_the_regression_on_what_the_compensated_model_reads(kind: str, stream: Any) -> None:
    model, images, results = prepared(kind)
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    layers = Compensation(("layer",), "sink", stream, dtype="float32")
    both = Compensation(("layer", "readout"), "sink", stream, dtype="float32", budget=1e6)
    compensate(plain, results, layers, images, ENGINE)
    report = compensate(twin, results, both, images, ENGINE)
    mapped = 0
    for name in heads_of(model):
        x, output = read(plain, images, name)
        error = read(model, images, name)[1] - output
        expected, residual = chosen(x, error, None)
        found = map_of(twin.get_submodule(name))
        rows = [s for s in report.sites if s.site == name and s.scope == "readout"]
        assert len(rows) == 1
        if residual >= error.double().square().sum():
            assert found is None and rows[0].bias_parameters == 0
            continue
        assert found is not None
        mapped += 1
        wanted = output + x @ expected[:-1].float() + expected[-1].float()
        torch.testing.assert_close(read(twin, images, name)[1], wanted, atol=2e-3, rtol=2e-3)
        assert rows[0].bias_parameters == found.size == expected.numel()
    assert mapped
    before, after = ((model(images) - m(images)).square().mean() for m in (plain, twin))
    assert after < before


@pytest.mark.parametrize("method", ["bias", "affine"])
def test_alone_and_behind_every_method_it_lowers_the_logits_error(method: Any) -> None:
    model, images, results = prepared("vit")
    scope = ("layer", "readout") if method == "affine" else ("readout",)
    errors = []
    for settings in (Compensation(scope[:-1], method=method), Compensation(scope, method=method)):
        twin = copy.deepcopy(model)
        compensate(twin, results, settings, images, ENGINE)
        errors.append((model(images) - twin(images)).square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("granularity", ["channel", "lowrank"])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_the_budget_limits_the_rank(kind: str, granularity: Any) -> None:
    """Half of the budget at most is the readout's, of all heads together; a low-rank bias takes what it leaves."""
    model, images, results = prepared(kind)
    none = compensate(copy.deepcopy(model), results, Compensation(), None, ENGINE)
    heads = [model.get_submodule(name) for name in heads_of(model)]
    mapped = 0
    for budget in (0.01, 0.1, 0.4, 1.5):
        settings = Compensation(("layer", "readout"), granularity, budget=budget, kinds=("linear",))
        twin = copy.deepcopy(model)
        report = compensate(twin, results, settings, images, ENGINE)
        values = SHARE * budget * report.weights / 16 / len(heads)
        for name, head in zip(heads_of(model), heads, strict=True):
            found, rank = map_of(twin.get_submodule(name)), most_rank(head, values)
            assert found is None or (found.size == map_size(head, rank) <= values)
            mapped += found is not None
        if granularity == "lowrank":
            assert report.bits_per_weight <= none.bits_per_weight + budget
    assert mapped


def test_a_map_of_low_rank_stores_factors() -> None:
    x, error = random_rows()
    sums = RidgeSums(6, 4)
    sums.add(x, error)
    weights = sums.reduced(sums.solve(), 1)
    dense, factored = LinearMap(weights, torch.float32), LinearMap(weights, torch.float32, 1)
    torch.testing.assert_close(factored.extra((x,), {}), dense.extra((x,), {}))
    assert (dense.size, factored.size) == (6 * 4 + 4, 6 + 4 + 4)
    head = nn.Linear(6, 4)
    assert [most_rank(head, values) for values in (13, 14, 24, 27, 28)] == [0, 1, 2, 2, None]
    assert [map_size(head, rank) for rank in (0, 1, 2, None)] == [0, 14, 24, 28]


def test_a_language_model_has_no_readout() -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 60, (3, 8))
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    with pytest.raises(UserError, match=r"^bc\.scope: there is no 'readout'"):
        compensate(model, results, PRESETS["readout"], ids, ENGINE)
