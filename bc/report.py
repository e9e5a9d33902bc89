"""Per-site output errors, before and after compensation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bc.settings import Compensation


@dataclass
class ErrorSums:
    """Running sums of the errors of one site over a set of samples.

    ``before`` is without the site's own bias (biases of other sites stay active), ``after`` with it.
    """

    square_before: float = 0.0
    square_after: float = 0.0
    square_output: float = 0.0
    absolute_before: float = 0.0
    absolute_after: float = 0.0
    elements: int = 0

    def add(self, target: Tensor, output: Tensor, bias: Tensor | None, valid: Tensor | None) -> None:
        """Add one batch.

        Args:
            target: The float module's output, shape (batch, tokens, channels).
            output: The quantized module's output with its bias, the same shape.
            bias: The bias that is part of ``output``, broadcastable to it, or None.
            valid: bool, shape (batch, tokens): False entries are left out.
        """
        target, after = target.float(), output.float() - target.float()
        before = after if bias is None else after - bias.float()
        if valid is not None:
            target, after, before = (t.expand(target.shape)[valid] for t in (target, after, before))
        self.square_before += before.square().sum(dtype=torch.float64).item()
        self.square_after += after.square().sum(dtype=torch.float64).item()
        self.square_output += target.square().sum(dtype=torch.float64).item()
        self.absolute_before += before.abs().sum(dtype=torch.float64).item()
        self.absolute_after += after.abs().sum(dtype=torch.float64).item()
        self.elements += target.numel()

    def summary(self) -> dict[str, float]:
        """MSE and L1 (mean absolute error) per element, and MSE relative to the mean square of the float output."""
        n = max(self.elements, 1)
        reference = max(self.square_output, torch.finfo(torch.float64).tiny)
        return {
            "mse_before": self.square_before / n,
            "mse_after": self.square_after / n,
            "l1_before": self.absolute_before / n,
            "l1_after": self.absolute_after / n,
            "relative_before": self.square_before / reference,
            "relative_after": self.square_after / reference,
        }


@dataclass
class SiteReport:
    """What was done at one site.

    Attributes:
        site: Dotted name of the module.
        scope: ``layer`` of a site; of a part the name of the scope under which it is compensated.
        granularity: Of the site's bias; empty where it has none.
        bias_parameters: Values that its bias adds to the model; 0 where it was folded into a bias that was there.
        folded: The bias became part of the module's own.
        calibration: Errors on (a part of) the calibration samples.
        held_out: Errors on samples that were not used to fit.
        notes: What the quantizer recorded (for example damping retries).
    """

    site: str
    scope: str
    granularity: str = ""
    bias_parameters: int = 0
    folded: bool = False
    calibration: ErrorSums = field(default_factory=ErrorSums)
    held_out: ErrorSums = field(default_factory=ErrorSums)
    notes: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Flat record for a table: the fields, ``calibration_*`` and ``held_out_*`` errors, None where not measured."""
        out = {k: v for k, v in asdict(self).items() if k not in ("calibration", "held_out", "notes")}
        for part in ("calibration", "held_out"):
            sums: ErrorSums = getattr(self, part)
            for key, value in sums.summary().items():
                out[f"{part}_{key}"] = value if sums.elements else None
        return out | self.notes


@dataclass
class Report:
    """What quantization and compensation did to a model.

    Attributes:
        sites: A report for every quantized or compensated site.
        storage_bits: Bits of all quantized modules' weights, scales, zero points and own biases, and of all biases
            that compensation added.
        weights: Number of weights in the quantized modules.
        bias_parameters: Number of bias values added to the model.
        seconds_measure: Time spent on measuring errors, which is no part of fitting.
        settings: What it was compensated with; None for a float model.
    """

    sites: list[SiteReport]
    storage_bits: int
    weights: int
    bias_parameters: int
    seconds_measure: float = 0.0
    settings: Compensation | None = None

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized modules, over their number of weights."""
        return self.storage_bits / max(self.weights, 1)

    def error(self, part: str = "held_out") -> tuple[float, float] | None:
        """Mean relative output error of the quantized layers, (before, after); None where it was not measured."""
        rows = [getattr(s, part) for s in self.sites if s.scope == "layer"]
        rows = [r for r in rows if r.elements]
        if not rows:
            return None
        summaries = [r.summary() for r in rows]
        return (
            sum(s["relative_before"] for s in summaries) / len(rows),
            sum(s["relative_after"] for s in summaries) / len(rows),
        )
