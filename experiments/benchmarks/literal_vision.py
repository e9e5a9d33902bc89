"""The candidate search as it is published, module by module: what ours is measured against, and checked against.

Written from Yuan, Xue, Chen, Wu and Sun, "PTQ4ViT", ECCV 2022 (arXiv 2111.12293), sections 3.2 to 3.4: for every
module, one after the other, a pass of the model forward and back gives its inputs, its output and the gradient there;
then, in each round, all candidates of the one operand are applied and the outputs that they give are compared with the
float output, and the best is kept; then those of the other operand. Nothing here comes from the search in ``bc``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bc.calibration import hooked
from bc.sites import Site

GELU_MINIMUM = 0.1699712075  # −min of x · Φ(x)
SPLITS = 20


@dataclass(frozen=True)
class Protocol:
    """Settings of the search.

    Attributes:
        weight_bits: Bits of a weight.
        activation_bits: Bits of an activation.
        metric: ``fisher``, ``mse`` or ``cosine``.
        low: Smallest factor of the min-max scale.
        high: End of the factors.
        candidates: Number of factors; min-max itself is tried besides.
        rounds: Rounds through the two operands.
        twin: Twin uniform grids after GELU and softmax.
        memory_mib: Size of the outputs of the candidates that are computed together.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    metric: str = "fisher"
    low: float = 0.01
    high: float = 1.2
    candidates: int = 100
    rounds: int = 3
    twin: bool = True
    memory_mib: int = 512


@dataclass
class Recorded:
    """What one module was fed and returned over all images, and the gradient of the loss at its output."""

    inputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def calibrate(
    model: nn.Module, sites: list[Site], images: list[Tensor], protocol: Protocol, seed: int
) -> dict[str, tuple[Tensor, ...]]:
    """Search the scales of modules, one after the other.

    Args:
        model: The float model.
        sites: Its modules that are quantized.
        images: Calibration images, in batches.
        protocol: Settings.
        seed: Of the labels that the gradient is taken for, drawn from the model's own distribution.

    Returns:
        Name → parameters of the two operands, each of shape (groups,); of a float operand empty.
    """
    return {site.name: search(site, record(model, site, images, protocol, seed), protocol) for site in sites}


def record(model: nn.Module, site: Site, images: list[Tensor], protocol: Protocol, seed: int) -> Recorded:
    """One pass of the model for one module: forward, and back if the metric asks for gradients."""
    found = Recorded()
    weighted = protocol.metric == "fisher"

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found.inputs.append(tuple(x.detach() for x in args))
        found.outputs.append(output)
        if weighted:
            output.retain_grad()

    generator = torch.Generator().manual_seed(seed)
    for batch in images:
        with torch.set_grad_enabled(weighted), hooked({site.module: keep}, inputs=False):
            scores = model(batch.clone().requires_grad_(weighted))
            if weighted:
                drawn = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(scores, drawn, reduction="sum").backward()
        output = found.outputs[-1]
        if weighted:
            assert output.grad is not None
            found.gradients.append(output.grad)
        found.outputs[-1] = output.detach()
    return found


def uniform(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric uniform grid."""
    half = 2 ** (bits - 1)
    return torch.clamp(torch.round(x / scale), -half, half - 1) * scale


def twin_gelu(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """A scale for positive values, a fixed one for negative ones."""
    half = 2 ** (bits - 1)
    negative = GELU_MINIMUM / half
    positive = torch.clamp(torch.round(x / scale), 0, half - 1) * scale
    return positive + torch.clamp(torch.round(x / negative), -half, 0) * negative


def twin_softmax(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """A fine grid up to the split, a coarse one on [0, 1] above it."""
    levels = 2 ** (bits - 1) - 1
    fine = torch.clamp(torch.round(x * (levels / split)), 0, levels) * (split / levels)
    coarse = torch.clamp(torch.round(x * levels), 0, levels) / levels
    return torch.where(x <= split, fine, coarse)


class Factor:
    """One operand: its candidates, and what it is with them.

    Attributes:
        candidates: Shape (candidates, groups), or None where it stays float.
        choice: Parameters as chosen so far, shape (groups,).
    """

    def __init__(self, value: Tensor, groups: int, axis: int, bits: int, grid: Any, candidates: Tensor | None) -> None:
        self.value, self.groups, self.axis, self.bits, self.grid = value, groups, axis, bits, grid
        self.candidates = candidates
        self.choice = value.new_zeros(0) if candidates is None else candidates[0]

    def quantized(self, parameters: Tensor) -> Tensor:
        """Values for candidates (c, groups): shape (c, *value)."""
        if self.candidates is None:
            return self.value.unsqueeze(0)
        shape = [len(parameters), *[1] * self.value.dim()]
        shape[1 + self.axis] = self.value.shape[self.axis] if self.groups > 1 else 1
        each = parameters.repeat_interleave(shape[1 + self.axis] // self.groups, 1) if self.groups > 1 else parameters
        return self.grid(self.value.unsqueeze(0), each.reshape(shape), self.bits)


def scales(value: Tensor, groups: int, axis: int, bits: int, protocol: Protocol, positive: bool = False) -> Tensor:
    """Candidate scales, shape (candidates, groups), the first min-max."""
    moved = value.movedim(axis, 0).reshape(groups, -1)
    largest = moved.amax(1).clamp(min=0) if positive else moved.abs().amax(1)
    start = largest / (2 ** (bits - 1) - 0.5)
    start = torch.where(start > 0, start, torch.ones_like(start))
    count, span = protocol.candidates, protocol.high - protocol.low
    factors = torch.cat([torch.ones(1), protocol.low + torch.arange(count) * (span / count)])
    return factors[:, None] * start


def factors_of(site: Site, inputs: tuple[Tensor, ...], protocol: Protocol) -> tuple[Factor, Factor]:
    """The operands of a module: weight and input, or the inputs of a matmul."""

    def activation(index: int) -> Factor:
        x, bits = inputs[index], protocol.activation_bits
        if site.role == "patch_embed":
            return Factor(x, 1, 0, bits, uniform, None)
        if protocol.twin and site.role == "fc2":
            return Factor(x, 1, 0, bits, twin_gelu, scales(x, 1, 0, bits, protocol, positive=True))
        if protocol.twin and site.role == "matmul_av" and index == 0:
            return Factor(x, 1, 0, bits, twin_softmax, torch.exp2(-torch.arange(SPLITS).to(x))[:, None])
        groups = site.heads if site.kind == "matmul" else 1
        return Factor(x, groups, 1, bits, uniform, scales(x, groups, 1, bits, protocol))

    if site.kind == "matmul":
        return activation(0), activation(1)
    weight: Tensor = site.module.weight  # type: ignore[assignment]
    groups = {"patch_embed": len(weight), "qkv": 3}.get(site.role, 1)
    bits = protocol.weight_bits
    return Factor(weight, groups, 0, bits, uniform, scales(weight, groups, 0, bits, protocol)), activation(0)


def search(site: Site, recorded: Recorded, protocol: Protocol) -> tuple[Tensor, ...]:
    """Search the two operands of a module in turns; arguments as in :func:`calibrate`."""
    inputs = tuple(torch.cat(parts) for parts in zip(*recorded.inputs, strict=True))
    target = torch.cat(recorded.outputs)
    gradient = torch.cat(recorded.gradients) if recorded.gradients else None
    pair = factors_of(site, inputs, protocol)
    parts = max(f.groups for f in pair)
    chunk = max(1, protocol.memory_mib * 2**20 // (target.element_size() * target.numel()))
    for _ in range(protocol.rounds):
        for index, factor in enumerate(pair):
            if factor.candidates is None:
                continue
            other = pair[1 - index].quantized(pair[1 - index].choice[None])
            scores = []
            for some in factor.candidates.split(chunk):
                mine = factor.quantized(some)
                outputs = product(site, *((mine, other) if index == 0 else (other, mine)))
                scores.append(score(site, outputs, target, gradient, parts, protocol.metric))
            found = torch.cat(scores)
            if factor.groups == 1:
                found = found.mean(1, keepdim=True)
            factor.choice = factor.candidates.gather(0, found.argmax(0, keepdim=True))[0]
    return tuple(f.choice for f in pair)


def product(site: Site, left: Tensor, right: Tensor) -> Tensor:
    """Outputs of a module for operands with candidates in front, of which one has one: (candidates, *output)."""
    module: Any = site.module
    if site.kind == "matmul":
        return left @ right
    count = len(left)
    if len(right) > 1 or count == 1:
        if site.kind == "linear":
            return F.linear(right, left[0], module.bias)
        return torch.stack([module._conv_forward(x, left[0], module.bias) for x in right])
    stacked, bias = left.flatten(0, 1), None if module.bias is None else module.bias.repeat(count)
    if site.kind == "linear":
        return F.linear(right[0], stacked, bias).unflatten(-1, (count, -1)).movedim(-2, 0)
    return module._conv_forward(right[0], stacked, bias).unflatten(1, (count, -1)).movedim(1, 0)


def score(site: Site, outputs: Tensor, target: Tensor, gradient: Tensor | None, parts: int, metric: str) -> Tensor:
    """Scores of candidates' outputs, higher is better: shape (candidates, parts)."""
    axis = target.dim() - 1 if site.kind == "linear" else 1
    shape = (axis, (parts, target.shape[axis] // parts))

    def by_part(values: Tensor) -> Tensor:
        """(candidates, …) ↦ (candidates, parts, …)."""
        return values.unflatten(shape[0] + 1, shape[1]).movedim(shape[0] + 1, 1).flatten(2)

    if metric == "cosine":
        return F.cosine_similarity(by_part(outputs).double(), by_part(target[None]).double(), dim=2)
    error = target - outputs
    if gradient is not None:
        error = error * gradient
    return -by_part(error.square()).mean(2)
