"""APQ-ViT: calibration by the disturbance of the block's output, and a softmax grid that keeps the large values.

Ding, Qin, Yan, Chai, Liu, Wei and Liu, "Towards Accurate Post-Training Quantization for Vision Transformer", ACM MM
2022 (arXiv 2303.14341). Bottom-elimination blockwise calibration: candidates are judged at the output of the block,
with the diagonal Fisher information there, and only by the elements that matter most. Matthew-effect preserving
quantization: attention probabilities lie on an unsigned uniform grid whose end is their maximum, so that the few large
ones, which carry the attention, keep their order and size, and the many tiny ones become 0.

No code is published; what we define ourselves. The scales start from the better, by the block's score, of min-max and a
search of each site by its own output. Then, site by site in forward order, each operand's scales are multiplied by
common factors with all other sites of the block quantized as chosen so far, and the best is kept: no step lowers the
score. The score is minus the sum of the ``keep`` largest terms (g · (o − ô))² of each image, o the block's output and g
its gradient, which is the gradient at the last site of the block (exactly so where that site's output is added to the
residual as it is; with LayerScale up to a factor a channel). Sites outside blocks are searched by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bc.activation_grids import Affine, affine
from bc.activations import ActivationQuantizer
from bc.errors import QuantizationError, UserError
from bc.operands import Operand
from bc.quantizers.base import SiteResult, SiteSamples
from bc.quantizers.base_ptq import SearchQuantizer, in_float


class APQViT(SearchQuantizer):
    """APQ-ViT."""

    name = "apq_vit"

    @dataclass(frozen=True)
    class Options(SearchQuantizer.Options):
        """Options of APQ-ViT; see :class:`bc.quantizers.base_ptq.SearchQuantizer.Options` for those of a site's search.

        Attributes:
            keep: Fraction of the elements of the block's output that count, those with the largest terms.
            block_low: Smallest factor in the block's search.
            block_high: Largest factor in the block's search.
            block_candidates: Number of factors in the block's search, each one forward pass of the block.
            block_rounds: Turns of the block's search through its sites.
        """

        metric: Literal["fisher", "mse", "self_kl"] = "fisher"
        low: float = 0.01
        high: float = 1.2
        candidates: int = 100
        rounds: int = 3
        keep: float = 0.5
        block_low: float = 0.8
        block_high: float = 1.2
        block_candidates: int = 8
        block_rounds: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 < self.keep <= 1:
                raise UserError(f"quantizer.apq_vit.keep: {self.keep} is out of range; allowed: above 0, to 1")
            if not 0 < self.block_low < self.block_high:
                raise UserError(
                    f"quantizer.apq_vit.block_low: {self.block_low} is not allowed; it must lie between 0 and "
                    f"block_high={self.block_high}"
                )
            for name in ("block_candidates", "block_rounds"):
                if getattr(self, name) < 0:
                    raise UserError(f"quantizer.apq_vit.{name}: {getattr(self, name)} is not allowed; use 0 or more")

    def activation_operand(self, site: SiteSamples, index: int) -> Operand:
        """Attention probabilities on [0, maximum]; symmetric grids elsewhere."""
        if site.role != "matmul_av" or index != 0:
            return super().activation_operand(site, index)
        x, bits = site.inputs[0], self.bits.activation
        scale = x.amax() / (2**bits - 1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))

        def quantize(value: Tensor, parameters: Tensor) -> Tensor:
            return affine(value, parameters, torch.zeros_like(parameters), bits)

        def build(parameters: Tensor) -> ActivationQuantizer:
            return Affine(parameters[0].float(), torch.zeros((), device=x.device), bits)

        # One candidate: any smaller scale would clip the maximum, any larger one waste codes.
        return Operand(x, scale.reshape(1, 1), (1,) * x.dim(), quantize, build)

    def quantize_block(
        self, sites: list[SiteSamples], evaluate: Callable[[dict[str, SiteResult]], Tensor]
    ) -> dict[str, SiteResult]:
        """See :meth:`bc.quantizers.base.SiteQuantizer.quantize_block`."""
        sites = [in_float(site) for site in sites]
        target = evaluate({}).detach()
        target = target if target.dtype == torch.float64 else target.float()
        gradient = self._gradient(sites, target)

        def score(results: dict[str, SiteResult]) -> float:
            return block_score(evaluate(results).to(target), target, gradient, self.options.keep)

        found = {site.name: (site, *self.search(site)) for site in sites}
        searched = {name: self.result(*parts) for name, parts in found.items()}
        at_minmax = {
            (name, i): o.candidates[0]
            for name, (_, operands, _) in found.items()
            for i, o in enumerate(operands)
            if o.candidates is not None
        }
        minmax = {name: self._with(parts, name, at_minmax) for name, parts in found.items()}
        score_minmax, best = score(minmax), score(searched)
        from_minmax = not best >= score_minmax
        current = minmax if from_minmax else searched
        best = score_minmax if from_minmax else best
        if not math.isfinite(best):
            raise QuantizationError(f"{sites[0].name}: the block's score is not finite; check the model and its dtype")
        parameters = {
            (name, i): o.candidates[0] if from_minmax else o.chosen
            for name, (_, operands, _) in found.items()
            for i, o in enumerate(operands)
            if o.candidates is not None and len(o.candidates) > 1
        }
        steps = self.options.block_candidates
        factors = torch.linspace(self.options.block_low, self.options.block_high, steps).tolist() if steps else []
        for _ in range(self.options.block_rounds):
            improved = False
            for (name, index), start in list(parameters.items()):
                for factor in factors:
                    trial = {**parameters, (name, index): start * factor}
                    result = self._with(found[name], name, trial)
                    value = score({**current, name: result})
                    if value > best:
                        best, improved = value, True
                        current = {**current, name: result}
                        parameters = trial
            if not improved:
                break
        for result in current.values():
            notes = result.notes
            notes["site_score_minmax"], notes["site_score"] = notes["score_minmax"], notes["score"]
            notes |= {"score_minmax": score_minmax, "score": best, "keep": self.options.keep}
        return current

    def _with(
        self,
        parts: tuple[SiteSamples, tuple[Operand, Operand], dict[str, Any]],
        name: str,
        parameters: dict[tuple[str, int], Tensor],
    ) -> SiteResult:
        """A site's result with other parameters."""
        site, operands, notes = parts
        return self.result(site, operands, dict(notes), lambda i, chosen: parameters.get((name, i), chosen))

    def _gradient(self, sites: list[SiteSamples], output: Tensor) -> Tensor | None:
        """Gradient at the block's output: that of the last site, whose output has the block's shape."""
        if not self.needs_gradient:
            return None
        gradient = sites[-1].gradient
        if gradient is None or gradient.numel() != output.numel():
            raise QuantizationError(
                f"{sites[-1].name}: there is no gradient of the shape of the block's output {tuple(output.shape)}; "
                "choose quantizer.metric=mse"
            )
        return gradient.reshape(output.shape)


def block_score(output: Tensor, target: Tensor, gradient: Tensor | None, keep: float) -> float:
    """Minus the mean over images of the sum of the largest weighted squared disturbances; higher is better.

    Args:
        output: The block's output, images first.
        target: Its float output.
        gradient: Weights of the elements, or None for 1.
        keep: Fraction of an image's elements that count.
    """
    error = output - target
    if gradient is not None:
        error = error * gradient
    terms = error.square().flatten(1)
    kept = math.ceil(keep * terms.shape[1])
    if kept < terms.shape[1]:
        terms = terms.topk(kept, dim=1, sorted=False).values
    return -float(terms.sum(1).double().mean())
