"""The readout: a linear map from what a classifier's head reads to the error of its logits.

Whatever the blocks could not make good reaches the logits through the head alone, and of the features that it reads
some directions still tell what the float model would have said. The ridge regression of the logits' error on them, over
the samples that biases are fitted on, is a closed form with classes × features values at most, of the order of 0.01
bits per weight. The penalty is the one that errs least on the half of the samples that the map was not fitted on, and
the map is kept only where it explains these at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bc.calibration import Stream
from bc.linear_map import RidgeSums, attach_map
from bc.parts import Captured, find, run_captured
from bc.report import SiteReport
from bc.sites import Region, Unit
from bc.statistics import odd_samples

if TYPE_CHECKING:
    from bc.chains import Chain
    from bc.fitting import Fit

PENALTIES = tuple(10.0 ** (step / 2) for step in range(-6, 5))  # of the mean diagonal of the features' second moment
SHARE = 0.5  # of the budget, at most

Outputs = list[list[Tensor]]  # of every head, by batch


class Readout:
    """The maps of a model's heads.

    Args:
        chain: The model.
        values: What its budget allows all biases to store, in values.

    Attributes:
        ranks: Head → most rank of its map; None is any, 0 is no map.
        size: Values that maps of these ranks store.
        goals: What the float heads return, once :meth:`aim` has been called.
    """

    def __init__(self, chain: Chain, values: float) -> None:
        heads = {name: chain.model.get_submodule(name) for name in chain.heads}
        self.ranks = {name: most_rank(head, SHARE * values / len(heads)) for name, head in heads.items()}
        self.size = sum(map_size(head, self.ranks[name]) for name, head in heads.items())
        self.goals: Outputs = []

    def aim(self, fit: Fit, unit: Unit, source: nn.Module) -> None:
        """Note what the float heads of the last unit return, while the float stream stands at its input."""
        assert fit.float_fit is not None
        _, self.goals = head_outputs(fit.float_fit, unit, source)

    def fit(self, fit: Fit, unit: Unit) -> list[SiteReport]:
        """Fit and attach the maps of the last unit's heads, which are quantized and compensated."""
        assert fit.quantized_fit is not None
        read, returned = head_outputs(fit.quantized_fit, unit, unit.module)
        reports = []
        for site, x, goal, got in zip(unit.sites, read, self.goals, returned, strict=True):
            errors = [g.float() - o.float() for g, o in zip(goal, got, strict=True)]
            rank = self.ranks[site.name]
            weights = None if rank == 0 else solve(halves(x, errors), rank)
            report = SiteReport(site.name, "readout")
            if weights is not None:
                report.granularity = "linear"
                report.bias_parameters = attach_map(find(unit.module, unit.path(site)), weights, fit.dtype, rank).size
            reports.append(report)
        return reports


def most_rank(head: nn.Module, values: float) -> int | None:
    """The rank that so many values allow the map of a head to have; None is any, 0 is no map."""
    own: Any = head
    inputs, outputs = own.in_features, own.out_features
    if values >= inputs * outputs + outputs:
        return None
    return max(0, int((values - outputs) // (inputs + outputs)))


def map_size(head: nn.Module, rank: int | None) -> int:
    """Values of a map of this rank (see :func:`most_rank`)."""
    own: Any = head
    inputs, outputs = own.in_features, own.out_features
    return (inputs * outputs if rank is None else rank * (inputs + outputs)) + (0 if rank == 0 else outputs)


def head_outputs(stream: Stream, unit: Unit, module: nn.Module) -> tuple[Outputs, Outputs]:
    """What the heads of the last unit read and return; ``module`` is the unit's or a copy of it."""
    parts = [Captured(module, Region(unit.path(site), unit.path(site))) for site in unit.sites]
    read: Outputs = [[] for _ in parts]
    returned: Outputs = [[] for _ in parts]
    for b in range(len(stream)):
        run_captured(stream, module, b, parts, whole=False)
        for i, part in enumerate(parts):
            read[i].append(part.args[0])
            returned[i].append(part.output)
    return read, returned


def halves(features: list[Tensor], errors: list[Tensor]) -> tuple[RidgeSums, RidgeSums]:
    """Sums of the even and of the odd samples; features and errors are batches of shape (samples, values)."""
    sums = [RidgeSums(features[0].shape[-1], errors[0].shape[-1], features[0].device) for _ in range(2)]
    seen = 0
    for x, error in zip(features, errors, strict=True):
        odd = odd_samples(seen, len(x), 1, x.device)
        for half, rows in zip(sums, (~odd, odd), strict=True):
            if bool(rows.any()):
                half.add(x[rows], error[rows])
        seen += len(x)
    return sums[0], sums[1]


def solve(sums: tuple[RidgeSums, RidgeSums], rank: int | None) -> Tensor | None:
    """Weights of (x, 1), fp64, shape (in + 1, out), from all samples; None where no map explains what it has not seen.

    Args:
        sums: Of two halves of the samples.
        rank: Most rank; None is any.
    """
    if not all(float(half.moment[-1, -1]) for half in sums):
        return None

    def fitted(half: RidgeSums, penalty: float) -> Tensor:
        weights = half.solve(penalty)
        return weights if rank is None else half.reduced(weights, rank)

    pairs = (sums, sums[::-1])
    errors = {p: sum(other.residual(fitted(half, p)) for half, other in pairs) for p in PENALTIES}
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= sums[0].square + sums[1].square:
        return None
    return fitted(sums[0].plus(sums[1]), best)
