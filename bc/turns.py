"""Sums of squared errors of an operand's candidates, the other operand as it is: what a search compares.

An output is y = a · bᵀ row by row, a a row of the operand that is searched or of the other one. The error of a
candidate is a sum over rows, so that a search may look at some rows first. Two ways to the same sums, up to rounding:

* direct: the product itself, ŷ − y;
* quadratic, where no gradient weighs the elements: with δ = â − a the change of a searched row, d = a bᵀ − y its error
  before, and G = bᵀ b, the error of a row is ‖d + δ bᵀ‖² = ‖d‖² + 2 δ · (d b) + δ G δᵀ, which costs the square of a
  row's length whatever the length of the output's.

All temporaries are of a size that stays in the processor's cache: a pass over memory costs more than the product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bc.operands import Operand
from bc.quantizers.base import SiteSamples

CACHE_BYTES = 4 * 2**20  # of temporaries at a time on a processor; an accelerator takes what the budget allows
LEAST_ROWS = 256  # of a product at a time: fewer make it slow

Errors = Iterator[tuple[slice, slice, Tensor, Tensor | None]]
Scored = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Sums:
    """Sums over rows, fp64, shape (candidates, parts).

    Attributes:
        square: Σ (g r)², r = ŷ − y and g the gradient, or 1.
        inner: Σ r · y; zeros where it is not asked for.
    """

    square: Tensor
    inner: Tensor


class Turn(ABC):
    """An operand's candidates against the other operand as it is.

    Attributes:
        rows: Number of rows that errors add up over.
        target: The float output y.
        parts: Parts of the output that are scored by themselves.
        gradient: Weights of the output's elements, or None for 1.
        with_inner: Whether Σ r · y is wanted.
    """

    rows: int
    target: Tensor

    def __init__(self, parts: int, gradient: Tensor | None, with_inner: bool, budget: int, like: Tensor) -> None:
        self.parts, self.gradient, self.with_inner = parts, gradient, with_inner
        cache = min(budget, CACHE_BYTES) if like.device.type == "cpu" else budget
        self.elements, self.most = (max(1, size // like.element_size()) for size in (cache, budget))
        self.device = like.device

    @abstractmethod
    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """Errors of candidates on rows, in pieces.

        Args:
            parameters: Shape (candidates, groups).
            rows: Numbers of rows, shape (n,).

        Yields:
            The candidates, the positions in ``rows``, Σ (g r)² and Σ r · y of each row, both of shape
            (candidates, rows, parts); no Σ r · y where it is not asked for.
        """

    @abstractmethod
    def energy(self, rows: Tensor) -> Tensor:
        """Σ y² over rows, fp64, shape (parts,)."""

    def relevant(self) -> Tensor:
        """Numbers of the rows that can have an error: those whose gradient is not zero everywhere."""
        if self.gradient is None:
            return torch.arange(self.rows, device=self.device)
        return self.gradient.reshape(self.rows, -1).abs().amax(1).nonzero()[:, 0]

    def sums(self, parameters: Tensor, rows: Tensor) -> Sums:
        """Sums over rows of the errors of candidates, shape (candidates, parts)."""
        square = torch.zeros(len(parameters), self.parts, dtype=torch.float64, device=self.device)
        inner = torch.zeros_like(square)
        for chosen, _, part, product in self.errors(parameters, rows):
            square[chosen] += part.sum(1, dtype=torch.float64)
            if product is not None:
                inner[chosen] += product.sum(1, dtype=torch.float64)
        return Sums(square, inner)

    def profile(self, parameters: Tensor, rows: Tensor) -> tuple[Tensor, Sums]:
        """Error of one candidate (1, groups) row by row, shape (n,), and its sums."""
        each = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        sums = Sums(*torch.zeros(2, 1, self.parts, dtype=torch.float64, device=self.device))
        for _, where, part, product in self.errors(parameters, rows):
            each[where] += part[0].sum(1, dtype=torch.float64)
            sums.square += part.sum(1, dtype=torch.float64)
            if product is not None:
                sums.inner += product.sum(1, dtype=torch.float64)
        return each, sums

    def pieces(
        self, count: int, rows: int, row: int, fixed: int = 0, least: int = 1
    ) -> Iterator[tuple[slice, list[slice]]]:
        """Cut rows × candidates so that temporaries are small: some rows, and the candidates in groups.

        Args:
            count: Candidates.
            rows: Rows.
            row: Elements that a candidate needs for a row.
            fixed: Elements that it needs besides.
            least: Rows that are taken together if the budget allows.
        """
        some = min(rows, max(self.elements // row, min(least, self.most // row), 1))
        step = max(1, self.elements // max(1, row * some + fixed))
        groups = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        for first in range(0, rows, max(1, some)):
            yield slice(first, min(first + some, rows)), groups

    def reduce(self, error: Tensor, target: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Σ (g r)² and Σ r · y over the channels of each part: (…, channels) ↦ (…, parts); r is overwritten."""
        shape = (*error.shape[:-1], self.parts, error.shape[-1] // self.parts)
        inner = (error * target).reshape(shape).sum(-1) if self.with_inner else None
        if gradient is not None:
            error = error.mul_(gradient)
        return error.square_().reshape(shape).sum(-1), inner


class Heads(Turn):
    """A matmul's product A @ B: rows are images (or windows), parts are the heads.

    To search B, both are transposed: Bᵀ Aᵀ = (A B)ᵀ.
    """

    def __init__(
        self,
        site: SiteSamples,
        operands: tuple[Operand, Operand],
        index: int,
        parts: int,
        weighted: bool,
        inner: bool,
        budget: int,
        quadratic: bool,
    ) -> None:
        gradient = site.gradient if weighted else None
        super().__init__(parts, gradient, inner, budget, site.output)
        self.operand, self.other, self.flip = operands[index], operands[1 - index], index == 1
        self.target = site.output
        self.rows = len(self.target)
        self.quadratic = quadratic

    def seen(self, value: Tensor) -> Tensor:
        """A tensor as it is, or transposed."""
        return value.mT.contiguous() if self.flip else value

    def energy(self, rows: Tensor) -> Tensor:
        """See :meth:`Turn.energy`."""
        total = torch.zeros(self.parts, dtype=torch.float64, device=self.device)
        for where, _ in self.pieces(1, len(rows), 2 * self.target[0].numel()):
            total += self.by_part(self.target[rows[where]].square_().unsqueeze(2)).sum((0, 1), dtype=torch.float64)
        return total

    def by_part(self, terms: Tensor) -> Tensor:
        """Sum over all but candidates, images and parts: (images, heads, candidates, n, m) ↦ (candidates, …)."""
        sums = terms.sum(-1).sum(-1)
        images, heads, count = sums.shape
        return sums.reshape(images, self.parts, heads // self.parts, count).sum(2).permute(2, 0, 1)

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        value, out = self.operand.value[0].numel(), self.target[0].numel()
        row = 4 * value if self.quadratic else 2 * (value + out)
        for where, groups in self.pieces(len(parameters), len(rows), row):
            chosen_rows = rows[where]
            a = self.seen(self.operand.value[chosen_rows]).unsqueeze(2)
            b = self.seen(self.other.now(self.other.value[chosen_rows]))
            y = self.seen(self.target[chosen_rows]).unsqueeze(2)
            g = None if self.gradient is None else self.seen(self.gradient[chosen_rows]).unsqueeze(2)
            score = self.form(a, b, y) if self.quadratic else self.direct(a, b, y, g)
            for chosen in groups:
                square, inner = score(parameters[chosen])
                yield chosen, where, square, inner

    def candidates(self, a: Tensor, parameters: Tensor) -> Tensor:
        """Quantized values, shape (images, heads, candidates, n, k), for a of shape (images, heads, 1, n, k)."""
        if self.operand.candidates is None:
            return a
        shaped = parameters.reshape(len(parameters), *self.operand.shape).movedim(0, -3)
        return self.operand.quantize(a, shaped)

    def direct(self, a: Tensor, b: Tensor, y: Tensor, g: Tensor | None) -> Scored:
        """Scores by the product: all candidates' rows of a head in one."""

        def score(parameters: Tensor) -> tuple[Tensor, Tensor | None]:
            a_hat = self.candidates(a, parameters)
            error = (a_hat.flatten(2, 3) @ b).reshape(*a_hat.shape[:-1], -1).sub_(y)
            inner = self.by_part(error * y) if self.with_inner else None
            if g is not None:
                error.mul_(g)
            return self.by_part(error.square_()), inner

        return score

    def form(self, a: Tensor, b: Tensor, y: Tensor) -> Scored:
        """Scores by the quadratic form."""
        error = (a @ b.unsqueeze(2)).sub_(y)
        cross, moment = (error @ b.mT.unsqueeze(2)).mul_(2), b @ b.mT
        along = y @ b.mT.unsqueeze(2) if self.with_inner else None
        inner_before = self.by_part(error * y)
        before = self.by_part(error.square_())

        def score(parameters: Tensor) -> tuple[Tensor, Tensor | None]:
            change = self.candidates(a, parameters).sub_(a)
            terms = (change.flatten(2, 3) @ moment).reshape(change.shape).add_(cross).mul_(change)
            square = (self.by_part(terms) + before).clamp_(min=0)
            return square, None if along is None else self.by_part(change.mul_(along)) + inner_before

        return score


class Forward(Turn):
    """Candidates of a convolution's weight, by its forward; rows are images, parts equal runs of output channels."""

    def __init__(
        self, site: SiteSamples, weight: Operand, parts: int, weighted: bool, inner: bool, budget: int
    ) -> None:
        super().__init__(parts, site.gradient if weighted else None, inner, budget, site.output)
        self.site, self.weight, self.target = site, weight, site.output
        self.rows = len(self.target)

    def energy(self, rows: Tensor) -> Tensor:
        """See :meth:`Turn.energy`."""
        square = self.target[rows].square_()
        return square.reshape(len(rows), self.parts, -1).sum(-1).sum(0, dtype=torch.float64)

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        assert self.site.weight is not None
        shape = self.site.weight.shape
        x, out = self.site.inputs[0], self.target[0].numel()
        for where, _ in self.pieces(1, len(rows), x[0].numel() + 3 * out):
            images = rows[where]
            fed, y = x[images], self.target[images]
            for i in range(len(parameters)):
                weight = self.weight.apply(parameters[i : i + 1])[0].reshape(shape)
                error = self.site.forward(weight, (fed,)) - y
                inner = (error * y).reshape(1, len(y), self.parts, -1).sum(-1) if self.with_inner else None
                if self.gradient is not None:
                    error.mul_(self.gradient[images])
                square = error.square_().reshape(1, len(y), self.parts, -1).sum(-1)
                yield slice(i, i + 1), where, square, inner
