"""Errors of the candidates of a Linear, directly and by the quadratic form; see :mod:`bc.turns`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bc.operands import Operand
from bc.quantizers.base import SiteSamples
from bc.turns import LEAST_ROWS, Errors, Turn


class Tokens(Turn):
    """A Linear's product: rows are tokens, parts are equal runs of output channels."""

    def __init__(
        self, site: SiteSamples, weight: Operand, inputs: Operand, parts: int, weighted: bool, inner: bool, budget: int
    ) -> None:
        gradient = site.gradient.flatten(0, -2) if weighted and site.gradient is not None else None
        super().__init__(parts, gradient, inner, budget, site.output)
        self.weight, self.inputs = weight, inputs
        self.x, self.target = inputs.value.flatten(0, -2), site.output.flatten(0, -2)
        self.bias = site.bias
        self.rows = len(self.x)
        self.out, self.features = weight.value.shape

    def energy(self, rows: Tensor) -> Tensor:
        """See :meth:`Turn.energy`."""
        total = torch.zeros(self.parts, dtype=torch.float64, device=self.device)
        for where, _ in self.pieces(1, len(rows), 2 * self.out):
            square = self.target[rows[where]].square_()
            total += square.reshape(len(square), self.parts, -1).sum(-1).sum(0, dtype=torch.float64)
        return total

    def now(self, x: Tensor) -> Tensor:
        """Some tokens' input as chosen so far."""
        return self.inputs.quantize(x, self.inputs.chosen)

    def rest(self, target: Tensor) -> Tensor:
        """The bias minus y."""
        return -target if self.bias is None else self.bias - target

    def gathered(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, y and g of some rows."""
        return self.x[rows], self.target[rows], None if self.gradient is None else self.gradient[rows]


class DirectInput(Tokens):
    """Candidates of a Linear's input, by the product."""

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        weight = self.weight.current()[0].T
        row = 2 * (self.features + self.out)
        for where, groups in self.pieces(len(parameters), len(rows), row, least=LEAST_ROWS):
            x, y, g = self.gathered(rows[where])
            rest = self.rest(y)
            for chosen in groups:
                x_hat = self.inputs.quantize(x.unsqueeze(0), parameters[chosen].reshape(-1, 1, 1))
                yield chosen, where, *self.reduce((x_hat @ weight).add_(rest), y, g)


class DirectWeight(Tokens):
    """Candidates of a Linear's weight, by the product."""

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        fixed = 2 * self.out * self.features
        for where, groups in self.pieces(len(parameters), len(rows), 2 * self.out, fixed, LEAST_ROWS):
            x, y, g = self.gathered(rows[where])
            x, rest, y = self.now(x), self.rest(y).unsqueeze(1), y.unsqueeze(1)
            g = None if g is None else g.unsqueeze(1)
            for chosen in groups:
                weights = self.weight.apply(parameters[chosen])
                product = (x @ weights.flatten(0, 1).T).reshape(len(x), -1, self.out)  # all candidates' rows in one
                square, inner = self.reduce(product.add_(rest), y, g)
                yield chosen, where, square.transpose(0, 1), None if inner is None else inner.transpose(0, 1)


class QuadraticInput(Tokens):
    """Candidates of a Linear's input, by the quadratic form; all output channels are one part."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        weight = self.weight.current()[0]
        self.moment = weight.T @ weight
        self.cross, self.along = torch.empty_like(self.x), torch.empty_like(self.x) if self.with_inner else None
        self.before = self.x.new_zeros(2, self.rows)  # Σ r² and Σ r · y of a row at the float input
        for where, _ in self.pieces(1, self.rows, 4 * self.out, least=LEAST_ROWS):
            y = self.target[where]
            error = (self.x[where] @ weight.T).add_(self.rest(y))
            self.cross[where] = (error @ weight).mul_(2)
            if self.along is not None:
                self.along[where] = y @ weight
                self.before[1, where] = (error * y).sum(1)
            self.before[0, where] = error.square_().sum(1)

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        for where, groups in self.pieces(len(parameters), len(rows), 4 * self.features, least=LEAST_ROWS):
            row = rows[where]
            x, cross = self.x[row], self.cross[row]
            along = None if self.along is None else self.along[row]
            for chosen in groups:
                change = self.inputs.quantize(x.unsqueeze(0), parameters[chosen].reshape(-1, 1, 1)).sub_(x)
                terms = (change @ self.moment).add_(cross).mul_(change).sum(-1)
                square = terms.add_(self.before[0, row]).clamp_(min=0).unsqueeze(-1)
                inner = None
                if along is not None:
                    inner = change.mul_(along).sum(-1).add_(self.before[1, row]).unsqueeze(-1)
                yield chosen, where, square, inner


class QuadraticWeight(Tokens):
    """Candidates of a Linear's weight, by the quadratic form: the rows of a are the weight's, b all tokens.

    All tokens are in the second moments. A row is one output channel of each part.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        value = self.weight.value
        self.moment = value.new_zeros(self.features, self.features)
        self.cross, self.along = torch.zeros_like(value), torch.zeros_like(value) if self.with_inner else None
        self.before = torch.zeros(3, self.out, dtype=torch.float64, device=self.device)  # Σ r², Σ r · y, Σ y²
        for where, _ in self.pieces(1, self.rows, 3 * self.out + self.features, least=LEAST_ROWS):
            y = self.target[where]
            x = self.now(self.x[where])
            error = (x @ value.T).add_(self.rest(y))
            self.moment += x.T @ x
            self.cross += error.T @ x
            if self.along is not None:
                self.along += y.T @ x
                self.before[1] += (error * y).sum(0)
                self.before[2] += y.square().sum(0)
            self.before[0] += error.square_().sum(0)
        self.rows = self.out // self.parts

    def channels(self, rows: Tensor) -> Tensor:
        """Output channels of some rows, part by part."""
        first = torch.arange(self.parts, device=self.device) * (self.out // self.parts)
        return (first[:, None] + rows).flatten()

    def energy(self, rows: Tensor) -> Tensor:
        """See :meth:`Turn.energy`."""
        return self.before[2, self.channels(rows)].reshape(self.parts, -1).sum(1)

    def errors(self, parameters: Tensor, rows: Tensor) -> Errors:
        """See :meth:`Turn.errors`."""
        for where, groups in self.pieces(len(parameters), len(rows), 3 * self.parts * self.features, least=LEAST_ROWS):
            some = self.channels(rows[where])
            value, cross, before = self.weight.value[some], self.cross[some], self.before[:, some]
            along = None if self.along is None else self.along[some]
            for chosen in groups:
                change = self.weight.quantize(value.unsqueeze(0), self.shaped(parameters[chosen])).sub_(value)
                terms = (change @ self.moment).add_(cross, alpha=2).mul_(change)  # a row's add up to its error
                square = self.by_part(terms.sum(-1) + before[0]).clamp_(min=0)
                inner = None if along is None else self.by_part(change.mul_(along).sum(-1) + before[1])
                yield chosen, where, square, inner

    def shaped(self, parameters: Tensor) -> Tensor:
        """Parameters next to the weight's values."""
        return parameters.reshape(len(parameters), *self.weight.shape)

    def by_part(self, values: Tensor) -> Tensor:
        """(candidates, parts · rows) ↦ (candidates, rows, parts)."""
        return values.reshape(len(values), self.parts, -1).transpose(1, 2)
