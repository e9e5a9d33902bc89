"""GPTQ: column-by-column quantization with second-order error propagation.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv 2210.17323), Algorithm 1: with H the second moment of the inputs and U the upper
Cholesky factor of its inverse, column j is rounded and its error, divided by U_jj, is subtracted from the later columns
in proportion to U_j,·. What we define ourselves: a group's scale is always taken from weights that have received every
earlier column's update, and dead inputs (H_jj = 0) are zeroed before any scale is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bc.device import cpu_threads
from bc.errors import QuantizationError, UserError
from bc.grid import Grid, QuantizedWeight, decode, encode, finite, fit_range, group_index, weight_parameters
from bc.quantizers.base import Group, Quantizer, SiteResult
from bc.settings import Bits

INNER = 16  # columns between which single updates pass; wider ones are matrix products
MAX_DAMPING = 1.0
DAMPING_FACTOR = 10.0
LEAF = 128  # rows of a triangle that is inverted at once
PIECE = 2**18  # values that change places at once


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, list[float]]:
    """Upper Cholesky factor of the inverse of a damped second moment.

    Where a factorization fails, the damping is raised tenfold and recorded; beyond 1 × the mean diagonal it is an
    error. The result is never replaced by something else.

    Args:
        hessian: Shape (in, in), symmetric, positive diagonal, fp32 or fp64.
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        (U with Uᵀ U = (H + λ I)⁻¹, the damping fractions that were tried).

    Raises:
        QuantizationError: No damping up to 1 makes the matrix positive definite.
    """
    mean = hessian.diagonal().mean()
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    tried: list[float] = []
    while damping <= MAX_DAMPING:
        tried.append(damping)
        # With J the reversal of the order, J (H + λ I) J = L Lᵀ gives U = J L⁻¹ J: one factorization, in place.
        lower = hessian.flip(0, 1)
        lower.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(lower.mT, out=(lower.mT, failed))  # of a symmetric matrix, in LAPACK's order
        if not failed:
            _invert_lower(lower.mT)
            _reverse(lower)
            if finite(lower):
                return lower.mT, tried
        damping *= DAMPING_FACTOR
    raise QuantizationError(
        f"the second moment of the inputs is not positive definite with damping up to {tried[-1]:g} × its mean "
        "diagonal; raise quantizer.damping or give more calibration samples"
    )


def _invert_lower(matrix: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, half by half."""
    size = len(matrix)
    if size <= LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = size // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    below.copy_(last @ below)  # one product at a time, so that only one lies beside the matrix
    below.copy_((below @ first).neg_())


def _reverse(matrix: Tensor) -> None:
    """Reverse the order of a contiguous matrix's rows and of its columns, in place."""
    flat = matrix.view(-1)
    size, half = len(flat), len(flat) // 2
    for start in range(0, half, PIECE):
        stop = min(start + PIECE, half)
        front, back = flat[start:stop], flat[size - stop : size - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


class GPTQ(Quantizer):
    """GPTQ for one weight matrix."""

    name = "gptq"
    needs_hessian = True

    @dataclass(frozen=True)
    class Options:
        """Options of GPTQ.

        Attributes:
            symmetric: Symmetric grid instead of one with a zero point.
            clip: ``minmax`` or ``mse``.
            damping: Added to the diagonal of H, as a fraction of its mean.
            block_size: Columns whose updates are applied to the rest together.
            act_order: Quantize columns in order of decreasing H_jj.
            static_groups: Take all groups' scales from the original weights, before any update.
        """

        symmetric: bool = False
        clip: Literal["minmax", "mse"] = "minmax"
        damping: float = 0.01
        block_size: int = 128
        act_order: bool = False
        static_groups: bool = False

        def __post_init__(self) -> None:
            if not 0 < self.damping <= MAX_DAMPING:
                raise UserError(f"quantizer.gptq.damping: {self.damping} is out of range; allowed: above 0, to 1")
            if self.block_size < 1:
                raise UserError(f"quantizer.gptq.block_size: {self.block_size} is not allowed; use 1 or more")

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        self.grid = Grid(bits.weight, options.symmetric, bits.group_size, "row", options.clip)

    def quantize_group(self, group: Group) -> dict[str, SiteResult]:
        """All Linears of a group at once: they share the second moment, and rows do not see each other."""
        heights = [len(weight) for weight in group.weights.values()]
        quantized, notes = self._solve(torch.cat(list(group.weights.values())), group.hessian)
        results, start = {}, 0
        for path, height in zip(group.weights, heights, strict=True):
            results[path] = SiteResult(rows_of(quantized, start, start + height), notes=dict(notes))
            start += height
        return results

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> SiteResult:
        """See :meth:`bc.quantizers.base.Quantizer.quantize_weight`."""
        quantized, notes = self._solve(weight, hessian)
        return SiteResult(quantized, notes=notes)

    def _solve(self, weight: Tensor, hessian: Tensor | None) -> tuple[QuantizedWeight, dict[str, Any]]:
        if hessian is None:
            raise QuantizationError("GPTQ needs the second moment of the inputs")
        o = self.options
        quantized, tried = gptq(
            weight, hessian, self.grid, o.damping, o.block_size, act_order=o.act_order, static_groups=o.static_groups
        )
        return quantized, {"damping": tried[-1], "damping_retries": len(tried) - 1}


def rows_of(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some rows of a quantized matrix with scales per row, in memory of their own."""
    parts = {name: getattr(weight, name)[start:stop].clone() for name in ("codes", "scale", "zero_point")}
    return replace(weight, **parts, group=weight.group.clone())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    damping: float = 0.01,
    block_size: int = 128,
    *,
    act_order: bool = False,
    static_groups: bool = False,
) -> tuple[QuantizedWeight, list[float]]:
    """Quantize a matrix by GPTQ.

    Args:
        weight: Shape (out, in), floating.
        hessian: Shape (in, in), the second moment of the inputs up to a factor.
        grid: The grid's shape (granularity ``row``).
        damping: Fraction of the mean diagonal added to the diagonal.
        block_size: Columns per lazy update.
        act_order: Visit columns by decreasing diagonal of H; a dynamic group is then a run in visiting order.
        static_groups: Scales of all groups from the original weights; a group is then a run in column order.

    Returns:
        (quantized matrix in the original column order, damping fractions tried).

    Raises:
        QuantizationError: H cannot be factorized or the input is not finite.
    """
    h = hessian.float()
    if not finite(weight) or not finite(h):
        raise QuantizationError("the weight or the second moment of its inputs is not finite")
    columns = weight.shape[1]
    dead = h.diagonal() == 0
    w = weight.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # a column in one piece of memory
    if bool(dead.any()):
        live, h = h.diagonal()[~dead], h.clone()
        h.diagonal()[dead] = live.mean() if len(live) else 1.0  # whatever the unit of H, the damping stays as it is
        w[dead] = 0

    order = torch.arange(columns, device=w.device)
    if act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    run = group_index(columns, grid.group_size, w.device)
    group = run[order] if static_groups else run  # the group of each column in visiting order
    groups = int(run[-1]) + 1
    if static_groups or groups == 1:
        scale, zero = weight_parameters(w.T, grid)
    else:
        scale, zero = w.new_ones(len(weight), groups), w.new_zeros(len(weight), groups)
    if act_order:
        w, h = w[order], h[order][:, order]
    upper, tried = inverse_factor(h, damping)
    dynamic_size = grid.group_size if groups > 1 and not static_groups else 0
    codes = _sweep(w, upper, grid, scale, zero, group, block_size, dynamic_size)

    if act_order:
        back = torch.argsort(order)
        codes, group = codes[:, back], group[back]
    trivial = not (act_order and dynamic_size)
    return QuantizedWeight(codes, scale, zero, grid.bits, grid.symmetric, group, trivial), tried


def _sweep(
    w: Tensor, upper: Tensor, grid: Grid, scale: Tensor, zero: Tensor, group: Tensor, block_size: int, dynamic_size: int
) -> Tensor:
    """Visit the columns in order; fills ``scale`` and ``zero`` of dynamic groups, and returns the codes, (out, in).

    ``w`` is held transposed, (in, out), so that a column lies in one piece of memory, and is used up. A block's errors
    reach the columns behind it in one product when it is done. Inside it, runs of :data:`INNER` columns take what the
    block owes them when their turn comes, and only columns of one run are updated one by one.
    """
    scale_t, zero_t = scale.T.contiguous(), zero.T.contiguous()
    columns, rows = w.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=w.device)
    pivots, group_of = upper.diagonal().tolist(), group.tolist()
    errors = w.new_empty(min(block_size, columns), rows)

    def new_scale(j: int, start: int, last: int) -> None:
        """Scale of the dynamic group that begins at column j, of a block's run that ends before ``last``."""
        current = w[j : j + dynamic_size].clone()
        if j + dynamic_size > last:  # columns past this run have not had this block's updates yet
            late = slice(last, min(j + dynamic_size, columns))
            current[last - j :] -= upper[start:j, late].T @ errors[: j - start]
        s, z = fit_range(current.T, grid.bits, grid.symmetric, grid.clip)
        scale_t[group_of[j]], zero_t[group_of[j]] = s[:, 0], z[:, 0]

    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        for first in range(start, stop, INNER):
            last = min(first + INNER, stop)
            w[first:last] -= upper[start:first, first:last].T @ errors[: first - start]
            with cpu_threads(1):
                for j in range(first, last):
                    if dynamic_size and j % dynamic_size == 0:
                        new_scale(j, start, last)
                    s, z = scale_t[group_of[j]], zero_t[group_of[j]]
                    q = encode(w[j], s, z, grid.bits)
                    codes[j] = q
                    error = torch.sub(w[j], decode(q, s, z), out=errors[j - start]).div_(pivots[j])
                    w[j + 1 : last].addr_(upper[j, j + 1 : last], error, alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    scale.copy_(scale_t.T)
    zero.copy_(zero_t.T)
    return codes.T.contiguous()
