"""Positional biases that pay for what they know: shrinkage toward the channel bias, and low rank.

A positional bias has positions × channels values, each the mean over few samples, so much of it may be noise. Both
remedies work on three estimates of the same table: from all samples and from either half of them, whose difference
shows the noise. They are linear in the statistics, so the closed form of a Linear serves here too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    Var(A − B) = v (1/n_A + 1/n_B), averaged over the positions from ``leading`` on that both halves have seen.
    """
    both = (estimates.counts[1:] > 0).all(0)
    both[:leading] = False
    if not bool(both.any()):
        return torch.zeros(estimates.whole.shape[1], dtype=torch.float64, device=estimates.whole.device)
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
        base: fp32, shape (leading + 1, channels): rows of the first positions, and the row that the others share.
        left: fp32, shape (positions − leading, rank).
        right: fp32, shape (rank, channels).
    """

    base: Tensor
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.left.shape[1]

    def table(self) -> Tensor:
        """The positional table, fp32, shape (positions, channels)."""
        return torch.cat([self.base[:-1], self.base[-1] + self.left @ self.right])


def truncate(table: Tensor, leading: int, rank: int) -> LowRank:
    """The best approximation of a table in the least-squares sense (Eckart and Young, 1936).

    Args:
        table: Shape (positions, channels).
        leading: Rows that are kept as they are.
        rank: Rank of what remains after the mean of the others.
    """
    leading = min(leading, len(table) - 1)
    body = table[leading:].double()
    mean = body.mean(0, keepdim=True)
    u, s, v = torch.linalg.svd(body - mean, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    base = torch.cat([table[:leading].double(), mean])
    return LowRank(base.float(), (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float())


def low_rank(estimates: Estimates, leading: int, most: int) -> LowRank:
    """Low-rank table whose rank is chosen by the error on the half of the samples that it was not fitted on.

    Args:
        estimates: Of one bias.
        leading: Positions with a row of their own.
        most: Highest rank that the budget allows.
    """
    leading = min(leading, len(estimates.whole) - 1)
    errors = []
    for fitted, other in ((estimates.first, estimates.second), (estimates.second, estimates.first)):
        errors.append(_held_out(fitted[leading:].double(), other[leading:].double(), most))
    count = min(map(len, errors))
    total = torch.stack([e[:count] for e in errors]).sum(0)
    return truncate(estimates.whole, leading, int(total.argmin()))


def _held_out(fitted: Tensor, other: Tensor, most: int) -> Tensor:
    """Squared error of the truncations of rank 0 … ``most`` of one table against another, shape (ranks,).

    ‖O − T_r‖² = ‖O − mean‖² − Σ_{i ≤ r} (2 s_i uᵢᵀ(O − mean)vᵢ − s_i²), for the singular vectors are orthonormal.
    """
    mean = fitted.mean(0, keepdim=True)
    u, s, v = torch.linalg.svd(fitted - mean, full_matrices=False)
    rest = other - mean
    gains = 2 * s * ((u.T @ rest) * v).sum(1) - s.square()
    steps = torch.cat([gains.new_zeros(1), gains[: min(most, len(s))].cumsum(0)])
    return rest.square().sum() - steps
