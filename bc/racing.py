"""The best of many candidates, without scoring the hopeless ones to the end.

A loss is a sum over rows of terms that are not negative, so that a candidate whose sum over some rows is more than the
whole loss of another is out. The rows where the current choice errs most are looked at first. What is found is what
scoring all candidates on all rows finds, up to candidates that are equal within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bc.errors import QuantizationError
from bc.quantizers.base import SiteSamples
from bc.turns import Sums, Turn

GRADIENT_METRICS = ("fisher", "self_kl")
ROUNDING = 1e-5  # relative: a candidate is out only if it is worse by more than the sums' rounding
TIE = 16  # units in the last place of the sums: candidates that differ by less are equal
FIRST, MOST = 32, 8  # the first rows are 1/32 of all, the next twice as many, and so on, up to 1/8 at a time
SAMPLES, STEP = 64, 27  # of the sampled race; the order in which they are looked at
SURE = 5.0  # standard errors by which a candidate is worse before it is given up: it is looked at often
LEAST_SEEN = 6  # samples before these are trusted; until then a candidate goes that seems worse by this factor:
HOPELESS = 2.0
ENOUGH = 0.0005  # of the loss, relative: less is not worth looking at more samples
LEAST_SAMPLE, MOST_GROUPS = 16, 16  # rows of a sample and groups for which the race is sampled
BLOCK_BYTES = 32 * 2**20  # of the output's rows that are looked at together


def angle_loss(sine: Tensor) -> Tensor:
    """1 − cos of an angle below a right one, from its sin²."""
    return sine / (1 + (1 - sine).sqrt())


class Objective:
    """Scores and losses of candidates of one site; a higher score and a lower loss are better.

    The scores, each a mean over the elements of a part: ``mse`` −(y − ŷ)²; ``fisher`` and ``self_kl`` −(g · (y − ŷ))²
    with g the site's gradient; ``cosine`` the cosine of the angle between the part's y and ŷ, over all images. The loss
    is the score's distance from that of the float output: minus the score, and for the cosine 1 minus the score.

    Attributes:
        weighted: Whether the gradient weighs the errors.
        angular: Whether it is the cosine.
    """

    def __init__(self, site: SiteSamples, metric: str, parts: int) -> None:
        self.metric, self.parts = metric, parts
        self.weighted, self.angular = metric in GRADIENT_METRICS, metric == "cosine"
        self.count = site.output.numel() / parts
        if self.weighted and (site.gradient is None or not bool(site.gradient.any())):
            raise QuantizationError(
                f"{site.name}: the {metric} metric needs a gradient at the output, and it is "
                f"{'missing' if site.gradient is None else 'zero everywhere'}; choose metric=mse or cosine"
            )

    def losses(self, sums: Sums, energy: Tensor) -> Tensor:
        """Losses, fp64, shape (candidates, parts).

        Args:
            sums: Over all rows.
            energy: Σ y² over all rows, shape (parts,).
        """
        if not self.angular:
            return sums.square / self.count
        # The sine is free of cancellation where the cosine is nearly 1: sin² = (‖y‖² ‖r‖² − (r·y)²) / (‖y‖² ‖ŷ‖²).
        energy = energy.expand_as(sums.square)
        length = (energy + 2 * sums.inner + sums.square).clamp(min=0)
        denominator = energy * length
        safe = denominator.clamp(min=torch.finfo(torch.float64).tiny)
        cosine = ((energy + sums.inner) / safe.sqrt()).clamp(-1, 1)
        sine = ((energy * sums.square - sums.inner.square()) / safe).clamp(min=0)
        loss = torch.where(cosine > 0.5, sine / (1 + cosine.clamp(min=0)), 1 - cosine)
        # Where a part of the output is zero it has no direction: right if the candidate is zero too, else wrong.
        return torch.where(denominator > 0, loss, (energy + length != 0).to(loss))

    def rounding(self, sums: Sums, energy: Tensor, unit: float) -> Tensor:
        """Rounding error of :meth:`losses` if that of the sums is ``unit``, relative; arguments and shape as there."""
        if not self.angular:
            return unit * self.losses(sums, energy)
        # Where ŷ is y but for a factor, the sine is a difference of large numbers, and says nothing below this.
        safe = (energy * (energy + 2 * sums.inner + sums.square)).clamp(min=torch.finfo(torch.float64).tiny)
        return unit * ((energy * sums.square + sums.inner.square()) / safe).clamp(max=1)

    def scores(self, losses: Tensor) -> Tensor:
        """Scores for losses."""
        return 1 - losses if self.angular else -losses

    def terms(self, sums: Sums, energy: Tensor) -> Tensor:
        """What some rows are sure to add to :meth:`bounds`; arguments as in :meth:`losses`, over these rows.

        For the cosine the least of ‖y − a ŷ‖² over factors a, which are free for each set of rows here, and one for all
        rows in the angle: ‖y‖² sin² = min ‖y − a ŷ‖².
        """
        if not self.angular:
            return sums.square
        energy = energy.expand_as(sums.square)
        length = (energy + 2 * sums.inner + sums.square).clamp(min=0)
        least = (energy * sums.square - sums.inner.square()) / length.clamp(min=torch.finfo(torch.float64).tiny)
        return torch.where(length > 0, least, energy).clamp(min=0)

    def bounds(self, terms: Tensor, energy: Tensor) -> Tensor:
        """Lower bounds of the losses from the sums of :meth:`terms` over rows, and Σ y² over all rows."""
        if not self.angular:
            return terms / self.count
        sine = (terms / energy.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)
        return torch.where(energy > 0, angle_loss(sine), torch.zeros_like(sine))


@dataclass
class Found:
    """What a race finds.

    Attributes:
        choice: Best candidate of each group, shape (groups,).
        loss: Its loss, shape (groups,); the mean over parts where all share a group.
        zero: Whether every candidate's loss is zero.
    """

    choice: Tensor
    loss: Tensor
    zero: bool


class Start:
    """The current choice of an operand, on all rows.

    Attributes:
        turn: The errors of the operand's candidates.
        objective: Their metric.
        candidates: Parameters, shape (candidates, groups).
        rows: Numbers of the rows that count, those where the current choice errs most first.
        each: Its error on these.
        sums: Its sums.
    """

    def __init__(self, turn: Turn, objective: Objective, candidates: Tensor, current: Tensor) -> None:
        """Look; the current choice is parameters of shape (groups,)."""
        self.turn, self.objective, self.candidates = turn, objective, candidates
        rows = turn.relevant()
        each, self.sums = turn.profile(current.unsqueeze(0), rows)
        order = each.argsort(descending=True, stable=True)
        self.rows, self.each = rows[order], each[order]

    def race(self, fast: bool) -> Race:
        """The race to be run.

        Args:
            fast: Sample the rows, unless they are few, or some of them tell most, or groups are so many that one or
                another always stays open.
        """
        some = float(self.each[: len(self.each) // MOST].sum())
        even = some < 0.5 * float(self.each.sum())
        enough = len(self.rows) >= SAMPLES * LEAST_SAMPLE and self.candidates.shape[1] <= MOST_GROUPS
        return SampledRace(self) if fast and even and enough else Race(self)


class Race:
    """A race of candidates of one operand.

    Attributes:
        turn: Their errors.
        candidates: Parameters, shape (candidates, groups).
        loss: Of the current choice, shape (groups,).
        tie: How much better another must be: the loss's rounding error, shape (groups,).
    """

    def __init__(self, start: Start) -> None:
        """Prepare a race from a look at the current choice."""
        self.turn, self.objective, self.candidates = start.turn, start.objective, start.candidates
        turn, objective, now = start.turn, start.objective, start.sums
        self.shared = self.candidates.shape[1] == 1
        self.blocks = list(self.cut(start.rows))
        none = torch.zeros(turn.parts, dtype=torch.float64, device=turn.device)
        self.energies = [turn.energy(b) if objective.angular else none for b in self.blocks]
        self.energy = torch.stack([none, *self.energies]).sum(0)
        self.loss = self.reduced(objective.losses(now, self.energy))[0]
        unit = TIE * torch.finfo(turn.target.dtype).eps
        self.tie = self.reduced(objective.rounding(now, self.energy, unit))[0].nan_to_num(posinf=0.0)

    def cut(self, rows: Tensor) -> Iterator[Tensor]:
        """Blocks of rows, each twice as long as the one before, up to a bound."""
        output = self.turn.target
        row = max(1, output.numel() // self.turn.rows * output.element_size())
        size, first = max(1, len(rows) // FIRST), 0
        while first < len(rows):
            size = min(size, max(1, BLOCK_BYTES // row), -(-len(rows) // MOST))
            yield rows[first : first + size]
            first, size = first + size, 2 * size

    def reduced(self, losses: Tensor) -> Tensor:
        """Losses by group, shape (candidates, groups): of one group the mean over parts; NaN is the worst."""
        losses = losses.mean(1, keepdim=True) if self.shared else losses
        return losses.nan_to_num(nan=torch.inf)

    def run(self) -> Found:
        """Find the best."""
        goal, candidates = self.objective, self.candidates
        total = Sums(*torch.zeros(2, len(candidates), self.turn.parts, dtype=torch.float64, device=candidates.device))
        terms = torch.zeros_like(total.square)
        losses = torch.full(candidates.shape, torch.inf, dtype=torch.float64, device=candidates.device)
        alive = torch.ones_like(losses, dtype=torch.bool)
        best = self.loss.clone()
        for i, (rows, energy) in enumerate(zip(self.blocks, self.energies, strict=True)):
            if not alive.any():
                break
            where, sums = self.look(alive, rows)
            total.square.scatter_add_(0, where, sums.square)
            total.inner.scatter_add_(0, where, sums.inner)
            terms.scatter_add_(0, where, goal.terms(sums, energy))
            bounds = self.reduced(goal.bounds(terms, self.energy))
            if i == 0 and len(self.blocks) > 1:
                leader = bounds.argmin(0, keepdim=True)
                loss = self.finish(leader, total)
                losses.scatter_(0, leader, loss)
                alive.scatter_(0, leader, False)
                best = torch.minimum(best, loss[0])
            alive &= bounds <= best * (1 + ROUNDING)
        losses = torch.where(alive, self.reduced(goal.losses(total, self.energy)), losses)
        choice = losses.argmin(0, keepdim=True)
        return Found(choice[0], losses.gather(0, choice)[0], not bool(losses.any()))

    def look(self, alive: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        """Errors on some rows of the candidates that are in: their numbers, shape (entries, parts), and the sums.

        Groups that have fewer than others are filled up with candidates that are out.
        """
        most = int(alive.sum(0).max())
        entries = alive.to(torch.int8).argsort(dim=0, descending=True, stable=True)[:most]
        return entries.expand(-1, self.turn.parts), self.turn.sums(self.candidates.gather(0, entries), rows)

    def finish(self, leader: Tensor, total: Sums) -> Tensor:
        """Loss on all rows of one candidate of each group, (1, groups), after the first block: shape (1, groups)."""
        where = leader.expand(-1, self.turn.parts)
        sums = Sums(total.square.gather(0, where), total.inner.gather(0, where))
        for rows in self.blocks[1:]:
            more = self.turn.sums(self.candidates.gather(0, leader), rows)
            sums.square += more.square
            sums.inner += more.inner
        return self.reduced(self.objective.losses(sums, self.energy))


class SampledRace(Race):
    """A race that gives up a candidate once it is unlikely to be the best, and ends once little is left to win.

    After the rows where the current choice errs most come random samples of the others, as good as: every n-th of them
    in the order of their errors. Losses on all rows are estimated from the samples, and so is the standard error of the
    difference of two candidates' losses, from the differences on each sample.
    """

    def cut(self, rows: Tensor) -> Iterator[Tensor]:
        """The rows where the current choice errs most, then samples of the others."""
        top = -(-len(rows) // SAMPLES)
        yield rows[:top]
        rest = rows[top:]
        count = min(SAMPLES, len(rest))
        start = [(i * STEP) % count for i in range(count)] if math.gcd(count, STEP) == 1 else range(count)
        yield from (rest[first::count] for first in start)

    def run(self) -> Found:
        """Find the best, or one that is about as good."""
        goal, count = self.objective, len(self.blocks) - 1
        alive = torch.ones_like(self.candidates, dtype=torch.bool)
        seen: list[Tensor] = []  # of each block the share of the loss, shape (candidates, groups)
        scale = torch.where(self.energy > 0, self.energy, 1.0) if goal.angular else goal.count
        for rows, energy in zip(self.blocks, self.energies, strict=True):
            where, sums = self.look(alive, rows)
            share = torch.zeros(len(alive), self.turn.parts, dtype=torch.float64, device=alive.device)
            share.scatter_(0, where, goal.terms(sums, energy) / scale)
            seen.append(self.reduced(share))
            if len(seen) < 3 or len(seen) > count:
                continue
            alive, settled = self.likely(alive, seen)
            if settled:
                break
        losses = self.estimate(seen)
        if goal.angular:
            losses = angle_loss(losses.clamp(max=1))
        losses = torch.where(alive, losses, torch.inf)
        choice = losses.argmin(0, keepdim=True)
        return Found(choice[0], losses.gather(0, choice)[0], not bool(losses.any()))

    def estimate(self, seen: list[Tensor]) -> Tensor:
        """Losses on all rows from the first block and the samples so far; for the cosine of sin² in place of it."""
        if len(seen) == 1:
            return seen[0]
        return seen[0] + torch.stack(seen[1:]).mean(0) * (len(self.blocks) - 1)

    def likely(self, alive: Tensor, seen: list[Tensor]) -> tuple[Tensor, bool]:
        """The candidates that may be the best, by the samples so far, and whether one of each group is enough."""
        samples, count = len(seen) - 1, len(self.blocks) - 1
        losses = torch.where(alive, self.estimate(seen), torch.inf)
        leader = losses.argmin(0, keepdim=True)
        best = losses.gather(0, leader)
        if samples < LEAST_SEEN:
            return alive & (losses <= HOPELESS * best), False
        each = torch.stack(seen[1:])
        spread = (each - each.gather(1, leader.expand(samples, -1, -1))).std(0)
        error = SURE * spread * count * (1 / samples - 1 / count) ** 0.5
        alive = alive & (losses - error <= best)
        may_win = torch.where(alive, best - losses + error, 0.0).amax(0, keepdim=True)
        done = may_win <= ENOUGH * best
        only = torch.zeros_like(alive).scatter_(0, leader, True)
        return torch.where(done, only, alive), bool(done.all())
