"""What every quantizer is to the calibration engine.

A weight quantizer is pure maths on one weight matrix: it receives the matrix and, if it asks for it, the second moment
of the inputs. It knows nothing of models, blocks, streams or Bias Compensation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor, nn

from bc.activations import ActivationQuantizer
from bc.settings import Bits

T = TypeVar("T")


class Quantized(Protocol):
    """A quantized weight matrix in whatever form its quantizer stores it."""

    def dequantize(self) -> Tensor:
        """fp32 weight of shape (out, in)."""
        ...

    def storage_bits(self) -> int:
        """Bits that it takes on disk."""
        ...


STORABLE: dict[str, type] = {}


def storable(kind: str) -> Callable[[type[T]], type[T]]:
    """Let artefacts and checkpoints hold a form of quantized weight that a quantizer's own file defines.

    Args:
        kind: What files call it. The class is a dataclass of tensors and plain values; fields ``codes`` and
            ``zero_point`` are packed to ``bits`` bits, which then is a field too, and bool tensors to one.
    """

    def note(cls: type[T]) -> type[T]:
        STORABLE[kind] = cls
        return cls

    return note


@dataclass
class SiteResult:
    """How a site is quantized.

    Attributes:
        weight: The quantized weight in the float model's coordinates, as (out, in) or (out, in · kh · kw); None for a
            matmul and where the weight stays float.
        inputs: One activation quantizer for each input (the identity where an input stays float); empty where only
            weights are quantized.
        notes: Facts worth recording beside the result (``damping_retries``; metric of a search, its score at min-max
            and at the choice).
    """

    weight: Quantized | None
    inputs: list[ActivationQuantizer] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def storage_bits(self) -> int | None:
        """Bits that the weight takes on disk; None where there is none."""
        return None if self.weight is None else self.weight.storage_bits()


@dataclass
class Group:
    """Linears of a block that share an input, as the engine hands them to a quantizer.

    Attributes:
        weights: Path inside the block → float weight, shape (out, in).
        hessian: Mean of x xᵀ over calibration tokens, fp32, shape (in, in), if ``needs_hessian``.
        inputs: Calibration inputs of the group, shape (tokens, in), if ``needs_inputs``.
        loss: Path → candidate weight ↦ mean squared error of the output of the part of the block that the group opens
            (the attention, the MLP, or the Linears themselves) on calibration samples, if ``needs_inputs``. Linears
            that are left out keep their float weight.
    """

    weights: dict[str, Tensor]
    hessian: Tensor | None = None
    inputs: Tensor | None = None
    loss: Callable[[dict[str, Tensor]], float] | None = None


class Quantizer(ABC):
    """Base of all quantizers.

    Attributes:
        name: Registry name; empty for abstract bases.
        kind: ``weight`` (weights only) or ``weight_activation``.
        needs_hessian: Ask the engine for the second moment of each group's inputs.
        needs_inputs: Ask the engine for a group's inputs themselves and the loss of the part it opens.
        scales: Its weights have a field ``scale`` of shape (out, …) that takes a factor by row, as ``affine`` needs it.
        stream: Which model feeds a block while its quantizer looks: ``quantized`` (the blocks before it are quantized)
            or ``float``.
        Options: Dataclass of the quantizer's own options.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Literal["weight", "weight_activation"]] = "weight"
    needs_hessian: ClassVar[bool] = False
    scales: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = False
    stream: ClassVar[Literal["float", "quantized"]] = "quantized"

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, bits: Bits, options: Any) -> None:
        self.bits = bits
        self.options = options

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples are needed at all."""
        return self.needs_hessian or self.needs_inputs

    @property
    def tokens(self) -> int:
        """Calibration tokens that are enough, in whole samples from the first; 0 asks for all."""
        return 0

    def quantize_group(self, group: Group) -> dict[str, SiteResult]:
        """Quantize the Linears of a group; by default each by itself.

        Returns:
            Path → result, for every path of ``group.weights``.
        """
        return {path: self.quantize_weight(weight, group.hessian) for path, weight in group.weights.items()}

    @abstractmethod
    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> SiteResult:
        """Quantize one matrix.

        Args:
            weight: Shape (out, in), floating.
            hessian: Shape (in, in), fp32, the mean of x xᵀ over calibration tokens, if ``needs_hessian``.

        Returns:
            The quantized matrix and notes.

        Raises:
            QuantizationError: The result would not be valid.
        """


@dataclass
class SiteSamples:
    """A site of a vision model with what it was fed and returned on the float model, over all calibration images.

    Attributes:
        name: Dotted name.
        kind: ``linear``, ``conv`` or ``matmul``.
        role: ``patch_embed``, ``qkv``, ``proj``, ``fc1``, ``fc2`` (behind a GELU), ``mlp_out`` (an MLP's last Linear
            behind anything else), ``reduction``, ``head``, ``matmul_qk`` (q · kᵀ) or ``matmul_av`` (attention · v).
        heads: Attention heads, for ``qkv`` and the matmuls; 0 elsewhere.
        weight: Float weight (out, in), or (out, in, kh, kw) of a convolution; None for a matmul.
        bias: Float bias (out,), or None.
        inputs: The float inputs, images first: one tensor, or two for a matmul (A, B with output A @ B).
        output: The float output, images first.
        gradient: Gradient of the loss at the output, the output's shape; None where the metric needs none.
        forward: (weight or None, inputs) ↦ output of the site, for candidates.
        norm: The LayerNorm whose output is the site's only input, for methods that reparametrise it; else None.
        columns: Input of a convolution ↦ the patches its kernel sees, shape (images, positions, in · kh · kw), so that
            its output is their product with the weight; None where it is not one, and where nobody asks.
    """

    name: str
    kind: Literal["linear", "conv", "matmul"]
    role: str
    heads: int
    weight: Tensor | None
    bias: Tensor | None
    inputs: tuple[Tensor, ...]
    output: Tensor
    gradient: Tensor | None
    forward: Callable[[Tensor | None, tuple[Tensor, ...]], Tensor]
    norm: nn.LayerNorm | None = None
    columns: Callable[[Tensor], Tensor] | None = None


class SiteQuantizer(Quantizer):
    """Base of the quantizers of weights and activations.

    Calibration is parallel: every site sees the float model's inputs, so that the order of sites does not matter.

    Attributes:
        needs_gradient: Ask the engine for gradients at the sites' outputs (it may depend on the options).
    """

    kind = "weight_activation"

    @property
    def metric(self) -> str:
        """Metric of the search; ``none`` where nothing is searched."""
        return "none"

    @property
    def needs_gradient(self) -> bool:
        """Whether the search metric uses gradients."""
        return False

    @abstractmethod
    def quantize_site(self, site: SiteSamples) -> SiteResult:
        """Quantize one site.

        Raises:
            QuantizationError: By site name, where no valid result exists (for example an all-zero score).
        """

    def quantize_block(
        self, sites: list[SiteSamples], evaluate: Callable[[dict[str, SiteResult]], Tensor]
    ) -> dict[str, SiteResult]:
        """Quantize all the sites of a block; by default each by itself.

        Args:
            sites: In forward order.
            evaluate: Site name → candidate result ↦ the block's output on the calibration images with these sites
                quantized and the others float; with no candidates, the float output.
        """
        return {site.name: self.quantize_site(site) for site in sites}

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> SiteResult:
        """Not used: these quantizers work on sites."""
        raise NotImplementedError(f"{self.name} quantizes sites, not single matrices")
