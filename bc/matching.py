"""Which settings of Bias Compensation a quantizer's weights and statistics serve."""

from __future__ import annotations

from bc.errors import UserError
from bc.quantizers import available
from bc.quantizers.base import Quantizer
from bc.settings import Compensation


def check_goes_with(settings: Compensation, quantizer: Quantizer | type[Quantizer]) -> None:
    """Refuse settings that a quantizer's weights or statistics do not serve.

    Raises:
        UserError: Naming the setting, and what serves it.
    """
    if settings.stream == "calibration" and settings.enabled:
        require_second_moments(quantizer)
    if settings.method == "affine" and settings.enabled and not quantizer.scales:
        raise UserError(
            f"bc.method: affine needs weights with scales by row, which {quantizer.name!r} has not; set bc.method=bias"
        )


def require_second_moments(quantizer: Quantizer | type[Quantizer]) -> None:
    """Refuse a quantizer that does not see its inputs by way of their second moments.

    Raises:
        UserError: Naming those that do.
    """
    if not quantizer.needs_hessian:
        able = ", ".join(name for name, cls in available().items() if cls.needs_hessian)
        raise UserError(
            f"bc.stream: 'calibration' takes the inputs of the quantizer's second moments, and {quantizer.name!r} has "
            f"none; set bc.stream=float, or one of {able} as quantizer"
        )
