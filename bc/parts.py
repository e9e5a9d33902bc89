"""Parts of a block: capturing what enters and leaves them, and running them on given inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bc.calibration import Samples, StopForward, Stream, hooked, output_of
from bc.models import submodule
from bc.models.base import Region


def leading(samples: Samples, tokens: int) -> Samples:
    """The first samples, as few as hold that many tokens together; all where they hold fewer, and all images."""
    if isinstance(samples, Tensor) and samples.dim() > 2:
        return samples
    total = 0
    for count, sample in enumerate(samples, 1):
        total += (sample["input_ids"] if isinstance(sample, dict) else sample).numel()
        if total >= tokens:
            return samples[:count]
    return samples


class Captured:
    """Arguments of an entry module and output of an exit module in one forward of a block."""

    def __init__(self, block: nn.Module, region: Region) -> None:
        self.entry, self.exit = find(block, region.entry), find(block, region.exit)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output = torch.empty(0)


def find(block: nn.Module, path: str) -> nn.Module:
    """Module at a path inside a block, which has to exist; the empty path is the block itself."""
    module = submodule(block, path) if path else block
    assert module is not None
    return module


def linear(block: nn.Module, path: str) -> nn.Linear:
    """The Linear at a path inside a block."""
    found = submodule(block, path)
    assert isinstance(found, nn.Linear), f"{path} is a {type(found).__name__}, not a Linear"
    return found


def by_module(parts: Iterable[Captured], edge: str) -> dict[nn.Module, list[Captured]]:
    """Parts grouped by their ``entry`` or ``exit`` module: parts may share one."""
    found: dict[nn.Module, list[Captured]] = {}
    for part in parts:
        found.setdefault(getattr(part, edge), []).append(part)
    return found


def run_captured(
    stream: Stream, block: nn.Module, index: int, parts: Iterable[Captured], *, whole: bool = True
) -> Tensor | None:
    """Run a block on one batch, filling the captured parts.

    Args:
        stream: The samples at the block's input.
        block: The block.
        index: Number of the batch.
        parts: What to capture.
        whole: The block's output is wanted; else the forward ends when the last part's has been captured.

    Returns:
        The block's output; None where it is not wanted.
    """
    parts = list(parts)
    entries, exits = by_module(parts, "entry"), by_module(parts, "exit")
    waiting = set(exits)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        for part in entries[module]:
            part.args, part.kwargs = args, kwargs

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for part in exits[module]:
            part.output = output_of(output)
        waiting.discard(module)
        if not whole and not waiting:
            raise StopForward

    with hooked(dict.fromkeys(entries, enter), inputs=True), hooked(dict.fromkeys(exits, leave), inputs=False):
        try:
            output = stream.run(block, index)
        except StopForward:
            return None
    return output if whole else None


def run_fed(stream: Stream, block: nn.Module, index: int, got: Captured, source: Captured) -> Tensor:
    """Output of a part of a block when the part is given the inputs that another block's like part received."""

    def feed(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return source.args, source.kwargs

    with hooked({got.entry: feed}, inputs=True):
        run_captured(stream, block, index, [got], whole=False)
    return got.output


class Part:
    """The part of a block that a group of Linears opens, with its float inputs and outputs on some samples.

    Args:
        block: The block, with float weights.
        region: The part; None is the group's own Linears.
        stream: Samples at the block's input.
        paths: Paths of the group's Linears.
    """

    def __init__(self, block: nn.Module, region: Region | None, stream: Stream, paths: tuple[str, ...]) -> None:
        self.block, self.stream, self.paths = block, stream, paths
        self.region = region
        self.goals: list[Captured] = []
        inputs: list[Tensor] = []
        for b in range(len(stream)):
            goal, group = (
                Captured(block, region or Region(paths[0], paths[0])),
                Captured(block, Region(paths[0], paths[0])),
            )
            run_captured(stream, block, b, [goal, group], whole=False)
            x = group.args[0].reshape(-1, group.args[0].shape[-1])
            valid = stream.calls[b].valid
            inputs.append(x if valid is None else x[valid.reshape(-1)])
            self.goals.append(goal)
        self.inputs = torch.cat(inputs)  # of the group, shape (tokens, in); padding is left out
        self.moment: Tensor | None = None
        if region is None and len(self.inputs) > self.inputs.shape[1]:  # then it is the cheaper way to an error
            x = self.inputs.float()
            self.moment = x.T @ x

    def loss(self, weights: dict[str, Tensor]) -> float:
        """Mean squared error of the part's output when some of the group's Linears have other weights."""
        if self.region is None:
            return self._linear_loss(weights)
        kept = {path: linear(self.block, path).weight.data for path in weights}
        for path, weight in weights.items():
            linear(self.block, path).weight.data = weight.to(kept[path])
        try:
            return self._region_loss(self.region)
        finally:
            for path, weight in kept.items():
                linear(self.block, path).weight.data = weight

    def _linear_loss(self, weights: dict[str, Tensor]) -> float:
        total, outputs = 0.0, 0
        for path, weight in weights.items():
            change = linear(self.block, path).weight.float() - weight.float()
            if self.moment is not None:
                total += ((change @ self.moment) * change).sum().item()
            else:
                total += (self.inputs.float() @ change.T).square().sum().item()
            outputs += len(weight)
        return total / (len(self.inputs) * outputs)

    def _region_loss(self, region: Region) -> float:
        total, count = 0.0, 0
        for b, goal in enumerate(self.goals):
            output = self._output(region, b, goal)
            error = (output - goal.output).float()
            valid = self.stream.calls[b].valid
            if valid is not None:
                error = error.reshape(*valid.shape, -1)[valid]
            total += error.square().sum().item()
            count += error.numel()
        return total / count

    def _output(self, region: Region, index: int, goal: Captured) -> Tensor:
        """Output of the part on a batch, with the weights that the block has now."""
        if region.entry == region.exit:  # one module: nothing else of the block need run
            return output_of(find(self.block, region.entry)(*goal.args, **goal.kwargs))
        return run_fed(self.stream, self.block, index, Captured(self.block, region), goal)
