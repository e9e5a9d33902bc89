"""A race finds what scoring all candidates on all rows finds; a sampled one about that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import bc.turns
from bc.quantizers.base import SiteSamples
from bc.racing import SampledRace, Start
from bc.search import SiteSearch
from bc.site_calibration import columns_of
from bc.sites import Site
from tests.bc.test_search import SITES, conv_site, linear_site, matmul_site, searcher


def many_tokens(metric: str, heavy: bool = False, seed: int = 0) -> SiteSamples:
    """A Linear with 2,048 tokens, of which a few matter most if it is heavy."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 128, 24, generator=g) * torch.rand(24, generator=g) * 3
    weight, bias = torch.randn(30, 24, generator=g), torch.randn(30, generator=g)
    output = F.linear(x, weight, bias)
    gradient = torch.randn(output.shape, generator=g)
    if heavy:
        gradient = gradient * torch.randn(16, 128, 1, generator=g).mul(3).exp()
        gradient[:, 100:] = 0
    site = linear_site("qkv", out=30, dtype=torch.float32)
    return replace(site, weight=weight, bias=bias, inputs=(x,), output=output, gradient=gradient)


def best_by_all(search: SiteSearch, index: int) -> tuple[Tensor, Tensor]:
    """Scores of all candidates by group, and the best."""
    scores = search.scores(index, direct=True)
    if search.operands[index].choice.numel() == 1:
        scores = scores.mean(1, keepdim=True)
    return scores, scores.max(0).values


@pytest.mark.parametrize("metric", ["mse", "cosine", "fisher"])
@pytest.mark.parametrize("kind", ["qkv", "fc2", "qk", "av", "conv", "many", "heavy"])
@pytest.mark.parametrize("bits", ["w3a3", "w8a8"])
def test_a_race_finds_the_best_of_all(kind: str, metric: str, bits: str) -> None:
    site = SITES[kind]() if kind in SITES else many_tokens(metric, kind == "heavy")
    q = searcher(metric=metric, bits=bits, candidates=40, low=0.01)
    search = SiteSearch(site, q.operands(site), metric, 512)
    for _ in range(2):
        for index, operand in enumerate(search.operands):
            if operand.candidates is None:
                continue
            scores, best = best_by_all(search, index)
            operand.choice = search.choose(index)
            found = scores.gather(0, operand.choice.unsqueeze(0))[0]
            unit = 1e-4 if site.output.dtype == torch.float32 else 1e-9
            loss = (1 - best if metric == "cosine" else -best).clamp(min=1e-12)
            assert bool((best - found <= unit * loss).all())


@pytest.mark.parametrize("metric", ["mse", "cosine", "fisher"])
@pytest.mark.parametrize("seed", range(4))
def test_a_sampled_race_finds_about_the_best(metric: str, seed: int) -> None:
    site = many_tokens(metric, seed=seed)
    q = searcher(metric=metric, bits="w4a4", candidates=100)
    search = SiteSearch(site, q.operands(site), metric, 512, "fast")
    for index in (0, 1):
        operand = search.operands[index]
        assert operand.candidates is not None
        start = Start(search.turn(index), search.objective, operand.candidates, operand.chosen)
        assert isinstance(start.race(fast=True), SampledRace) is (index == 1 or metric == "fisher")
        scores, best = best_by_all(search, index)
        operand.choice = search.choose(index)
        found = scores.gather(0, operand.choice.unsqueeze(0))[0]
        assert bool((best - found <= 0.005 * (1 - best if metric == "cosine" else -best)).all())


def test_a_sampled_race_looks_at_less(monkeypatch: pytest.MonkeyPatch) -> None:
    work = dict.fromkeys(("exact", "fast"), 0)
    site = many_tokens("mse")
    original = bc.turns.Turn.sums
    for mode in work:

        def counted(self: Any, parameters: Tensor, rows: Tensor, mode: str = mode) -> Any:
            work[mode] += len(parameters) * len(rows)
            return original(self, parameters, rows)

        monkeypatch.setattr(bc.turns.Turn, "sums", counted)
        q = searcher(metric="mse", candidates=100)
        SiteSearch(site, q.operands(site), "mse", 512, mode).choose(1)
    assert work["fast"] < work["exact"] / 2 < 101 * 2048 / 2


def test_rows_without_gradient_are_not_looked_at() -> None:
    site = many_tokens("fisher", heavy=True)
    q = searcher(metric="fisher")
    turn = SiteSearch(site, q.operands(site), "fisher", 512).turn(1)
    assert turn.relevant().tolist() == [i * 128 + j for i in range(16) for j in range(100)]


@pytest.mark.parametrize("metric", ["mse", "cosine", "fisher"])
@pytest.mark.parametrize("granularity", ["paper", "tensor"])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_is_a_product_of_patches(metric: str, granularity: str, padding: int) -> None:
    site = conv_site()
    module = nn.Conv2d(3, 5, 4, stride=3, padding=padding).double().requires_grad_(False)
    assert site.weight is not None
    module.weight.copy_(site.weight)
    module.bias = nn.Parameter(site.bias, requires_grad=False)
    output = module(site.inputs[0])
    site = replace(
        site,
        output=output,
        gradient=torch.rand_like(output),
        forward=lambda w, inputs: F.conv2d(inputs[0], w, module.bias, stride=3, padding=padding),  # type: ignore[arg-type]
    )
    columns = columns_of(Site("patch_embed.proj", module, "conv", "patch_embed"))
    assert columns is not None
    q = searcher(metric=metric, weight_granularity=granularity)
    direct = SiteSearch(site, q.operands(site), metric, 64).scores(0)
    product = SiteSearch(replace(site, columns=columns), q.operands(site), metric, 64).scores(0)
    torch.testing.assert_close(product, direct, rtol=1e-9, atol=1e-12)


def test_a_convolution_that_is_no_product_keeps_its_forward() -> None:
    for module in (nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 4, 2, padding="same")):
        assert columns_of(Site("conv", module, "conv", "patch_embed")) is None
    assert columns_of(Site("fc1", nn.Linear(2, 2), "linear", "fc1")) is None


def test_temporaries_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a piece of errors needs is within the budget, whatever is searched."""
    budget = 2**20
    for site in (many_tokens("cosine"), matmul_site(dtype=torch.float32)):
        q = searcher(metric="cosine")
        search = SiteSearch(site, q.operands(site), "cosine", 1)
        for index in (0, 1):
            turn = search.turn(index, direct=True)
            original = turn.reduce
            largest = 0

            def seen(error: Tensor, *rest: Any, original: Any = original) -> Any:
                nonlocal largest
                largest = max(largest, error.numel() * error.element_size())
                return original(error, *rest)

            monkeypatch.setattr(turn, "reduce", seen)
            candidates = search.operands[index].candidates
            assert candidates is not None
            turn.sums(candidates, turn.relevant())
            assert largest <= budget


def test_fast_is_recorded_and_exact_is_not() -> None:
    site = linear_site("fc1", dtype=torch.float32)
    for name in ("base_ptq", "noisyquant"):
        notes = {}
        for mode in ("exact", "fast"):
            q: Any = searcher(name, "w4a4", search=mode) if name == "base_ptq" else _noisy(mode)
            notes[mode] = q.quantize_site(site).notes
        assert notes["fast"]["search"] == "fast" and "search" not in notes["exact"]


def _noisy(mode: str) -> Any:
    from bc.quantizers import create
    from bc.settings import Bits

    return create("noisyquant", Bits(4, 4), search=mode)
