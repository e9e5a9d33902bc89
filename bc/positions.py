"""Token positions of the forward pass under way, for biases that depend on the position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_position_context"


class PositionContext:
    """Positions of the tokens that a model is processing; shared by all the model's biases.

    A position counts real tokens from the start of the sequence: padding is skipped, and tokens in the KV cache count.

    Attributes:
        positions: int64, shape (1 or batch, tokens), or None outside a forward pass.
        valid: bool, shape (batch, tokens), False at padding; None where there is no padding.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module) -> PositionContext:
        """The context of a model; on first use it is made and kept up to date by hooks on the model's forward."""
        found = model.__dict__.get(_ATTRIBUTE)
        if found is None:
            found = cls()
            model.__dict__[_ATTRIBUTE] = found
            model.register_forward_pre_hook(found.before_forward, with_kwargs=True)
            model.register_forward_hook(found.after_forward, always_call=True)
        return found

    def set(self, positions: Tensor | None, valid: Tensor | None) -> None:
        """Use these positions until the next forward of the model."""
        self.positions, self.valid = positions, valid

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: read the positions from the arguments of a causal language model's forward."""
        kwargs = inspect.signature(module.forward).bind_partial(*args).arguments | kwargs
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            self.set(None, None)
            return
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.set(
            *token_positions(ids.shape[1], kwargs.get("attention_mask"), past, kwargs.get("position_ids"), ids.device)
        )

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook: forget the positions, which a call of a part of the model alone must not take for its own."""
        self.set(None, None)


def token_positions(
    tokens: int, mask: Tensor | None, past: int, position_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions and validity of the tokens of one forward.

    Args:
        tokens: Number of new tokens.
        mask: Attention mask of shape (batch, past + tokens), 1 at real tokens, or None; masks of another rank are
            ignored, since padding cannot be read from them.
        past: Tokens already in the KV cache.
        position_ids: Explicit positions, shape (1 or batch, tokens), used where there is no mask.
        device: Where to make the result.

    Returns:
        (positions int64 of shape (1 or batch, tokens), valid bool of shape (batch, tokens) or None).
    """
    if mask is not None and mask.dim() == 2:
        real = mask.to(torch.bool)
        valid = real[:, -tokens:]
        if not bool(real.all()):
            positions = (real.long().cumsum(1) - 1).clamp_(min=0)[:, -tokens:]
            return positions, None if bool(valid.all()) else valid
    elif position_ids is not None:
        return position_ids.long(), None
    return torch.arange(past, past + tokens, device=device)[None], None
