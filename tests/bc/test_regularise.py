"""Shrinkage and low rank against simulation with known variances, and against the singular value decomposition."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from bc.compensation import BiasCompensation, attach, compensation_of
from bc.regularise import Allowance, Estimates, LowRank, low_rank, noise, shrink, truncate
from bc.sinks import find_sinks
from bc.statistics import PositionSums

POSITIONS, CHANNELS = 40, 25


def draw(truth: Tensor, samples: int, deviation: float, generator: torch.Generator) -> PositionSums:
    """Samples of a table with noise, as the engine adds them: batches of unequal size."""
    sums = PositionSums(*truth.shape, halves=True)  # type: ignore[misc]
    values = truth + deviation * torch.randn(samples, *truth.shape, generator=generator)
    for part in values.split(5):
        sums.add(part, torch.arange(len(truth))[None])
    return sums


def test_halves_are_disjoint_and_add_up() -> None:
    values = torch.randn(11, 6, 3)
    sums = PositionSums(6, 3, halves=True)
    plain = PositionSums(6, 3)
    for part in (values[:4], values[4:5], values[5:6], values[6:]):
        sums.add(part, torch.arange(6)[None])
        plain.add(part, torch.arange(6)[None])
    assert sums.second is not None
    torch.testing.assert_close(sums.second.mean("positional"), values[1::2].mean(0))
    torch.testing.assert_close(sums.mean("positional"), plain.mean("positional"))
    assert torch.equal(sums.first().count + sums.second.count, plain.count)


def test_padding_stays_out_of_the_halves() -> None:
    values, valid = torch.randn(4, 5, 2), torch.ones(4, 5, dtype=torch.bool)
    valid[3, :3] = False
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    sums = PositionSums(5, 2, halves=True)
    sums.add(values, positions, valid)
    assert sums.second is not None
    assert sums.second.count.tolist() == [2, 2, 1, 1, 1]
    torch.testing.assert_close(sums.second.mean("positional")[0], (values[1, 0] + values[3, 3]) / 2)


def test_no_half_splits_an_image() -> None:
    """Of three windows an image, those of the second and fourth image, whatever the batches are."""
    values = torch.randn(12, 5, 2)
    for cuts in ([12], [3, 9], [6, 3, 3]):
        sums = PositionSums(5, 2, halves=True)
        for part in values.split(cuts):
            sums.add(part, torch.arange(5)[None], run=3)
        assert sums.second is not None
        torch.testing.assert_close(sums.second.mean("positional"), values[[3, 4, 5, 9, 10, 11]].mean(0))


def test_noise_is_the_variance_of_a_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2000, 3, generator=generator)
    for deviation in (0.5, 2.0):
        found = noise(draw(truth, 8, deviation, generator).estimates(), 0)
        torch.testing.assert_close(found, torch.full((3,), deviation**2, dtype=torch.float64), rtol=0.15, atol=0)


@pytest.mark.parametrize(("spread", "factor"), [(0.0, 3.0), (0.3, 1.25), (3.0, 1.02)])
def test_shrinkage_is_near_the_best_weight_and_never_hurts(spread: float, factor: float) -> None:
    """Against the oracle that knows τ² and v, over many channels."""
    generator = torch.Generator().manual_seed(1)
    samples, deviation = 8, 1.0
    errors = torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        truth = torch.randn(1, CHANNELS, generator=generator) + spread * torch.randn(
            POSITIONS, CHANNELS, generator=generator
        )
        sums = draw(truth, samples, deviation, generator)
        raw, channel = sums.mean("positional"), sums.mean("channel").expand(POSITIONS, -1)
        best = spread**2 / (spread**2 + deviation**2 / samples)
        candidates = (shrink(sums.estimates(), 0), channel + best * (raw - channel), raw, channel)
        errors += torch.stack([(c - truth).double().square().mean() for c in candidates])
    ours, oracle, positional, shared = errors.tolist()
    assert ours < factor * oracle
    assert ours < (1.001 if spread else 0.1) * positional
    assert spread == 0 or ours < shared


def test_a_leading_row_keeps_its_own_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    truth = torch.zeros(POSITIONS, CHANNELS)
    truth[0] = 100.0
    sums = draw(truth, 6, 1.0, generator)
    found = shrink(sums.estimates(), 1)
    assert torch.equal(found[0], sums.mean("positional")[0])
    assert found[1:].abs().mean() < 0.3 * sums.mean("positional")[1:].abs().mean()


@pytest.mark.parametrize("leading", [0, 1, 2])
def test_truncation_is_the_svds(leading: int) -> None:
    table = torch.randn(POSITIONS, CHANNELS, generator=torch.Generator().manual_seed(3))
    body = table[leading:]
    mean = body.mean(0)
    u, s, v = torch.linalg.svd(body - mean)
    for rank in (0, 1, 5, CHANNELS):
        found = truncate(table, leading, rank)
        expected = mean + u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
        torch.testing.assert_close(found.table()[leading:], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.table()[:leading], table[:leading])
    torch.testing.assert_close(truncate(table, leading, CHANNELS).table(), table, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_rank_is_found_by_the_other_half(rank: int) -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = torch.randn(POSITIONS, rank, generator=generator), torch.randn(rank, CHANNELS, generator=generator)
    truth = torch.randn(1, CHANNELS, generator=generator) + left @ right
    estimates = draw(truth, 16, 0.7, generator).estimates()
    each = POSITIONS + CHANNELS  # values of a product of rank 1
    assert low_rank(estimates, 0, CHANNELS * each).rank == rank
    assert low_rank(estimates, 0, 2 * each - 1).rank == min(rank, 1)
    assert low_rank(estimates, 0, each - 1).rank == low_rank(estimates, 0, -5).rank == 0

    def brute(most: int) -> int:
        errors = []
        for r in range(most + 1):
            ab = (truncate(estimates.first, 0, r).table() - estimates.second).square().sum()
            ba = (truncate(estimates.second, 0, r).table() - estimates.first).square().sum()
            errors.append((ab + ba).item())
        return errors.index(min(errors))

    assert low_rank(estimates, 0, 8 * each).rank == brute(8)


@pytest.mark.parametrize("outlier", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("values", [10, CHANNELS, POSITIONS + CHANNELS, 3 * (POSITIONS + CHANNELS)])
def test_leading_rows_stay_apart_only_where_that_is_the_better_buy(values: int, outlier: float) -> None:
    generator = torch.Generator().manual_seed(6)
    truth = torch.randn(POSITIONS, 2, generator=generator) @ torch.randn(2, CHANNELS, generator=generator)
    truth[0] += outlier * torch.randn(CHANNELS, generator=generator)
    estimates = draw(truth, 16, 0.7, generator).estimates()
    errors = {}
    for own in (0, 1):
        for rank in range(4):
            if own * CHANNELS + rank * (POSITIONS - own + CHANNELS) <= values:
                ab = (truncate(estimates.first, 1, rank, own).table() - estimates.second).square().sum()
                ba = (truncate(estimates.second, 1, rank, own).table() - estimates.first).square().sum()
                errors[own, rank] = (ab + ba).item()
    found = low_rank(estimates, 1, values)
    assert (found.own, found.rank) == min(errors, key=lambda key: errors[key])
    assert found.size <= values
    torch.testing.assert_close(found.base[-1], estimates.whole[1:].mean(0))  # whatever the first row is


def test_a_table_keeps_its_values_when_more_rows_are_set_apart() -> None:
    table = torch.randn(POSITIONS, CHANNELS, generator=torch.Generator().manual_seed(7))
    found = truncate(table, 2, 3, 0)
    for own in (0, 1, 2):
        torch.testing.assert_close(found.owning(own).table(), found.table())
        assert found.owning(own).own == own


@pytest.mark.parametrize("more", [0, 1, 400, 100_000])
@pytest.mark.parametrize("sizes", [[100] * 8, [10, *[100] * 6, 40], [300, 100, 20]])
def test_what_later_parts_need_is_left_to_them(sizes: list[int], more: int) -> None:
    """Where a part needs 5 values for 10 weights, and all take all that they may, none gets less than it needs."""
    allowance = Allowance(sum(sizes) / 2 + more, sum(sizes))
    for size in sizes:
        allowance.open(size, [1], size // 2)
        assert allowance.left >= size / 2 - 1e-9
        allowance.take(int(allowance.share()))


@pytest.mark.parametrize("seed", range(20))
def test_an_allowance_is_never_exceeded(seed: int) -> None:
    """A part gets twice its share by weights of all that is left, the last one all of it."""
    draw = random.Random(seed)
    weights = [draw.randrange(10, 10_000) for _ in range(5)]
    given, taken = 0.01 * sum(weights), 0
    allowance = Allowance(given, sum(weights))
    for part, size in enumerate(weights):
        costs = [draw.randrange(1, 100) for _ in range(draw.randrange(0, 6))]
        allowance.open(size, costs)
        mine = (given - taken) * min(1.0, 2 * size / sum(weights[part:]))
        for i, cost in enumerate(costs):
            share = allowance.share()
            assert share == pytest.approx(mine * cost / sum(costs[i:]))
            values = int(share * draw.random())
            allowance.take(values)
            taken, mine = taken + values, mine - values
        assert taken <= given
    assert allowance.share() == pytest.approx(given - taken)  # all that is left


def test_a_low_rank_bias_adds_its_table_and_nothing_beyond_the_fitted_length() -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(5))
    found = truncate(table, 1, 2)
    module = nn.Identity()
    attach(module, found, "lowrank", dtype=torch.float32)
    x = torch.zeros(2, 12, 4)
    torch.testing.assert_close(module(x)[:, :9], found.table().expand(2, -1, -1))
    torch.testing.assert_close(module(x)[:, 9:], found.base[-1].expand(2, 3, -1))
    child = compensation_of(module)
    assert isinstance(child, BiasCompensation) and child.size == 2 * 4 + 8 * 2 + 2 * 4
    attach(module, truncate(table, 1, 3), "lowrank", dtype=torch.float32)  # the second is added to the first
    torch.testing.assert_close(module(x)[0, :9], found.table() + truncate(table, 1, 3).table(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [(0, 0), (0, 2), (1, 0), (1, 2)])
@pytest.mark.parametrize("second", [(0, 0), (0, 2), (1, 0), (1, 2)])
def test_low_rank_biases_add_up_whatever_rows_they_set_apart(first: tuple[int, int], second: tuple[int, int]) -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(8))
    module = nn.Identity()
    one, two = (truncate(table * scale, 1, rank, own) for scale, (own, rank) in ((1, first), (3, second)))
    attach(module, one, "lowrank", dtype=torch.float32)
    attach(module, two, "lowrank", dtype=torch.float32)
    x = torch.zeros(2, 12, 4)
    torch.testing.assert_close(module(x)[0, :9], one.table() + two.table(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(x)[0, 9:], (one.base[-1] + two.base[-1]).expand(3, -1))


def test_rank_zero_is_a_channel_bias() -> None:
    module = nn.Identity()
    child = attach(module, LowRank(torch.ones(1, 4), torch.zeros(5, 0), torch.zeros(0, 4)), "lowrank")
    assert child.shared and child.size == 4


def test_sinks_are_the_leading_outliers() -> None:
    table = torch.ones(30, 5)
    table[0], table[1], table[7] = 50.0, 20.0, 80.0  # the last is an outlier, but not a leading one
    for leading, expected in (([0, 1], 2), ([0], 1), ([], 0)):
        rows = torch.ones_like(table)
        rows[leading] = table[leading]
        rows[7] = table[7]
        sums = PositionSums(30, 5)
        sums.add(rows[None], torch.arange(30)[None])
        assert find_sinks(sums) == expected


@pytest.mark.parametrize("leading", [0, 1, 3])
def test_sinks_are_found_behind_a_norm(leading: int) -> None:
    """Where all vectors have one length, by what they have in common over samples."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(32, 40, 64, generator=generator)
    rows[:, :leading] = torch.randn(leading, 64, generator=generator)
    sums = PositionSums(40, 64)
    sums.add(rows / rows.norm(dim=-1, keepdim=True), torch.arange(40)[None])
    assert find_sinks(sums) == leading


def test_estimates_are_linear_in_the_statistics() -> None:
    sums = draw(torch.randn(6, 3), 5, 1.0, torch.Generator().manual_seed(6))
    weight = torch.randn(4, 3)
    found = sums.estimates(lambda mean: mean @ weight.T)
    plain = sums.estimates()
    assert isinstance(found, Estimates)
    for name in ("whole", "first", "second"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name) @ weight.T)
