"""AWQ: activation-aware scales of the input channels before rounding.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan and Han, "AWQ: Activation-aware Weight Quantization for On-Device LLM
Compression and Acceleration", MLSys 2024 (arXiv 2306.00978), sections 3.2 and 4: the weights of the input channels that
carry large activations are enlarged by s = m^α before they are rounded, with m the mean magnitude of each channel and
one α for all Linears that share an input, chosen from a grid by the error of the output; the inputs are divided by s.
Then the range of every row and group is clipped where that lowers the error of the Linear's output.

What we define ourselves. The result is kept in the coordinates of the original model, ŵ = s_q · (q − z) / s, so that no
other module changes; :mod:`bc.scaling` folds the scales where a model allows it. α = 0 is round-to-nearest and always a
candidate. Channels that were never active count as typical ones, for nothing is known of them. The published code does
not clip queries and keys, whose errors multiply in the attention: here every Linear may be clipped, and keeps its
clipping only if the error of the whole attention, MLP or Linear does not rise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bc.errors import QuantizationError, UserError
from bc.grid import (
    Grid,
    QuantizedWeight,
    affine_range,
    encode,
    fake_quantize,
    finite,
    group_index,
    quantize_weight,
)
from bc.quantizers.base import Group, Quantizer, SiteResult, storable
from bc.settings import Bits

SMALLEST = 1e-4  # magnitudes below this fraction of the largest are raised to it
CLIP_LOWEST = 0.5
CLIP_STEPS = 10


@storable("scaled")
@dataclass
class ScaledWeight:
    """A weight matrix that was scaled by input channel before it was put on a uniform affine grid.

    Attributes:
        codes: uint8, shape (out, in), values 0 … 2^bits − 1.
        scale: fp32, shape (out, groups).
        zero_point: fp32 whole numbers, the scale's shape.
        bits: Bits per code.
        symmetric: Every zero point is 2^(bits−1) and need not be stored.
        group: int64, shape (in,): the group of each column.
        column_scale: fp16, shape (in,), positive: what each column was multiplied by.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool
    group: Tensor
    column_scale: Tensor

    def on_grid(self) -> QuantizedWeight:
        """The scaled matrix on its grid: what the Linear holds once its input scale is folded into what precedes it."""
        return QuantizedWeight(self.codes, self.scale, self.zero_point, self.bits, self.symmetric, self.group)

    def dequantize(self) -> Tensor:
        """The quantized weight in the original coordinates, fp32, shape (out, in)."""
        return self.on_grid().dequantize() / self.column_scale.float()

    def storage_bits(self) -> int:
        """Bits on disk: those of the scaled matrix and one number per input channel.

        Each Linear of a group counts the column scales, for each is stored by itself. Folding them into the preceding
        norm or Linear makes them free.
        """
        return self.on_grid().storage_bits() + self.column_scale.numel() * 8 * self.column_scale.element_size()


class AWQ(Quantizer):
    """AWQ for the Linears that share an input."""

    name = "awq"
    needs_inputs = True
    stream = "float"

    @dataclass(frozen=True)
    class Options:
        """Options of AWQ.

        Attributes:
            symmetric: Symmetric grid instead of one with a zero point.
            n_grid: Number of exponents that are tried, 0, 1/n, … (n − 1)/n.
            clip: Search clipped ranges after the scales.
            tokens: Calibration tokens that the searches use, in whole samples from the first.
        """

        symmetric: bool = False
        n_grid: int = 20
        clip: bool = True
        tokens: int = 4096

        def __post_init__(self) -> None:
            for name in ("n_grid", "tokens"):
                if getattr(self, name) < 1:
                    raise UserError(f"quantizer.awq.{name}: {getattr(self, name)} is not allowed; use 1 or more")

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        self.grid = Grid(bits.weight, options.symmetric, bits.group_size)

    @property
    def tokens(self) -> int:
        """See :attr:`bc.quantizers.base.Quantizer.tokens`."""
        return int(self.options.tokens)

    def quantize_group(self, group: Group) -> dict[str, SiteResult]:
        """See :meth:`bc.quantizers.base.Quantizer.quantize_group`."""
        if group.inputs is None or group.loss is None:
            raise QuantizationError("AWQ needs the inputs of the Linears and the loss of their part")
        x = group.inputs.float()
        if not finite(x):
            raise QuantizationError("the inputs hold NaN or Inf; check the model and its dtype")
        magnitude = x.abs().mean(0)
        best: dict[str, ScaledWeight] = {}
        best_loss, best_alpha, plain_loss = math.inf, 0.0, math.inf
        for step in range(self.options.n_grid):
            alpha = step / self.options.n_grid
            scale = column_scales(magnitude, alpha)
            candidate = {path: scaled_round(w, scale, self.grid) for path, w in group.weights.items()}
            loss = group.loss({path: w.dequantize() for path, w in candidate.items()})
            if step == 0:
                plain_loss = loss
            if loss < best_loss:
                best, best_loss, best_alpha = candidate, loss, alpha
        if not best:
            raise QuantizationError("no scale gives a finite error of the output")
        clipped: set[str] = set()
        if self.options.clip:
            best_loss, clipped = _clip(group, best, x, best_loss, self.grid)
        notes = {"alpha": best_alpha, "loss": best_loss, "loss_rtn": plain_loss}
        return {path: SiteResult(w, notes={**notes, "clipped": path in clipped}) for path, w in best.items()}

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> SiteResult:
        """Not possible: the scales belong to all Linears that share an input."""
        raise QuantizationError("AWQ quantizes the Linears that share an input together; use quantize_group")


def column_scales(magnitude: Tensor, alpha: float) -> Tensor:
    """Scale of each input channel.

    Args:
        magnitude: Mean |x| of each channel, shape (in,), ≥ 0.
        alpha: Exponent, 0 (no scaling) to 1.

    Returns:
        fp16, shape (in,): magnitude^alpha, divided by the geometric mean of its largest and smallest value.
    """
    active = magnitude > 0
    typical = magnitude[active].mean() if bool(active.any()) else magnitude.new_ones(())
    magnitude = torch.where(active, magnitude, typical)
    scale = magnitude.clamp(min=float(magnitude.max()) * SMALLEST).pow(alpha)
    return (scale / (scale.max() * scale.min()).sqrt()).half()


def scaled_round(weight: Tensor, column_scale: Tensor, grid: Grid) -> ScaledWeight:
    """Round a matrix to the grid of its scaled self.

    Args:
        weight: Shape (out, in), floating.
        column_scale: Shape (in,), positive, floating.
        grid: The grid's shape.
    """
    return _scaled(quantize_weight(weight.float() * column_scale.float(), grid), column_scale)


def clip_ranges(weight: Tensor, inputs: Tensor, grid: Grid) -> QuantizedWeight:
    """Quantize a matrix with the range of each row and group that has the least error of the output.

    The candidates cut every weight at c times the largest magnitude of its row and group, c = 1, 0.95, … 0.5. The error
    is ‖x (ŵ − w)ᵀ‖² over all inputs with the columns of that group alone, by their second moment.

    Args:
        weight: Shape (out, in), fp32.
        inputs: Shape (tokens, in), fp32.
        grid: The grid's shape.

    Returns:
        The matrix on its clipped grid.
    """
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    codes, scales, zeros = [], [], []
    for w, x in zip(weight.split(size, 1), inputs.split(size, 1), strict=True):
        moment = x.T @ x
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        largest = torch.maximum(-low, high)
        scale, zero = affine_range(low, high, grid.bits, grid.symmetric)
        best = torch.full_like(scale, math.inf)
        for step in range(CLIP_STEPS + 1):
            most = largest * (1 - (1 - CLIP_LOWEST) * step / CLIP_STEPS)
            s, z = affine_range(torch.maximum(low, -most), torch.minimum(high, most), grid.bits, grid.symmetric)
            change = fake_quantize(w, s, z, grid.bits) - w
            error = ((change @ moment) * change).sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        codes.append(encode(w, scale, zero, grid.bits).to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    group = group_index(weight.shape[1], grid.group_size, weight.device)
    parts = (torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1))
    return QuantizedWeight(*parts, grid.bits, grid.symmetric, group)


def _clip(
    group: Group, best: dict[str, ScaledWeight], inputs: Tensor, best_loss: float, grid: Grid
) -> tuple[float, set[str]]:
    """Clip one Linear after another, in place of ``best``, as long as the loss does not rise; returns what was kept."""
    assert group.loss is not None
    kept: set[str] = set()
    effective = {path: w.dequantize() for path, w in best.items()}
    scale = next(iter(best.values())).column_scale  # one for all
    scaled = torch.cat([weight.float() for weight in group.weights.values()]) * scale.float()
    sizes = [len(weight) for weight in group.weights.values()]
    clipped = _rows(clip_ranges(scaled, inputs / scale.float(), grid), sizes)  # rows are independent: searched at once
    for path, ranges in zip(group.weights, clipped, strict=True):
        trial = _scaled(ranges, scale)
        loss = group.loss({**effective, path: trial.dequantize()})
        if loss <= best_loss:
            best_loss, best[path], effective[path] = loss, trial, trial.dequantize()
            kept.add(path)
    return best_loss, kept


def _rows(q: QuantizedWeight, sizes: list[int]) -> list[QuantizedWeight]:
    """A matrix cut into consecutive runs of rows."""
    parts = zip(q.codes.split(sizes), q.scale.split(sizes), q.zero_point.split(sizes), strict=True)
    return [replace(q, codes=codes, scale=scale, zero_point=zero) for codes, scale, zero in parts]


def _scaled(q: QuantizedWeight, column_scale: Tensor) -> ScaledWeight:
    return ScaledWeight(q.codes, q.scale, q.zero_point, q.bits, q.symmetric, q.group, column_scale)
