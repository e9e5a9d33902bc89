"""Bias Compensation of a language model, literally as its protocol says: the peer of our own and an oracle of it.

Gong et al. (arXiv 2404.01892): after the quantizer, block by block and one sample at a time. Every Linear is passed by
itself: the float block runs on its float input, the Linear's input is caught, the float and the quantized Linear are
both run on it, and the mean of the difference of their outputs becomes the quantized Linear's bias. Then the block as a
whole, its Linears compensated, likewise. The next block's input is the float block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Caught(Exception):  # noqa: N818 (a signal, not an error)
    pass


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(model: nn.Module, first: nn.Module, samples: Tensor) -> list[Call]:
    """What the first block is called with for each sample."""
    found: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Caught

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    for sample in samples:
        try:
            model(input_ids=sample[None], use_cache=False)
        except _Caught:
            pass
    handle.remove()
    return found


def hidden(output: Any) -> Tensor:
    """Hidden states in what a block returns."""
    return output if isinstance(output, Tensor) else output[0]


def next_call(call: Call, states: Tensor) -> Call:
    """The call of the next block, whose hidden states are these."""
    args, kwargs = call
    if args:
        return (states, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": states}


def add_bias(module: nn.Module, bias: Tensor) -> None:
    """Add a bias of shape (tokens, channels) to what a module returns from now on."""

    def add(m: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + bias if output.dim() == 3 else (output.view(-1, *bias.shape) + bias).view_as(output)
        return (output[0] + bias, *output[1:])

    module.register_forward_hook(add)


def mean_difference(pairs: Callable[[Call], tuple[Tensor, Tensor]], calls: Sequence[Call]) -> Tensor:
    """Mean over samples of the float output less the quantized one, shape (tokens, channels)."""
    total: Tensor | None = None
    for call in calls:
        one, two = pairs(call)
        difference = (one - two).double().view(-1, one.shape[-1])
        total = difference if total is None else total + difference
    assert total is not None
    return (total / len(calls)).float()


@torch.no_grad()
def compensate(
    model: nn.Module, quantized: nn.Module, blocks: Sequence[str], samples: Tensor, *, block_scope: bool
) -> dict[str, Tensor]:
    """Compensate a quantized copy of a model, positional biases, scopes layer and (if asked) block.

    Args:
        model: The float model.
        quantized: The copy with quantized weights; it gets the biases as hooks.
        blocks: Dotted names of the blocks.
        samples: Token ids, int64, shape (samples, tokens).
        block_scope: Whether blocks get a bias of their own.

    Returns:
        Dotted name → bias, fp32, shape (tokens, channels).
    """
    found: dict[str, Tensor] = {}
    calls = calls_of(model, model.get_submodule(blocks[0]), samples)
    for name in blocks:
        block, twin = model.get_submodule(name), quantized.get_submodule(name)
        for path, linear in [(p, m) for p, m in block.named_modules() if isinstance(m, nn.Linear)]:
            other = twin.get_submodule(path)
            found[f"{name}.{path}"] = mean_difference(_linear_pairs(block, linear, other), calls)
            add_bias(other, found[f"{name}.{path}"])
        outputs = [hidden(block(*args, **kwargs)) for args, kwargs in calls]
        if block_scope:
            goals = iter(outputs)
            pairs = _block_pairs(twin, goals)
            found[name] = mean_difference(pairs, calls)
            add_bias(twin, found[name])
        calls = [next_call(call, output) for call, output in zip(calls, outputs, strict=True)]
    return found


def _linear_pairs(block: nn.Module, linear: nn.Module, other: nn.Module) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """(call of the block) ↦ outputs of the float and the quantized Linear on the float input."""

    def pairs(call: Call) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []
        handle = linear.register_forward_hook(lambda m, args, output: caught.append(args[0]))
        block(*call[0], **call[1])
        handle.remove()
        return linear(caught[0]), other(caught[0])

    return pairs


def _block_pairs(twin: nn.Module, goals: Any) -> Callable[[Call], tuple[Tensor, Tensor]]:
    return lambda call: (next(goals), hidden(twin(*call[0], **call[1])))
