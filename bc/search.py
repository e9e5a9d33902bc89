"""Search of quantization parameters by the error of a site's output, over lists of candidates.

A site is the product of two operands: a weight and an input, or the two inputs of an attention matmul. Each operand has
a list of candidate parameters, of which the first is min-max, for each of its groups (the tensor, the q, k and v rows,
the rows, the heads). The operands are searched in turns, each with the other as chosen so far. The output falls into
parts that match the finest groups, and the score of a candidate is taken part by part, so that all groups choose at
once; the score of the site is the mean over its parts. As the current choice is always among the candidates, no step
lowers the score, and the end is never worse than min-max.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from bc.errors import QuantizationError
from bc.grid import finite
from bc.operands import Operand
from bc.quantizers.base import SiteSamples
from bc.racing import Found, Objective, Start
from bc.token_turns import DirectInput, DirectWeight, QuadraticInput, QuadraticWeight
from bc.turns import Forward, Heads, Turn

Metric = Literal["fisher", "mse", "cosine", "self_kl"]
Mode = Literal["exact", "fast"]


class SiteSearch:
    """Alternating search of the two operands of a site.

    Attributes:
        operands: (weight, input) of a Linear or convolution, (A, B) of a matmul.
        objective: The metric.
    """

    def __init__(
        self,
        site: SiteSamples,
        operands: tuple[Operand, Operand],
        metric: str,
        memory_mib: int,
        mode: str = "exact",
    ) -> None:
        """Prepare a search.

        Args:
            site: The site, in fp32 or fp64.
            operands: Its operands, at min-max; the search leaves its choices in them.
            metric: Of the score; see :class:`bc.racing.Objective`.
            memory_mib: Budget of temporaries.
            mode: ``exact`` scores every candidate until it cannot win, ``fast`` until it is unlikely to.
        """
        for value in (*(o.value for o in operands), site.output):
            if not finite(value):
                raise QuantizationError(f"{site.name}: the weight, an input or the output holds NaN or Inf")
        self.site, self.operands, self.mode = site, operands, mode
        self.budget = memory_mib * 2**20
        self.parts = max(o.choice.numel() for o in operands)
        self.objective = Objective(site, metric, self.parts)
        self.view = self._as_linear() if site.kind == "conv" and site.columns is not None else None

    def run(self, rounds: int) -> dict[str, Any]:
        """Search; the choices are left in the operands.

        Args:
            rounds: Most turns through the operands; the search ends before, once a turn changes nothing.

        Returns:
            Notes: metric, score at min-max and at the choice, rounds used.

        Raises:
            QuantizationError: Every score is zero though the outputs differ.
        """
        start = float(self.score())
        used, seen = 0, [torch.empty(0)] * 2  # what the other operand was when this one was scored last
        for used in range(1, rounds + 1):  # noqa: B007
            before = [o.choice.clone() for o in self.operands]
            for index, operand in enumerate(self.operands):
                other = self.operands[1 - index].choice
                if operand.candidates is None or torch.equal(seen[index].to(other), other):
                    continue
                seen[index] = other
                operand.choice = self.choose(index)
            if all(torch.equal(a, o.choice) for a, o in zip(before, self.operands, strict=True)):
                break
        end = float(self.score())
        if not end >= start:  # only by rounding: the quadratic form and the direct score differ in the last digits
            for operand in self.operands:
                operand.choice = torch.zeros_like(operand.choice)
            end = start
        notes = {"metric": self.objective.metric, "score_minmax": start, "score": end, "rounds": used}
        return notes if self.mode == "exact" else notes | {"search": self.mode}

    def score(self) -> Tensor:
        """Score of the site at the current choice, a scalar, fp64."""
        turn = self.turn(0, direct=True)
        return self._all(turn, self.operands[0].chosen.unsqueeze(0)).mean()

    def scores(self, index: int, direct: bool = False, only: Tensor | None = None) -> Tensor:
        """Scores of candidates of one operand, the other as chosen: fp64, shape (candidates, parts).

        Args:
            index: Of the operand.
            direct: Do without the quadratic form.
            only: Numbers of the candidates; all by default.
        """
        candidates = self.operands[index].candidates
        assert candidates is not None
        return self._all(self.turn(index, direct), candidates if only is None else candidates[only])

    def _all(self, turn: Turn, candidates: Tensor) -> Tensor:
        rows = turn.relevant()
        return self.objective.scores(self.objective.losses(turn.sums(candidates, rows), turn.energy(rows)))

    def choose(self, index: int) -> Tensor:
        """Best candidate of each group of an operand, the other as chosen, shape (groups,)."""
        operand = self.operands[index]
        candidates = operand.candidates
        assert candidates is not None
        # The mean of the parts' errors is the error of the whole, and the mean of their cosines is not its cosine.
        parts = self.parts if self.objective.angular or candidates.shape[1] > 1 else 1
        turn = self.turn(index, parts=parts)
        race = Start(turn, self.objective, candidates, operand.chosen).race(self.mode == "fast")
        found = race.run()
        self._refuse_zero(found, index)
        return torch.where(found.loss < race.loss - race.tie, found.choice, operand.choice)

    def _refuse_zero(self, found: Found, index: int) -> None:
        """A gradient so small that its square is zero gives no order to the candidates."""
        if not self.objective.weighted or not found.zero:
            return
        plain = SiteSearch(self.site, self.operands, "mse", self.budget // 2**20)
        if bool(plain.scores(index).any()):
            raise QuantizationError(
                f"{self.site.name}: the {self.objective.metric} score is zero for every candidate though their outputs "
                "differ; choose metric=mse or cosine"
            )

    def turn(self, index: int, direct: bool = False, parts: int | None = None) -> Turn:
        """The errors of an operand's candidates, the other as chosen so far.

        Args:
            index: Of the operand.
            direct: Do without the quadratic form.
            parts: Parts whose errors are told apart.
        """
        site, operands = (self.site, self.operands) if self.view is None else self.view
        goal, parts = self.objective, self.parts if parts is None else parts
        common = (parts, goal.weighted, goal.angular, self.budget)
        if site.kind == "conv":
            assert index == 0, "a convolution's input is not searched"
            return Forward(site, operands[0], *common)
        operand, other = operands[index], operands[1 - index]
        free = not direct and not goal.weighted
        if site.kind == "matmul":
            length = operand.value.shape[-2 if index else -1]
            width = other.value.shape[-1 if index == 0 else -2]
            return Heads(site, operands, index, *common, free and 1.5 * length <= width)
        out, features = operands[0].value.shape
        tokens = site.output.numel() // out
        if index == 0:
            cls: Any = QuadraticWeight if free and 1.5 * features <= tokens else DirectWeight
        else:
            cls = QuadraticInput if free and parts == 1 and 1.5 * features <= out else DirectInput
        turn: Turn = cls(site, *operands, *common)
        return turn

    def _as_linear(self) -> tuple[SiteSamples, tuple[Operand, Operand]]:
        """A convolution as the product of its weight with the patches it sees."""
        site, (weight, inputs) = self.site, self.operands
        assert site.columns is not None

        def rows(value: Tensor) -> Tensor:
            return value.flatten(2).mT.contiguous()

        gradient = None if site.gradient is None else rows(site.gradient)
        linear = replace(site, kind="linear", output=rows(site.output), gradient=gradient)
        return linear, (weight, Operand(site.columns(inputs.value), None))
