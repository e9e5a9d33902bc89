"""A linear map of a module's input that predicts the module's error, by ridge regression.

Behind a block it is the closed-form rival of a bias, after Fu et al., "Quantization without Tears" (CVPR 2025, arXiv
2411.13918): a linear layer on the block's input, solved on the float block's output, and kept only where it explains
the error. We judge that (R²) on the half of the samples that the map was not fitted on. It costs d² + d values a block.
Behind a classifier's head it is the readout (:mod:`bc.readout`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bc.compensation import CHILD
from bc.errors import QuantizationError
from bc.grid import finite
from bc.regularise import factors

RIDGE = 1e-4  # of the mean diagonal of the second moment


class RidgeSums:
    """Second moments of inputs and errors, in fp64: what a ridge regression with intercept needs.

    Attributes:
        moment: Of (x, 1) with itself, shape (in + 1, in + 1).
        cross: Of (x, 1) with the error, shape (in + 1, out).
        square: Sum of squared errors.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | None = None) -> None:
        self.moment = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.square = 0.0

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add rows: x, shape (rows, in), and the errors, shape (rows, out)."""
        ones = torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)
        self.moment += ones.T @ ones
        self.cross += ones.T @ error.double()
        self.square += error.double().square().sum().item()

    def plus(self, other: RidgeSums) -> RidgeSums:
        """The sums of both."""
        found = RidgeSums(len(self.moment) - 1, self.cross.shape[1], self.moment.device)
        found.moment, found.cross = self.moment + other.moment, self.cross + other.cross
        found.square = self.square + other.square
        return found

    def solve(self, ridge: float = RIDGE) -> Tensor:
        """Weights of (x, 1), fp64, shape (in + 1, out); the intercept is not penalised.

        Args:
            ridge: Penalty, in units of the second moment's mean diagonal.
        """
        penalty = ridge * self.moment.diagonal()[:-1].mean()
        matrix = self.moment.clone()
        matrix.diagonal()[:-1] += penalty
        return torch.linalg.solve(matrix, self.cross)

    def reduced(self, weights: Tensor, rank: int) -> Tensor:
        """Weights of a rank whose predictions on these samples are nearest to those of given weights.

        Reduced-rank regression: the leading principal directions of the predictions are kept (Izenman, "Reduced-rank
        regression for the multivariate linear model", J. Multivariate Analysis 1975).

        Args:
            weights: Of (x, 1), from :meth:`solve`.
            rank: Rank of the part without the intercept.
        """
        count = self.moment[-1, -1]
        mean, body = self.moment[-1, :-1] / count, weights[:-1]
        spread = self.moment[:-1, :-1] - count * torch.outer(mean, mean)
        leading = torch.linalg.eigh(body.T @ spread @ body)[1][:, max(0, weights.shape[1] - rank) :]
        body = body @ leading @ leading.T
        return torch.cat([body, (self.cross[-1] / count - mean @ body)[None]])

    def residual(self, weights: Tensor) -> float:
        """Squared error that weights leave on these samples."""
        fitted = (weights * (self.moment @ weights)).sum() - 2 * (weights * self.cross).sum()
        return self.square + fitted.item()


def explained(fitted: RidgeSums, other: RidgeSums) -> float:
    """R² against no map, of the map of one half of the samples on the other half."""
    if other.square == 0:
        return 0.0
    return 1 - other.residual(fitted.solve()) / other.square


class LinearMap(nn.Module):
    """Adds W x + c to a module's output, x being the module's input.

    Args:
        weights: Of (x, 1), shape (in + 1, out).
        dtype: Storage type.
        rank: Store W, which has this rank, as a product of two matrices; None stores it as it is.
    """

    weight: Tensor
    inner: Tensor | None
    bias: Tensor

    def __init__(self, weights: Tensor, dtype: torch.dtype, rank: int | None = None) -> None:
        super().__init__()
        inner, outer = (None, weights[:-1]) if rank is None else factors(weights[:-1], rank)
        parts = {"weight": outer.T, "inner": None if inner is None else inner.T, "bias": weights[-1]}
        for name, value in parts.items():
            stored = None if value is None else value.to(dtype).clone(memory_format=torch.contiguous_format)
            if stored is not None and not finite(stored):
                raise QuantizationError(f"a linear map of {weights.abs().max():.3g} does not fit {dtype}")
            self.register_buffer(name, stored)

    @property
    def size(self) -> int:
        """Number of values that it stores."""
        return sum(buffer.numel() for buffer in self.buffers())

    def extra(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What it adds to the output of a module that is called with these arguments."""
        x = args[0] if args else kwargs["hidden_states"]
        hidden = x if self.inner is None else nn.functional.linear(x, self.inner.to(x.dtype))
        return nn.functional.linear(hidden, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the module: a tensor, or the first element of a tuple."""
        extra = self.extra(args, kwargs)
        return output + extra if isinstance(output, Tensor) else (output[0] + extra, *output[1:])


def map_of(module: nn.Module) -> LinearMap | None:
    """The linear map of a module, if any."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, LinearMap) else None


def attach_map(module: nn.Module, weights: Tensor, dtype: torch.dtype, rank: int | None = None) -> LinearMap:
    """Add a linear map to a module from now on; arguments as of :class:`LinearMap`."""
    child = LinearMap(weights, dtype, rank)
    module.add_module(CHILD, child)
    module.register_forward_hook(child.hook, with_kwargs=True)
    return child
