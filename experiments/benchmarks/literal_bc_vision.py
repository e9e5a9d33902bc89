"""Layer-scope Bias Compensation of a vision model, literally as its protocol says: a peer of our own and an oracle.

Gong et al. (arXiv 2404.01892), vision protocol, step 3: every convolution, Linear and attention matmul is fed with its
float input in both models, in a pass of its own, batch 16, and gets the mean difference of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 16


@torch.no_grad()
def biases(
    model: nn.Module, quantized: Mapping[str, nn.Module], sites: Sequence[str], images: Tensor
) -> dict[str, Tensor]:
    """Mean over images of the difference of every site's outputs.

    Args:
        model: The float model.
        quantized: Name of a site → its quantized module.
        sites: Dotted names.
        images: Floating, shape (images, channels, height, width).

    Returns:
        Name → fp32 mean of float minus quantized output, the output's shape without the batch axis.
    """
    found: dict[str, Tensor] = {}
    for name in sites:
        total: Any = 0.0
        seen = 0
        for batch in images.split(BATCH):
            caught: list[tuple[Any, Tensor]] = []
            handle = model.get_submodule(name).register_forward_hook(
                lambda m, args, output, caught=caught: caught.append((args, output))
            )
            model(batch)
            handle.remove()
            args, goal = caught[0]
            total = total + (goal - quantized[name](*args)).double().sum(0)
            seen += len(goal)
        found[name] = (total / seen).float()
    return found
