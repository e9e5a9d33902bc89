"""Where in a model a number that is not finite comes up first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _FoundError(Exception):
    """Ends the forward pass."""


@torch.no_grad()
def first_not_finite(model: nn.Module, batches: Iterable[Tensor]) -> str | None:
    """Name of the first module, in forward order, whose output holds NaN or Inf.

    Args:
        model: On the device of the batches.
        batches: Token ids, shape (batch, tokens); tried in turn until one shows it.

    Returns:
        The module's dotted name, or None where all outputs are finite.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all()):
                found.append(name)
                raise _FoundError

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n and not list(m.children())]
    try:
        for ids in batches:
            try:
                model(input_ids=ids, use_cache=False)
            except _FoundError:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None
