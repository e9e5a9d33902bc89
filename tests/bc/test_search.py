"""The candidate search against loops over all candidates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from bc.errors import QuantizationError, UserError
from bc.operands import scale_factors
from bc.quantizers import create
from bc.quantizers.apq_vit import block_score
from bc.quantizers.base import SiteQuantizer, SiteSamples
from bc.quantizers.base_ptq import SearchQuantizer
from bc.racing import Objective
from bc.search import SiteSearch
from bc.settings import Bits
from bc.turns import Sums

METRICS = ("mse", "cosine", "fisher", "self_kl")


def linear_site(role: str = "qkv", seed: int = 0, out: int = 6, dtype: torch.dtype = torch.float64) -> SiteSamples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 5, 7, generator=g, dtype=dtype) * torch.rand(7, generator=g, dtype=dtype) * 3
    weight = torch.randn(out, 7, generator=g, dtype=dtype) * (torch.rand(out, 1, generator=g, dtype=dtype) + 0.1)
    bias = torch.randn(out, generator=g, dtype=dtype)
    output = F.linear(x, weight, bias)
    gradient = torch.randn(output.shape, generator=g, dtype=dtype)

    def forward(w: torch.Tensor | None, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert w is not None
        return F.linear(inputs[0], w, bias)

    return SiteSamples(f"block.{role}", "linear", role, 2, weight, bias, (x,), output, gradient, forward)


def matmul_site(role: str = "matmul_qk", seed: int = 0, dtype: torch.dtype = torch.float64) -> SiteSamples:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 3, 5, 6, generator=g, dtype=dtype)
    if role == "matmul_av":
        a = torch.randn(4, 3, 5, 5, generator=g, dtype=dtype).mul(3).softmax(-1)
    b = torch.randn(4, 3, a.shape[-1], 5, generator=g, dtype=dtype)
    output = a @ b
    gradient = torch.randn(output.shape, generator=g, dtype=dtype)
    return SiteSamples(
        f"block.{role}", "matmul", role, 3, None, None, (a, b), output, gradient, lambda _, x: x[0] @ x[1]
    )


def conv_site(seed: int = 0, dtype: torch.dtype = torch.float64) -> SiteSamples:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=g, dtype=dtype)
    weight = torch.randn(5, 3, 4, 4, generator=g, dtype=dtype)
    bias = torch.randn(5, generator=g, dtype=dtype)
    output = F.conv2d(x, weight, bias, stride=4)
    gradient = torch.randn(output.shape, generator=g, dtype=dtype)

    def forward(w: torch.Tensor | None, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        assert w is not None
        return F.conv2d(inputs[0], w, bias, stride=4)

    return SiteSamples("patch_embed.proj", "conv", "patch_embed", 0, weight, bias, (x,), output, gradient, forward)


SITES = {
    "qkv": linear_site,
    "fc2": lambda: linear_site("fc2"),
    "qk": matmul_site,
    "av": lambda: matmul_site("matmul_av"),
    "conv": conv_site,
}


def searcher(name: str = "base_ptq", bits: str | Bits = "w3a3", **options: Any) -> SearchQuantizer:
    made = create(name, Bits.parse(bits), **options)
    assert isinstance(made, SearchQuantizer)
    return made


def parts_of(site: SiteSamples, y: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Output split by plain slicing."""
    if site.kind == "linear":
        return list(y.chunk(parts, dim=-1))
    return list(y.chunk(parts, dim=1))


def slow_score(site: SiteSamples, y_hat: torch.Tensor, metric: str, part: int, parts: int) -> float:
    y = parts_of(site, site.output, parts)[part].reshape(-1)
    z = parts_of(site, y_hat, parts)[part].reshape(-1)
    if metric == "cosine":
        return float(F.cosine_similarity(y, z, dim=0, eps=1e-300))
    error = z - y
    if metric != "mse":
        assert site.gradient is not None
        error = error * parts_of(site, site.gradient, parts)[part].reshape(-1)
    return -float(error.square().mean())


def run_with(site: SiteSamples, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if site.kind == "matmul":
        return left @ right
    assert site.weight is not None
    return site.forward(left.reshape(site.weight.shape), (right,))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("granularity", ["paper", "row", "tensor"])
@pytest.mark.parametrize("memory", [1, 512])
def test_scores_and_choice_by_brute_force(kind: str, metric: str, granularity: str, memory: int) -> None:
    site = SITES[kind]()
    q = searcher(metric=metric, weight_granularity=granularity, candidates=6)
    operands = q.operands(site)
    search = SiteSearch(site, operands, metric, memory)
    if memory == 1:
        search.budget = 4000  # several batches of images and of candidates
    parts = search.parts
    for index, operand in enumerate(operands):
        if operand.candidates is None:
            continue
        other = operands[1 - index].current()[0]
        slow = torch.empty(len(operand.candidates), parts, dtype=torch.float64)
        for c, row in enumerate(operand.candidates):
            mine = operand.apply(row.unsqueeze(0))[0]
            y_hat = run_with(site, *((mine, other) if index == 0 else (other, mine)))
            for part in range(parts):
                slow[c, part] = slow_score(site, y_hat, metric, part, parts)
        for direct in (False, True):
            torch.testing.assert_close(search.scores(index, direct), slow, rtol=1e-9, atol=1e-12)
        reduced = slow if operand.choice.numel() > 1 else slow.mean(1, keepdim=True)
        operand.choice = search.choose(index)
        picked = reduced.gather(0, operand.choice.unsqueeze(0))[0]
        torch.testing.assert_close(picked, reduced.max(0).values, rtol=1e-9, atol=1e-12)
    assert float(search.score()) == pytest.approx(float(picked.mean()), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bits", ["w2", "w3", "w4"])
def test_weights_alone_reach_the_best_of_all_candidates(metric: str, bits: str) -> None:
    site = linear_site("proj", seed=5)
    q = searcher(bits=bits, metric=metric)
    (weight, _), notes = q.search(site)
    assert weight.candidates is not None and site.weight is not None
    scale = float(site.weight.abs().max()) / (2 ** (int(bits[1:]) - 1) - 0.5)
    half = 2 ** (int(bits[1:]) - 1)
    best = -math.inf
    for factor in [1.0, *(0.5 + i * 0.7 / 100 for i in range(100))]:
        s = scale * factor
        y_hat = site.forward((site.weight / s).round().clamp(-half, half - 1) * s, site.inputs)
        best = max(best, slow_score(site, y_hat, metric, 0, 1))
    assert notes["score"] == pytest.approx(best, rel=1e-6)


def test_candidate_list() -> None:
    f = scale_factors(0.01, 1.2, 100)
    assert len(f) == 101 and f[0] == 1 and f[1] == pytest.approx(0.01) and f[-1] == pytest.approx(0.01 + 99 * 0.0119)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["base_ptq", "easyquant", "ptq4vit", "apq_vit"]),
    st.sampled_from(METRICS),
    st.sampled_from(list(SITES)),
    st.sampled_from([Bits(2, 2), Bits(4, 4), Bits(8, 8), Bits(3, 16), Bits(16, 3)]),
    st.integers(0, 1000),
)
def test_never_worse_than_minmax(name: str, metric: str, kind: str, bits: Bits, seed: int) -> None:
    if name == "apq_vit" and metric == "cosine":
        metric = "mse"
    makers = {"qkv": linear_site, "qk": matmul_site, "conv": conv_site}
    site = makers[kind](seed=seed, dtype=torch.float32) if kind in makers else SITES[kind]()
    q = searcher(name, bits, metric=metric, candidates=10)
    _, notes = q.search(site)
    assert notes["score"] >= notes["score_minmax"]
    again = SiteSearch(site, q.operands(site), metric, 64)  # all at min-max
    assert notes["score_minmax"] == pytest.approx(float(again.score()), rel=1e-5, abs=1e-12)


def test_each_step_raises_the_score() -> None:
    for kind, maker in SITES.items():
        q = searcher("easyquant", metric="mse", candidates=16)
        site = maker()
        scores = []
        for rounds in range(1, 5):
            search = SiteSearch(site, q.operands(site), "mse", 64)
            scores.append(search.run(rounds)["score"])
        assert scores == sorted(scores), kind


@pytest.mark.parametrize("metric", ["mse", "cosine"])
def test_quadratic_form_equals_direct_evaluation_in_fp32(metric: str) -> None:
    wide = matmul_site(dtype=torch.float32)
    a, b = (torch.cat([x] * 4, dim).contiguous() for x, dim in zip(wide.inputs, (2, 3), strict=True))
    wide = replace(wide, inputs=(a, b), output=a @ b)
    sites = [linear_site("qkv", out=30, dtype=torch.float32), linear_site("fc1", out=30, dtype=torch.float32), wide]
    for site in sites:
        q = searcher(bits="w4a4", metric=metric)
        search = SiteSearch(site, q.operands(site), metric, 64)
        quadratic = 0
        for index in (0, 1):
            turn = search.turn(index)
            quadratic += "Quadratic" in type(turn).__name__ or getattr(turn, "quadratic", False)
            torch.testing.assert_close(search.scores(index), search.scores(index, direct=True), rtol=1e-4, atol=1e-7)
        assert quadratic >= 1


def test_cosine_is_exact_where_it_is_nearly_one() -> None:
    site = linear_site("proj", dtype=torch.float32)
    noise = 1e-4 * torch.randn(site.output.shape, generator=torch.Generator().manual_seed(3))
    y, z = site.output.double().reshape(-1), (site.output + noise).double().reshape(-1)
    sums = Sums(*((r * v).sum().reshape(1, 1) for r, v in ((z - y, z - y), (z - y, y))))
    objective = Objective(site, "cosine", 1)
    got = float(objective.losses(sums, y.square().sum().reshape(1)))
    assert got == pytest.approx(1 - float(F.cosine_similarity(y, z, dim=0)), rel=1e-4)
    assert float(objective.scores(torch.tensor(got))) == pytest.approx(float(F.cosine_similarity(y, z, dim=0)))


def test_cosine_of_zero_outputs() -> None:
    objective = Objective(linear_site("proj"), "cosine", 1)
    zero, one = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    assert float(objective.losses(Sums(zero, zero), zero[0])) == 0
    assert float(objective.losses(Sums(one, zero), zero[0])) == 1


@pytest.mark.parametrize("metric", ["fisher", "self_kl"])
def test_zero_scores_are_refused_by_name(metric: str) -> None:
    for gradient in (None, torch.zeros(4, 5, 6, dtype=torch.float64)):
        site = linear_site()
        site.gradient = gradient
        with pytest.raises(QuantizationError, match=r"block\.qkv"):
            searcher("ptq4vit", metric=metric).quantize_site(site)
    site = linear_site(dtype=torch.float32)
    assert site.gradient is not None
    site.gradient = site.gradient * 1e-30  # its square is zero
    with pytest.raises(QuantizationError, match=r"block\.qkv.*zero for every candidate"):
        searcher("ptq4vit", metric=metric).quantize_site(site)


def test_exact_output_is_not_refused() -> None:
    site = linear_site()
    assert site.weight is not None
    site.weight.zero_()
    assert site.bias is not None
    site.output = site.bias.expand_as(site.output).clone()
    notes = searcher("ptq4vit", metric="fisher").quantize_site(site).notes
    assert notes["score"] == 0 == notes["score_minmax"]


def test_nan_is_refused_by_name() -> None:
    for name in ("base_ptq", "minmax", "repq_vit", "noisyquant"):
        site = linear_site("fc1")
        site.inputs[0][0, 0, 0] = math.nan
        with pytest.raises(QuantizationError, match=r"block\.fc1"):
            create(name, Bits.parse("w4a4")).quantize_site(site)  # type: ignore[attr-defined]


def test_options_are_checked() -> None:
    for name, options in (
        ("ptq4vit", {"metric": "hessian"}),
        ("ptq4vit", {"low": 2.0}),
        ("base_ptq", {"rounds": 0}),
        ("base_ptq", {"unknown": 1}),
        ("apq_vit", {"metric": "cosine"}),
        ("apq_vit", {"keep": 0.0}),
        ("noisyquant", {"base": "rtn"}),
        ("noisyquant", {"noise_high": 0.0}),
        ("minmax", {"weight_granularity": "paper"}),
        ("repq_vit", {"norm": "row"}),
        ("easyquant", {"weight_granularity": "group"}),
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            create(name, Bits.parse("w4a4"), **options)
    for name in ("minmax", "base_ptq", "repq_vit", "noisyquant"):
        with pytest.raises(UserError, match="group_size"):
            create(name, Bits(4, 4, 64))
        with pytest.raises(UserError, match="weight"):
            create(name, Bits(1, 4))


@pytest.mark.parametrize(
    ("name", "options", "needed"),
    [
        ("minmax", {}, False),
        ("repq_vit", {}, False),
        ("base_ptq", {}, False),
        ("ptq4vit", {}, True),
        ("ptq4vit", {"metric": "self_kl"}, True),
        ("ptq4vit", {"metric": "mse"}, False),
        ("apq_vit", {}, True),
        ("noisyquant", {}, False),
        ("noisyquant", {"base": "ptq4vit"}, True),
        ("noisyquant", {"base": "ptq4vit", "metric": "mse"}, False),
    ],
)
def test_needs_gradient(name: str, options: dict[str, Any], needed: bool) -> None:
    q = create(name, Bits(4, 4), **options)
    assert isinstance(q, SiteQuantizer)
    assert q.needs_gradient is needed
    assert isinstance(q.metric, str)  # type: ignore[attr-defined]


def test_block_score_by_hand() -> None:
    target, output = torch.zeros(2, 4), torch.tensor([[1.0, 2, 3, 0], [0, 0, 4, 1]])
    gradient = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0.5, 3]])
    assert block_score(output, target, None, 1.0) == -(14 + 17) / 2
    assert block_score(output, target, None, 0.5) == -(13 + 17) / 2
    assert block_score(output, target, gradient, 0.25) == -(9 + 9) / 2
