"""The two factors of a site's product and their candidate parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def scale_factors(low: float, high: float, count: int) -> Tensor:
    """Factors of the min-max scale: 1 first, then low + i · (high − low) / count, i = 0 … count − 1."""
    return torch.cat([torch.ones(1), low + torch.arange(count) * ((high - low) / count)])


@dataclass
class Operand:
    """One factor of a site's product, with its candidates.

    Attributes:
        value: The float operand; images first for an input.
        candidates: Parameters, shape (candidates, groups); the first row is min-max. None leaves the operand float.
        shape: Shape of one candidate's parameters next to the value, with −1 for the groups.
        quantize: (values, parameters), which broadcast, ↦ quantized values. Values are the operand, or some of its
            images or rows, and may have more axes of size 1.
        build: Parameters (groups,) ↦ what a :class:`~bc.quantizers.base.SiteResult` holds.
        choice: Chosen candidate of each group.
    """

    value: Tensor
    candidates: Tensor | None
    shape: tuple[int, ...] = ()
    quantize: Callable[[Tensor, Tensor], Tensor] = lambda value, _: value
    build: Callable[[Tensor], Any] = lambda _: None
    choice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        groups = 1 if self.candidates is None else self.candidates.shape[1]
        self.choice = torch.zeros(groups, dtype=torch.long, device=self.value.device)

    @property
    def chosen(self) -> Tensor:
        """Parameters of the current choice, shape (groups,); of a float operand a 0 that means nothing."""
        if self.candidates is None:
            return self.value.new_zeros(1)
        return self.candidates.gather(0, self.choice.unsqueeze(0))[0]

    def apply(self, parameters: Tensor) -> Tensor:
        """Quantized values for several parameters (candidates, groups): shape (candidates, *value)."""
        return self.quantize(self.value.unsqueeze(0), parameters.reshape(len(parameters), *self.shape))

    def now(self, values: Tensor) -> Tensor:
        """Some images or rows of the operand as chosen so far; shape as the values."""
        if self.candidates is None:
            return values
        return self.quantize(values, self.chosen.reshape(self.shape))

    def current(self) -> Tensor:
        """The operand as chosen so far, shape (1, *value)."""
        if self.candidates is None:
            return self.value.unsqueeze(0)
        return self.apply(self.chosen.unsqueeze(0))
