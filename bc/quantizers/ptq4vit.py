"""PTQ4ViT: twin uniform grids after softmax and GELU, and scales searched by a Hessian-guided metric.

Yuan, Xue, Chen, Wu and Sun, "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform
Quantization", ECCV 2022 (arXiv 2111.12293), sections 3.2 and 3.3. The input of fc2 behind a GELU has one scale for
positive values (searched) and a fixed range for negative ones, behind anything else a plain grid; attention
probabilities have a fine grid below a split 2^−i, searched, and one of [0, 1] above. The metric is −(g · (y − ŷ))², g
the gradient of the loss at the site's output: the diagonal Fisher information in place of the Hessian. Weight and
activation (or A and B) are searched in turns.

What we define ourselves: the gradient is that of a real loss (the published code's is zero up to rounding, and kept as
the metric ``self_kl``); an all-zero score is refused; the min-max scale itself is a candidate; values above the split
are not shifted by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bc.activation_grids import TwinGELU, TwinSoftmax, twin_gelu, twin_softmax
from bc.activations import ActivationQuantizer
from bc.operands import Operand
from bc.quantizers.base import SiteSamples
from bc.quantizers.base_ptq import SearchQuantizer, symmetric_scale
from bc.search import Metric

SPLITS = 20


class PTQ4ViT(SearchQuantizer):
    """PTQ4ViT."""

    name = "ptq4vit"

    @dataclass(frozen=True)
    class Options(SearchQuantizer.Options):
        """Options of PTQ4ViT; see :class:`bc.quantizers.base_ptq.SearchQuantizer.Options`.

        Attributes:
            twin: Twin uniform grids; without, uniform ones (an ablation).
        """

        metric: Metric = "fisher"
        low: float = 0.01
        high: float = 1.2
        candidates: int = 100
        rounds: int = 3
        twin: bool = True

    def activation_operand(self, site: SiteSamples, index: int) -> Operand:
        """Twin grids after GELU and softmax, symmetric ones elsewhere."""
        if self.options.twin and site.role == "fc2":
            return self._gelu(site.inputs[index])
        if self.options.twin and site.role == "matmul_av" and index == 0:
            return self._softmax(site.inputs[index])
        return super().activation_operand(site, index)

    def _gelu(self, x: Tensor) -> Operand:
        bits = self.bits.activation
        # The negative range is fixed, so that the scale is for the positive values alone.
        start = symmetric_scale(x.amax().clamp(min=0).reshape(1), bits)

        def quantize(value: Tensor, scale: Tensor) -> Tensor:
            return twin_gelu(value, scale, bits)

        def build(scale: Tensor) -> ActivationQuantizer:
            return TwinGELU(scale[0].float(), bits)

        return Operand(x, self.factors(start) * start, (1,) * x.dim(), quantize, build)

    def _softmax(self, x: Tensor) -> Operand:
        bits = self.bits.activation
        splits = torch.exp2(-torch.arange(SPLITS).to(x)).unsqueeze(1)  # the first, 1, is the plain grid of [0, 1]

        def quantize(value: Tensor, split: Tensor) -> Tensor:
            return twin_softmax(value, split, bits)

        def build(split: Tensor) -> ActivationQuantizer:
            return TwinSoftmax(split[0].float(), bits)

        return Operand(x, splits, (1,) * x.dim(), quantize, build)
