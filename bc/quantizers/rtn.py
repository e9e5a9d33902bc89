"""Round-to-nearest (RTN): each weight goes to the nearest point of its own min-max grid; no data is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from bc.grid import Grid, quantize_weight
from bc.quantizers.base import Quantizer, SiteResult
from bc.settings import Bits


class RTN(Quantizer):
    """Round-to-nearest on an affine grid per row or group."""

    name = "rtn"

    @dataclass(frozen=True)
    class Options:
        """Options of RTN.

        Attributes:
            symmetric: Symmetric grid instead of one with a zero point.
            clip: ``minmax`` (the full range) or ``mse`` (the range with the least squared error).
            granularity: ``row``, or ``tensor`` for one scale per matrix.
        """

        symmetric: bool = False
        clip: Literal["minmax", "mse"] = "minmax"
        granularity: Literal["row", "tensor"] = "row"

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        self.grid = Grid(bits.weight, options.symmetric, bits.group_size, options.granularity, options.clip)

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None = None) -> SiteResult:
        """See :meth:`bc.quantizers.base.Quantizer.quantize_weight`; ``hessian`` is not used."""
        return SiteResult(quantize_weight(weight, self.grid))
