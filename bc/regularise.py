"""Positional biases that pay for what they know: shrinkage toward the channel bias, and low rank.

A positional bias has positions × channels values, each the mean over few samples, so much of it may be noise. Both
remedies work on three estimates of the same table: from all samples and from either half of them, whose difference
shows the noise. They are linear in the statistics, so the closed form of a Linear serves here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EARLY = 2  # shares of the values left that a part may take


@dataclass(frozen=True)
class Estimates:
    """Positional tables of one bias from all samples and from two disjoint halves.

    Attributes:
        whole: fp32, shape (positions, channels).
        first: Of the first half.
        second: Of the second half.
        counts: Samples at each position behind each of the three, fp64, shape (3, positions).
    """

    whole: Tensor
    first: Tensor
    second: Tensor
    counts: Tensor


def noise(estimates: Estimates, leading: int) -> Tensor:
    """Variance of a single sample's value by channel, from the halves' difference; fp64, shape (channels,).

    Var(A − B) = v (1/n_A + 1/n_B), averaged over the positions from ``leading`` on that both halves have seen; infinite
    where there is none, for nothing is known of it then.
    """
    both = (estimates.counts[1:] > 0).all(0)
    both[:leading] = False
    if not bool(both.any()):
        return estimates.whole.new_full(estimates.whole.shape[1:], torch.inf, dtype=torch.float64)
    spread = (1 / estimates.counts[1, both] + 1 / estimates.counts[2, both])[:, None]
    difference = (estimates.first - estimates.second)[both].double()
    return (difference.square() / spread).mean(0)


def shrink(estimates: Estimates, leading: int) -> Tensor:
    """Empirical-Bayes (James–Stein) shrinkage of every position's bias toward its channel's.

    With b̂_p ~ N(b_p, v/n_p) and b_p ~ N(μ, τ²) the posterior mean is μ + τ² / (τ² + v/n_p) · (b̂_p − μ); v comes from
    the halves, τ² from the spread of the b̂_p beyond v/n_p (method of moments, not below 0). Efron and Morris, "Stein's
    estimation rule and its competitors: an empirical Bayes approach", JASA 1973.

    Args:
        estimates: Of one bias.
        leading: Positions that keep their own bias: their means are unlike the others', so they have no part in μ, τ².

    Returns:
        fp32, shape (positions, channels).
    """
    whole, count = estimates.whole.double(), estimates.counts[0].clamp(min=1e-12)
    rest = slice(min(leading, len(whole)), None)
    if len(whole[rest]) < 2:
        return estimates.whole
    seen = estimates.counts[0, rest] > 0
    table, n = whole[rest][seen], count[rest][seen][:, None]
    if len(table) < 2:
        return estimates.whole
    mean = (table * n).sum(0) / n.sum(0)
    sampling = noise(estimates, leading) / n
    between = ((table - mean).square().sum(0) / (len(table) - 1) - sampling.mean(0)).clamp(min=0)
    weight = torch.where(between + sampling > 0, between / (between + sampling).clamp(min=1e-300), 0.0)
    out = whole.clone()
    body = mean.expand(len(out[rest]), -1).clone()
    body[seen] = mean + weight * (table - mean)
    out[rest] = body
    return out.float()


@dataclass(frozen=True)
class LowRank:
    """A positional table as few own rows, one shared row, and a product.

    Attributes:
        base: fp32, shape (own + 1, channels): rows of the first positions, and the row that the others share.
        left: fp32, shape (positions − own, rank).
        right: fp32, shape (rank, channels).
    """

    base: Tensor
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.left.shape[1]

    @property
    def own(self) -> int:
        """Leading positions with a row of their own."""
        return len(self.base) - 1

    @property
    def size(self) -> int:
        """Values besides the shared row."""
        return self.base[:-1].numel() + self.left.numel() + self.right.numel()

    def table(self) -> Tensor:
        """The positional table, fp32, shape (positions, channels)."""
        return torch.cat([self.base[:-1], self.base[-1] + self.left @ self.right])

    def owning(self, own: int) -> LowRank:
        """The same table with more rows of their own."""
        assert own >= self.own
        base = torch.cat([self.table()[:own], self.base[-1:]])
        return LowRank(base, self.left[own - self.own :], self.right)


def truncate(table: Tensor, leading: int, rank: int, own: int | None = None) -> LowRank:
    """The best approximation of a table in the least-squares sense (Eckart and Young, 1936).

    Args:
        table: Shape (positions, channels).
        leading: Rows that have no part in the mean of the others, which they share.
        rank: Rank of what remains after the mean.
        own: Rows that are kept as they are, at most ``leading``, which is the default.
    """
    leading = min(leading, len(table) - 1)
    own = leading if own is None else min(own, leading)
    table = table.double()
    mean = table[leading:].mean(0, keepdim=True)
    left, right = factors(table[own:] - mean, rank)
    size = left.norm(dim=0) * right.norm(dim=1)
    balance = torch.where(size > 0, size.sqrt() / left.norm(dim=0).clamp(min=1e-150), 1.0)
    base = torch.cat([table[:own], mean])
    return LowRank(base.float(), (left * balance).float(), (right / balance[:, None]).float())


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading terms of a matrix's singular value decomposition, shapes (rows, rank) and (rank, columns).

    From the eigenvectors of the smaller Gram matrix, which take a fraction of the decomposition's time. Small singular
    values are less exact that way, but the product is a projection of the matrix whatever they are.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    rank = min(rank, len(wide))
    if rank == 0:
        return matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1])
    vectors = torch.linalg.eigh(wide @ wide.T)[1].flip(1)[:, :rank]
    return (matrix @ vectors, vectors.T) if tall else (vectors, vectors.T @ matrix)


def low_rank(estimates: Estimates, leading: int, values: float) -> LowRank:
    """Low-rank table, chosen by the error on the half of the samples that it was not fitted on.

    The leading positions have rows of their own, or are a part of the product: whichever errs less for its size.

    Args:
        estimates: Of one bias.
        leading: Positions whose means are unlike the others'.
        values: How many values it may store besides the row that the positions share.
    """
    positions, channels = estimates.whole.shape
    leading, values = min(leading, positions - 1), max(0, values)
    best = (float("inf"), 0, 0)
    for own in sorted({0, leading}, reverse=True):
        most = int((values - own * channels) // (positions - own + channels))
        if most < 0:
            continue
        halves = (estimates.first, estimates.second)
        errors = [_held_out(a.double(), b.double(), leading, own, most) for a, b in (halves, halves[::-1])]
        count = min(map(len, errors))
        total = torch.stack([e[:count] for e in errors]).sum(0)
        rank = int(total.argmin())
        best = min(best, (float(total[rank]), own, rank), key=lambda found: found[0])
    return truncate(estimates.whole, leading, best[2], best[1])


def _held_out(fitted: Tensor, other: Tensor, leading: int, own: int, most: int) -> Tensor:
    """Squared error of the truncations of rank 0 … ``most`` of one table against another, shape (ranks,).

    ‖O − T_r‖² = ‖O − mean‖² − Σ_{i ≤ r} (2 lᵢᵀ(O − mean)rᵢ − ‖lᵢ‖²‖rᵢ‖²), for the products lᵢrᵢᵀ are orthogonal.
    """
    mean = fitted[leading:].mean(0, keepdim=True)
    left, right = factors(fitted[own:] - mean, most)
    rest = other[own:] - mean
    gains = 2 * ((left.T @ rest) * right).sum(1) - left.square().sum(0) * right.square().sum(1)
    steps = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
    return (other[:own] - fitted[:own]).square().sum() + rest.square().sum() - steps


class Allowance:
    """Values that the biases of a model may store, dealt out to its sites in the order in which they are fitted.

    A part of the model may take ``EARLY`` times what is its by its weights of all that is left and not needed: an error
    that is made early passes through everything behind. A site gets a share of that by what a row costs there, so that
    all could have as many.

    Args:
        values: Of all biases.
        weights: Of all parts.

    Attributes:
        left: Values that are left to the part under way.
        costs: Of the sites that are still to come there.
    """

    def __init__(self, values: float, weights: int) -> None:
        self._pool, self._weights = values, weights  # of the parts to come
        self.left = 0.0
        self.costs: list[int] = []

    def open(self, weights: int, costs: Sequence[int], needs: int = 0) -> None:
        """Go on to a part.

        Args:
            weights: Of the part.
            costs: Values of a row, of each of its sites.
            needs: Values that it takes whatever its share: so many for its weights are left to the parts to come.
        """
        pool = self._pool + self.left
        fair = pool * weights / max(1, self._weights)
        self._weights -= weights
        behind = needs * self._weights / max(1, weights)
        self.left = min(fair + (EARLY - 1) * max(0.0, fair - needs), max(fair, pool - behind))
        self._pool = pool - self.left
        self.costs = list(costs)

    def share(self) -> float:
        """Values for the next site; what is left where none was expected."""
        total = sum(self.costs)
        if not total:
            return max(0.0, self.left)
        return max(0.0, self.left) * self.costs.pop(0) / total

    def take(self, values: int) -> None:
        """Note what the site took."""
        self.left -= values
