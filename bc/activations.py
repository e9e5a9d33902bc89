"""Activation quantizers: modules that replace a site's input by its quantized value, attached to the site.

An activation quantizer maps x to x̂ in the coordinates of the float model: whatever a method folds elsewhere (a
reparametrised norm, a noise that is removed again) is expressed as a function of x, so that Bias Compensation and the
rest of the model need not know about it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CHILD = "input_quantizers"


class ActivationQuantizer(nn.Module):
    """Base: the identity. Subclasses keep their scales as buffers and override :meth:`forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x; shape and dtype as x."""
        return x

    def storage_bits(self) -> int:
        """Bits of its parameters on disk."""
        return sum(b.numel() * b.element_size() * 8 for b in self.buffers())


class InputQuantizers(nn.Module):
    """The activation quantizers of one site, one for each of its positional inputs.

    Attributes:
        enabled: Off, the site sees its float inputs.
    """

    def __init__(self, quantizers: list[ActivationQuantizer]) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)
        self.enabled = True

    def hook(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Forward pre-hook of the site."""
        if not self.enabled:
            return None
        return self.quantized(args)

    def quantized(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the site is fed for these arguments."""
        return (*(q(x) for q, x in zip(self.quantizers, args, strict=False)), *args[len(self.quantizers) :])


def attach_quantizers(module: nn.Module, quantizers: list[ActivationQuantizer]) -> InputQuantizers:
    """Quantize a site's inputs from now on; the quantizers become the child ``input_quantizers``."""
    child = InputQuantizers(quantizers)
    module.add_module(CHILD, child)
    module.register_forward_pre_hook(child.hook)
    return child


def quantizers_of(module: nn.Module) -> InputQuantizers | None:
    """The activation quantizers attached to a site, if any."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, InputQuantizers) else None


def detach_quantizers(module: nn.Module) -> None:
    """Give a site its float inputs again."""
    if quantizers_of(module) is not None:
        remove_child(module, CHILD)


def remove_child(module: nn.Module, name: str) -> None:
    """Remove a child of a module together with the child's hooks on it."""
    child = module._modules.pop(name)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is child]:
            del hooks[key]
