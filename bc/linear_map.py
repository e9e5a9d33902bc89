"""A linear map of a block's input that predicts the block's error: the closed-form rival of a bias.

After Fu et al., "Quantization without Tears" (CVPR 2025, arXiv 2411.13918): behind each quantized block stands a linear
layer on the block's input, solved by ridge regression on the float block's output, and kept only where it explains the
error. We judge that (R²) on the half of the samples that the map was not fitted on. It costs d² + d values a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bc.compensation import CHILD
from bc.errors import QuantizationError
from bc.grid import finite

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

    def solve(self) -> Tensor:
        """Weights of (x, 1), fp64, shape (in + 1, out); the intercept is not penalised."""
        penalty = RIDGE * self.moment.diagonal()[:-1].mean()
        matrix = self.moment.clone()
        matrix.diagonal()[:-1] += penalty
        return torch.linalg.solve(matrix, self.cross)

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
    """Adds W x + c to a block's output, x being the block's input.

    Args:
        weights: Of (x, 1), shape (in + 1, out).
        dtype: Storage type.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        stored = weights.T.to(dtype)
        if not finite(stored):
            raise QuantizationError(f"a linear map of {weights.abs().max():.3g} does not fit {dtype}")
        self.register_buffer("weight", stored[:, :-1].clone())
        self.register_buffer("bias", stored[:, -1].clone())

    @property
    def size(self) -> int:
        """Number of values that it stores."""
        return self.weight.numel() + self.bias.numel()

    def extra(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What it adds to the output of a block that is called with these arguments."""
        x = args[0] if args else kwargs["hidden_states"]
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def hook(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the block: a tensor, or the first element of a tuple."""
        extra = self.extra(args, kwargs)
        return output + extra if isinstance(output, Tensor) else (output[0] + extra, *output[1:])


def map_of(module: nn.Module) -> LinearMap | None:
    """The linear map of a block, if any."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, LinearMap) else None


def attach_map(module: nn.Module, weights: Tensor, dtype: torch.dtype) -> LinearMap:
    """Add a linear map to a block from now on."""
    child = LinearMap(weights, dtype)
    module.add_module(CHILD, child)
    module.register_forward_hook(child.hook, with_kwargs=True)
    return child
