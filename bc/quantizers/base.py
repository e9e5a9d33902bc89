"""What every quantizer is to the calibration engine.

A weight quantizer is pure maths on one weight matrix: it receives the matrix and, if it asks for it, the second moment
of the inputs. It knows nothing of models, blocks, streams or Bias Compensation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from bc.settings import Bits


class Quantized(Protocol):
    """A quantized weight matrix in whatever form its quantizer stores it."""

    def dequantize(self) -> Tensor:
        """fp32 weight of shape (out, in)."""
        ...

    def storage_bits(self) -> int:
        """Bits that it takes on disk."""
        ...


@dataclass
class WeightResult:
    """What a quantizer returns for one matrix.

    Attributes:
        weight: The quantized matrix.
        notes: Facts worth recording beside the result (for example ``damping_retries``).
    """

    weight: Quantized
    notes: dict[str, Any] = field(default_factory=dict)


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
        stream: Which model feeds a block while its quantizer looks: ``quantized`` (the blocks before it are quantized)
            or ``float``.
        Options: Dataclass of the quantizer's own options.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Literal["weight", "weight_activation"]] = "weight"
    needs_hessian: ClassVar[bool] = False
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

    def quantize_group(self, group: Group) -> dict[str, WeightResult]:
        """Quantize the Linears of a group; by default each by itself.

        Returns:
            Path → result, for every path of ``group.weights``.
        """
        return {path: self.quantize_weight(weight, group.hessian) for path, weight in group.weights.items()}

    @abstractmethod
    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> WeightResult:
        """Quantize one matrix.

        Args:
            weight: Shape (out, in), floating.
            hessian: Shape (in, in), fp32, the mean of x xᵀ over calibration tokens, if ``needs_hessian``.

        Returns:
            The quantized matrix and notes.

        Raises:
            QuantizationError: The result would not be valid.
        """
