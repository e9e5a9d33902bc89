"""BasePTQ: uniform grids whose scales are searched layer by layer, the baseline of PTQ4ViT.

Yuan, Xue, Chen, Wu and Sun, "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform
Quantization", ECCV 2022 (arXiv 2111.12293), section 3.1: every weight and activation lies on a symmetric uniform grid;
with Δ the min-max scale, the scales are searched in [α Δ, β Δ] for the cosine between the layer's outputs. The base
class of the searching quantizers is here too.

Which values share a scale (``weight_granularity=paper``): the patch convolution's weights one scale per output channel,
the q, k and v rows one each, other weights one; the two operands of a matmul one per head; other inputs one. The patch
convolution's input, the image, stays float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bc.activation_grids import Symmetric, symmetric
from bc.activations import ActivationQuantizer
from bc.errors import QuantizationError, UserError
from bc.grid import QuantizedWeight, encode, group_index
from bc.operands import Operand, scale_factors
from bc.quantizers.base import SiteQuantizer, SiteResult, SiteSamples
from bc.racing import GRADIENT_METRICS
from bc.search import Metric, Mode, SiteSearch
from bc.settings import Bits

Granularity = Literal["paper", "row", "tensor"]
FLOAT = 16


def check_bits(name: str, bits: Bits) -> None:
    """Refuse bit widths that weight-and-activation quantizers do not have."""
    if bits.weight == 1:
        raise UserError(f"bits.weight: 1 does not go with quantizer {name!r}; allowed: 2 to 8, or 16 for float")
    if bits.group_size != -1:
        raise UserError(f"bits.group_size: {bits.group_size} does not go with quantizer {name!r}; set -1")


def in_float(site: SiteSamples) -> SiteSamples:
    """The site with its tensors in fp32, or in fp64 where they are."""

    def up(value: Tensor) -> Tensor:
        return value if value.dtype == torch.float64 else value.float()

    return replace(
        site,
        weight=None if site.weight is None else up(site.weight),
        bias=None if site.bias is None else up(site.bias),
        inputs=tuple(up(x) for x in site.inputs),
        output=up(site.output),
        gradient=None if site.gradient is None else up(site.gradient),
    )


def symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    """Min-max scale of a symmetric grid, absmax / (2^(b−1) − ½); 1 for zeros."""
    scale = largest / (2 ** (bits - 1) - 0.5)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def symmetric_weight(weight: Tensor, scale: Tensor, bits: int) -> QuantizedWeight:
    """A weight on its symmetric grid.

    Args:
        weight: Shape (out, in).
        scale: Shape (groups,): of equal runs of rows.
        bits: Bits per code.
    """
    scale = scale.float().repeat_interleave(1 if len(scale) == 1 else len(weight) // len(scale)).unsqueeze(1)
    zero = torch.full_like(scale, 2 ** (bits - 1))
    codes = encode(weight.float(), scale, zero, bits).to(torch.uint8)
    return QuantizedWeight(codes, scale, zero, bits, True, group_index(weight.shape[1], -1, weight.device))


def weight_groups(site: SiteSamples, granularity: str) -> int:
    """Number of scales of a site's weight."""
    assert site.weight is not None
    rows = len(site.weight)
    if granularity == "paper":
        return {"patch_embed": rows, "qkv": 3}.get(site.role, 1)
    return rows if granularity == "row" else 1


class SearchQuantizer(SiteQuantizer):
    """Base of the quantizers that search scales by the error of the site's output."""

    @dataclass(frozen=True)
    class Options:
        """Options of the search.

        Attributes:
            weight_granularity: Weights that share a scale: ``paper`` (see above), ``row`` or ``tensor``.
            metric: ``fisher`` (error weighted by the gradient of the loss), ``mse``, ``cosine``, or ``self_kl``
                (``fisher`` with the published code's gradient, which is zero up to rounding).
            low: Smallest factor of the min-max scale.
            high: End of the factors.
            candidates: Number of factors; min-max itself is tried besides.
            rounds: Most turns of the search through the two operands.
            memory_mib: Budget of the temporaries of candidates that are scored together.
            search: ``exact`` (the best of all candidates) or ``fast`` (gives up those that err much more than others
                on a part of the samples).
        """

        weight_granularity: Granularity = "paper"
        metric: Metric = "cosine"
        low: float = 0.5
        high: float = 1.2
        candidates: int = 100
        rounds: int = 1
        memory_mib: int = 512
        search: Mode = "exact"

        def __post_init__(self) -> None:
            if not 0 < self.low < self.high:
                raise UserError(f"quantizer.low: {self.low} is not allowed; it must lie between 0 and high={self.high}")
            for name in ("candidates", "rounds", "memory_mib"):
                if getattr(self, name) < 1:
                    raise UserError(f"quantizer.{name}: {getattr(self, name)} is not allowed; use 1 or more")

    def __init__(self, bits: Bits, options: Any) -> None:
        super().__init__(bits, options)
        check_bits(self.name, bits)

    @property
    def metric(self) -> str:
        """Metric of the search."""
        return str(self.options.metric)

    @property
    def needs_gradient(self) -> bool:
        """Whether the search metric uses gradients."""
        return self.metric in GRADIENT_METRICS

    @property
    def needs_data(self) -> bool:
        """Calibration samples are always needed."""
        return True

    def factors(self, like: Tensor) -> Tensor:
        """Candidate factors of a min-max scale, shape (candidates, 1)."""
        return scale_factors(self.options.low, self.options.high, self.options.candidates).to(like).unsqueeze(1)

    def quantize_site(self, site: SiteSamples) -> SiteResult:
        """See :meth:`bc.quantizers.base.SiteQuantizer.quantize_site`."""
        operands, notes = self.search(site)
        return self.result(site, operands, notes)

    def search(self, site: SiteSamples) -> tuple[tuple[Operand, Operand], dict[str, Any]]:
        """The operands of a site with the choices of the search, and notes."""
        site = in_float(site)
        operands = self.operands(site)
        options = self.options
        notes = SiteSearch(site, operands, self.metric, options.memory_mib, options.search).run(options.rounds)
        return operands, notes | {"weight_granularity": self.options.weight_granularity}

    def operands(self, site: SiteSamples) -> tuple[Operand, Operand]:
        """The two operands of a site, at min-max."""
        if site.kind == "matmul":
            return self.input_operand(site, 0), self.input_operand(site, 1)
        return self.weight_operand(site), self.input_operand(site, 0)

    def weight_operand(self, site: SiteSamples) -> Operand:
        """A weight on a symmetric grid with searched scales."""
        if site.weight is None:
            raise QuantizationError(f"{site.name}: a {site.kind} needs a weight")
        weight, bits = site.weight.flatten(1), self.bits.weight
        if bits == FLOAT:
            return Operand(weight, None)
        groups = weight_groups(site, self.options.weight_granularity)
        start = symmetric_scale(weight.reshape(groups, -1).abs().amax(1), bits)

        def quantize(value: Tensor, scale: Tensor) -> Tensor:
            return symmetric(value.reshape(1, groups, -1), scale, bits).reshape(-1, *value.shape[-2:])

        def build(scale: Tensor) -> QuantizedWeight:
            return symmetric_weight(weight, scale, bits)

        return Operand(weight, self.factors(start) * start, (groups, 1), quantize, build)

    def input_operand(self, site: SiteSamples, index: int) -> Operand:
        """An input of a site."""
        if self.bits.activation == FLOAT or site.role == "patch_embed":
            return Operand(site.inputs[index], None, build=lambda _: ActivationQuantizer())
        return self.activation_operand(site, index)

    def activation_operand(self, site: SiteSamples, index: int) -> Operand:
        """An input that is to be quantized: a symmetric grid with a searched scale, per head in a matmul."""
        x, bits = site.inputs[index], self.bits.activation
        if site.kind == "matmul" and site.heads:
            start = symmetric_scale(x.abs().movedim(-3, 0).flatten(1).amax(1), bits)
            shape: tuple[int, ...] = (*[1] * (x.dim() - 3), site.heads, 1, 1)
        else:
            start = symmetric_scale(x.abs().amax().reshape(1), bits)
            shape = (1,) * x.dim()

        def quantize(value: Tensor, scale: Tensor) -> Tensor:
            return symmetric(value, scale, bits)

        def build(scale: Tensor) -> ActivationQuantizer:
            return Symmetric(scale.float().reshape(-1, 1, 1) if len(scale) > 1 else scale[0].float(), bits)

        return Operand(x, self.factors(start) * start, shape, quantize, build)

    def result(
        self,
        site: SiteSamples,
        operands: tuple[Operand, Operand],
        notes: dict[str, Any],
        change: Callable[[int, Tensor], Tensor] = lambda _, parameters: parameters,
    ) -> SiteResult:
        """What the engine gets for the chosen parameters of the operands.

        Args:
            site: The site.
            operands: Its operands.
            notes: Facts to record.
            change: (index of an operand, its chosen parameters) ↦ parameters to use instead.
        """
        nothing = torch.empty(0)
        built = [o.build(nothing if o.candidates is None else change(i, o.chosen)) for i, o in enumerate(operands)]
        if site.kind == "matmul":
            return SiteResult(None, built, notes)
        return SiteResult(built[0], built[1:], notes)


class BasePTQ(SearchQuantizer):
    """BasePTQ: one turn of the search, cosine, factors 0.5 to 1.2."""

    name = "base_ptq"
