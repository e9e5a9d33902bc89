"""Where in a model a number that is not finite comes up first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bc.grid import finite


class _FoundError(Exception):
    """Ends the forward pass."""


def not_finite(model: nn.Module, forwards: Iterable[Callable[[], Any]]) -> FloatingPointError:
    """The error for a model that was seen to put out NaN; it names the place where that begins.

    Args:
        model: The model.
        forwards: Forward passes of it; as in :func:`first_not_finite`.
    """
    site = first_not_finite(model, forwards) or "the logits"
    return FloatingPointError(f"{site}: the output holds NaN or Inf; check the model's weights, biases and dtype")


@torch.no_grad()
def first_not_finite(model: nn.Module, forwards: Iterable[Callable[[], Any]]) -> str | None:
    """Name of the first module, in forward order, whose output holds NaN or Inf.

    Args:
        model: The model.
        forwards: Forward passes of it, tried in turn until one shows it.

    Returns:
        The module's dotted name, or None where all outputs are finite.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not finite(output):
                found.append(name)
                raise _FoundError

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n and not list(m.children())]
    try:
        for forward in forwards:
            try:
                forward()
            except _FoundError:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None
