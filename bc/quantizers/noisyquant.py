"""NoisyQuant: a fixed uniform noise on the activations before they are quantized, removed again after the product.

Liu, Yang, Dong, Keutzer, Du and Zhang, "NoisyQuant: Noisy Bias-Enhanced Post-Training Activation Quantization for
Vision Transformers", CVPR 2023 (arXiv 2211.16056), section 3: on top of a given quantizer q, a noise N drawn once from
U(−n, n), one value an input channel and the same for every token, is added to the input of a Linear, and the Linear's
bias takes its image back, ŷ = Ŵ q(x + N) + (b − Ŵ N). Peaks of the distribution that would all be rounded one way are
spread over a bin. n is searched by the error of the output.

``base=linear`` is the paper's NoisyQuant-Linear, on EasyQuant; ``base=ptq4vit`` is NoisyQuant-PTQ4ViT. Matmuls have no
bias to take the noise back and are left to the base. What we define ourselves: n is tried from 0 (no noise, so that the
base is never undercut on the calibration images) to a multiple of the base's step.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bc.activation_grids import Noisy, Symmetric, TwinGELU
from bc.errors import UserError
from bc.operands import Operand
from bc.quantizers.base import SiteQuantizer, SiteResult, SiteSamples
from bc.quantizers.base_ptq import FLOAT, Granularity, SearchQuantizer, check_bits, in_float
from bc.quantizers.easyquant import EasyQuant
from bc.quantizers.ptq4vit import PTQ4ViT
from bc.search import Mode, SiteSearch
from bc.settings import Bits


class NoisyQuant(SiteQuantizer):
    """NoisyQuant on top of a searched quantizer."""

    name = "noisyquant"

    @dataclass(frozen=True)
    class Options:
        """Options of NoisyQuant.

        Attributes:
            base: The quantizer below: ``linear`` (EasyQuant) or ``ptq4vit``.
            weight_granularity: Weights that share a scale: ``paper``, ``row`` or ``tensor``, as in the base.
            metric: Metric of the base's search; ``base`` is the base's own. The noise is searched by ``mse``.
            noise_high: Largest noise that is tried, in steps of the activation's grid.
            noise_candidates: Number of noise ranges that are tried besides none.
            seed: Of the noise, together with the site's name.
            memory_mib: Budget of the temporaries of candidates that are scored together.
            search: ``exact`` (the best of all candidates) or ``fast``, of the base's search and the noise's.
        """

        base: Literal["linear", "ptq4vit"] = "linear"
        weight_granularity: Granularity = "paper"
        metric: Literal["base", "fisher", "mse", "cosine", "self_kl"] = "base"
        noise_high: float = 2.0
        noise_candidates: int = 20
        seed: int = 0
        memory_mib: int = 512
        search: Mode = "exact"

        def __post_init__(self) -> None:
            if self.noise_high <= 0:
                raise UserError(f"quantizer.noisyquant.noise_high: {self.noise_high} is not allowed; use more than 0")
            for name in ("noise_candidates", "memory_mib"):
                if getattr(self, name) < 1:
                    raise UserError(f"quantizer.noisyquant.{name}: {getattr(self, name)} is not allowed; use 1 or more")

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        check_bits(self.name, bits)
        cls: type[SearchQuantizer] = EasyQuant if options.base == "linear" else PTQ4ViT
        shared: dict[str, Any] = {"weight_granularity": options.weight_granularity, "memory_mib": options.memory_mib}
        shared["search"] = options.search
        if options.metric != "base":
            shared["metric"] = options.metric
        self.base = cls(bits, cls.Options(**shared))

    @property
    def metric(self) -> str:
        """Metric of the base's search."""
        return self.base.metric

    @property
    def needs_gradient(self) -> bool:
        """Whether the base's search uses gradients."""
        return self.base.needs_gradient

    @property
    def needs_data(self) -> bool:
        """Calibration samples are always needed."""
        return True

    def quantize_site(self, site: SiteSamples) -> SiteResult:
        """See :meth:`bc.quantizers.base.SiteQuantizer.quantize_site`."""
        result = self.base.quantize_site(site)
        result.notes["base"] = self.options.base
        if site.kind != "linear" or self.bits.activation == FLOAT:
            return result
        base = result.inputs[0]
        assert isinstance(base, Symmetric | TwinGELU)
        site = in_float(site)
        x, weight = site.inputs[0], site.weight
        assert weight is not None
        step, count = float(base.scale), self.options.noise_candidates
        ranges = step * self.options.noise_high * torch.arange(count + 1).to(x) / count
        unit = unit_noise(site.name, x.shape[-1], self.options.seed).to(x)
        quantized = weight if result.weight is None else result.weight.dequantize().to(weight)

        def noisy(value: Tensor, ranges: Tensor) -> Tensor:
            noise = ranges * unit
            return base(value + noise).sub_(noise)

        operands = Operand(quantized, None), Operand(x, ranges.unsqueeze(1), (1,) * x.dim(), noisy)
        search = SiteSearch(site, operands, "mse", self.options.memory_mib, self.options.search)
        best = int(search.choose(1))
        none, score = (float(search.scores(1, only=torch.tensor([i]))) for i in (0, best))
        result.notes |= {
            "noise_range": float(ranges[best]),
            "noise_score_none": none,
            "noise_score": score,
        }
        if best:
            result.inputs[0] = Noisy(base, (ranges[best] * unit).float())
        return result


def unit_noise(name: str, size: int, seed: int) -> Tensor:
    """The noise of a site before it is scaled: U(−1, 1), shape (size,), the same for the same name and seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.rand(size, generator=generator) * 2 - 1
