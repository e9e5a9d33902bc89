"""The best of many candidates, without scoring the hopeless ones to the end.

A loss is a sum over rows of terms that are not negative, so that a candidate whose sum over some rows is more than the
whole loss of another is out. The rows where the current choice errs most are looked at first. What is found is what
scoring all candidates on all rows finds, up to candidates that are equal within rounding.
"""

from __future__ import annotations

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
FIRST = 32  # the first rows that are looked at are this fraction of all, the next twice as many, and so on
BLOCK_BYTES = 32 * 2**20  # of the output's rows that are looked at together


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
        return torch.where(energy > 0, sine / (1 + (1 - sine).sqrt()), torch.zeros_like(sine))


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


class Race:
    """A race of candidates of one operand.

    Attributes:
        turn: Their errors.
        candidates: Parameters, shape (candidates, groups).
        loss: Of the current choice, shape (groups,).
        tie: How much better another must be: the loss's rounding error, shape (groups,).
    """

    def __init__(self, turn: Turn, objective: Objective, candidates: Tensor, current: Tensor) -> None:
        """Look at the current choice, parameters (groups,), on all rows."""
        self.turn, self.objective, self.candidates = turn, objective, candidates
        self.shared = candidates.shape[1] == 1
        rows = turn.relevant()
        each, now = turn.profile(current.unsqueeze(0), rows)
        rows = rows[each.argsort(descending=True, stable=True)]
        self.blocks = list(self.cut(rows))
        none = torch.zeros(turn.parts, dtype=torch.float64, device=turn.device)
        self.energies = [turn.energy(b) if objective.angular else none for b in self.blocks]
        self.energy = torch.stack([none, *self.energies]).sum(0)
        self.loss = self.reduced(objective.losses(now, self.energy))[0]
        unit = TIE * torch.finfo(turn.target.dtype).eps
        self.tie = self.reduced(objective.rounding(now, self.energy, unit))[0].nan_to_num(posinf=0.0)

    def cut(self, rows: Tensor) -> Iterator[Tensor]:
        """Blocks of rows, each twice as long as the one before, of a bounded size."""
        output = self.turn.target
        row = max(1, output.numel() // self.turn.rows * output.element_size())
        size, first = max(1, len(rows) // FIRST), 0
        while first < len(rows):
            size = min(size, max(1, BLOCK_BYTES // row))
            yield rows[first : first + size]
            first, size = first + size, 2 * size

    def reduced(self, losses: Tensor) -> Tensor:
        """Losses by group, shape (candidates, groups): of one group the mean over parts; NaN is the worst."""
        losses = losses.mean(1, keepdim=True) if self.shared else losses
        return losses.nan_to_num(nan=torch.inf)

    def run(self, table: Tensor) -> Found:
        """Find the best.

        Args:
            table: Numbers of the candidates that take part, shape (entries, groups).
        """
        goal = self.objective
        count, parts = len(table), self.turn.parts
        total = Sums(*torch.zeros(2, count, parts, dtype=torch.float64, device=table.device))
        terms = torch.zeros_like(total.square)
        losses = torch.full(table.shape, torch.inf, dtype=torch.float64, device=table.device)
        alive = torch.ones_like(table, dtype=torch.bool)
        best = self.loss.clone()
        for i, (rows, energy) in enumerate(zip(self.blocks, self.energies, strict=True)):
            most = int(alive.sum(0).max())
            if not most:
                break
            entries = alive.to(torch.int8).argsort(dim=0, descending=True, stable=True)[:most]
            sums = self.turn.sums(self.candidates.gather(0, table.gather(0, entries)), rows)
            where = entries.expand(-1, parts)
            total.square.scatter_add_(0, where, sums.square)
            total.inner.scatter_add_(0, where, sums.inner)
            terms.scatter_add_(0, where, goal.terms(sums, energy))
            if i == 0 and len(self.blocks) > 1:
                leader = self.reduced(goal.bounds(terms, self.energy)).argmin(0, keepdim=True)
                loss = self.finish(table.gather(0, leader), leader.expand(-1, parts), total)
                losses.scatter_(0, leader, loss)
                alive.scatter_(0, leader, False)
                best = torch.minimum(best, loss[0])
            alive &= self.reduced(goal.bounds(terms, self.energy)) <= best * (1 + ROUNDING)
        losses = torch.where(alive, self.reduced(goal.losses(total, self.energy)), losses)
        choice = losses.argmin(0, keepdim=True)
        return Found(table.gather(0, choice)[0], losses.gather(0, choice)[0], not bool(losses.any()))

    def finish(self, entry: Tensor, where: Tensor, total: Sums) -> Tensor:
        """Loss on all rows of one entry (1, groups) whose sums over the first block are there: shape (1, groups)."""
        sums = Sums(total.square.gather(0, where), total.inner.gather(0, where))
        for rows in self.blocks[1:]:
            more = self.turn.sums(self.candidates.gather(0, entry), rows)
            sums.square += more.square
            sums.inner += more.inner
        return self.reduced(self.objective.losses(sums, self.energy))
