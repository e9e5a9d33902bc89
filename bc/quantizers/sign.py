"""Plain sign binarization: one bit a weight, one scale a row or group. The baseline of binary quantizers.

Rastegari, Ordonez, Redmon and Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
ECCV 2016 (arXiv 1603.05279), section 3.1: W ≈ α sign(W) has the least squared error at α = mean |W|. No data is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bc.errors import QuantizationError, UserError
from bc.grid import finite, group_index
from bc.quantizers.base import Quantizer, SiteResult, storable
from bc.settings import Bits


@storable("sign")
@dataclass
class SignWeight:
    """A weight matrix of signs.

    Attributes:
        signs: bool, shape (out, in); True is +.
        scale: fp16, shape (out, groups).
        group: int64, shape (in,): the group of each column.
    """

    signs: Tensor
    scale: Tensor
    group: Tensor

    def dequantize(self) -> Tensor:
        """The binarized weight, fp32, shape (out, in)."""
        return self.scale.float()[:, self.group] * (self.signs.float() * 2 - 1)

    def storage_bits(self) -> int:
        """Bits on disk: signs and scales; the groups are runs of equal length."""
        return self.signs.numel() + self.scale.numel() * 8 * self.scale.element_size()


class Sign(Quantizer):
    """Signs with mean magnitudes as scales."""

    name = "sign"

    def __init__(self, bits: Bits, options: Any) -> None:
        super().__init__(bits, options)
        if bits.weight != 1:
            raise UserError(f"bits.weight: {bits.weight} does not go with quantizer 'sign'; set bits=w1")

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None = None) -> SiteResult:
        """See :meth:`bc.quantizers.base.Quantizer.quantize_weight`; ``hessian`` is not used."""
        w, size = weight.float(), self.bits.group_size
        parts = w.split(w.shape[1] if size == -1 else size, dim=1)
        scale = torch.cat([part.abs().mean(1, keepdim=True) for part in parts], 1).half()
        if not finite(scale):
            raise QuantizationError("a scale is too large for half precision; check the weight")
        return SiteResult(SignWeight(w >= 0, scale, group_index(w.shape[1], size, w.device)))
