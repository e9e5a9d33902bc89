"""Bias Compensation (BC): statistics, closed forms, the bias as a module, folding.

Gong et al., "Minimize Quantization Output Error with Bias Compensation", arXiv 2404.01892. For a module with float
output Y and quantized output Ŷ, the bias that minimises E‖Y − (Ŷ + b)‖² is b* = E[Y − Ŷ] (convex, closed form). For a
linear site Y = W x, Ŷ = Ŵ x̂, so b* = W E[x] − Ŵ E[x̂]: the mean inputs are enough and no quantized forward is needed.

A bias is a table of rows. ``channel`` has one row; ``sink`` has one for each of the first k positions and one that all
later positions share; ``positional`` has one per position. Beyond the fitted length, a positional bias uses the mean of
its rows after the first: position 0 is left out because it is an attention sink whose mean is unlike the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from bc.activations import remove_child
from bc.errors import QuantizationError, UserError
from bc.grid import finite
from bc.positions import PositionContext
from bc.regularise import LowRank
from bc.statistics import PositionSums

CHILD = "compensation"
LED = ("sink", "lowrank")  # granularities whose last row is shared by all positions that have none of their own


def linear_bias(weight: Tensor, quantized: Tensor, mean_input: Tensor, mean_quantized: Tensor | None = None) -> Tensor:
    """Optimal bias of a linear site: W E[x] − Ŵ E[x̂].

    Args:
        weight: Float weight, shape (out, in).
        quantized: Quantized weight, shape (out, in).
        mean_input: E[x], shape (rows, in).
        mean_quantized: E[x̂], the mean of what the quantized module is fed; None where that is x itself.

    Returns:
        fp32 bias, shape (rows, out).
    """
    weight, quantized, mean_input = weight.float(), quantized.float(), mean_input.float()
    if mean_quantized is None:
        return mean_input @ (weight - quantized).T
    return mean_input @ weight.T - mean_quantized.float() @ quantized.T


def to_rows(value: Tensor, layout: str, tokens: int | None = None) -> Tensor:
    """What a module returns as rows of channels: shape (batch, tokens, channels).

    Args:
        value: The output.
        layout: ``tokens``: (…, tokens, channels), with one token where there are but two axes; ``image``: (batch,
            channels, height, width), whose tokens are the pixels; ``heads``: (batch, heads, tokens, columns), whose
            channels are the columns of all heads.
        tokens: Tokens of a sample where the model flattens (batch · tokens, channels).
    """
    if layout == "image":
        return value.movedim(1, -1).flatten(1, 2)
    if layout == "heads":
        return value.transpose(1, 2).flatten(2)
    if value.dim() == 2:
        return value.reshape(-1, tokens or 1, value.shape[-1])
    return value.flatten(1, -2)


def from_rows(rows: Tensor, like: Tensor, layout: str) -> Tensor:
    """Inverse of :func:`to_rows`: rows in the shape of ``like``."""
    if layout == "image":
        return rows.transpose(1, 2).reshape(like.shape)
    if layout == "heads":
        batch, heads, tokens, columns = like.shape
        return rows.reshape(batch, tokens, heads, columns).transpose(1, 2)
    return rows.reshape(like.shape)


class BiasCompensation(nn.Module):
    """The bias of one site, added to the site's output.

    Args:
        bias: Rows of the table, shape (rows, channels), floating.
        granularity: ``channel``, ``sink``, ``positional``, ``shrink`` or ``lowrank``; says what a row is.
        context: Positions of the forward under way; without one, positions count from 0 along the output's
            second-to-last axis.
        dtype: Storage type.
        layout: Of the site's output; see :func:`to_rows`.
        factors: For ``lowrank``, (left, right) of :class:`~bc.regularise.LowRank`, whose product is added to the rows.

    The state dict holds ``bias`` in its shape, and ``left`` and ``right`` where there are factors.

    Attributes:
        folded: The row that later positions share is in the module's own bias (:func:`fold`): the table has the rows of
            the leading positions alone, as differences from it.

    Raises:
        QuantizationError: A bias is not finite, or too large for the storage type.
    """

    bias: Tensor
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        bias: Tensor,
        granularity: str,
        context: PositionContext | None = None,
        dtype: torch.dtype = torch.float16,
        layout: str = "tokens",
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        left, right = factors or (None, None)
        for name, value in (("bias", bias), ("left", left), ("right", right)):
            self.register_buffer(name, None if value is None else _stored(value, dtype))
        self.granularity = granularity
        self.context = context
        self.layout = layout
        self.folded = False

    def extra_repr(self) -> str:
        """Shape and granularity, for printing a model."""
        rank = "" if self.left is None else f", rank={self.left.shape[1]}"
        rows, channels = self.bias.shape
        folded = ", folded" if self.folded else ""
        return f"{self.granularity}, rows={rows}, channels={channels}{rank}, dtype={self.bias.dtype}{folded}"

    @property
    def size(self) -> int:
        """Number of values that it stores."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def shared(self) -> bool:
        """Whether every position has the same bias."""
        return len(self.bias) == 1 and self.left is None and not self.folded

    def table(self) -> Tensor:
        """Rows of the leading positions and the one that later positions share, shape (rows, channels)."""
        return torch.cat([self.bias, self.bias.new_zeros(1, self.bias.shape[1])]) if self.folded else self.bias

    def fold_last(self) -> None:
        """Leave the last row to the module's own bias."""
        self.bias = _stored(self.bias[:-1].float() - self.bias[-1].float(), self.bias.dtype)
        self.folded = True

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The factors of the product that is added to the rows."""
        return None if self.left is None or self.right is None else (self.left, self.right)

    def rows(self, tokens: int) -> Tensor:
        """Bias of each of the last ``tokens`` tokens, shape (1 or batch, tokens, channels)."""
        positions = self.context.positions if self.context is not None else None
        if positions is None:
            positions = torch.arange(tokens, device=self.bias.device)[None]
        positions = positions[:, -tokens:].to(self.bias.device)
        table = self.table()
        fitted = len(table)
        found = table[positions.clamp(max=fitted - 1)]
        late = positions >= fitted
        if self.left is not None and self.right is not None:
            known = positions - (fitted - 1)
            product = self.left[known.clamp(0, len(self.left) - 1)] @ self.right
            within = (known >= 0) & (known < len(self.left))  # beyond the fitted length: the shared row alone
            return torch.where(within[..., None], found + product, found)
        if self.granularity in ("positional", "shrink") and fitted > 1 and bool(late.any()):
            beyond = self.bias[1:].mean(0, dtype=torch.float32).to(self.bias.dtype)
            found = torch.where(late[..., None], beyond, found)
        return found

    def forward(self, output: Tensor, *, in_place: bool = False) -> Tensor:
        """Add the bias.

        Args:
            output: Of the layout; (batch · tokens, channels) where a language model flattens its tokens.
            in_place: Add it to the argument itself, which has to be contiguous and of layout ``tokens``.

        Returns:
            A tensor of the same shape and dtype: a new one, or the argument.
        """
        if self.shared and self.layout == "tokens":
            row = self.bias[0].to(output.dtype)
            return output.add_(row) if in_place else output + row
        known = self.context.positions if self.context is not None else None
        shaped = to_rows(output, self.layout, len(output) if known is None else known.shape[1])
        rows = (self.bias if self.shared else self.rows(shaped.shape[1])).to(output.dtype)
        if in_place:
            shaped.add_(rows)
            return output
        return from_rows(shaped + rows, output, self.layout)

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: compensate a tensor, or the first element of a tuple."""
        if isinstance(output, Tensor):
            return self(output, in_place=_is_ours_alone(module, output) and self.layout == "tokens")
        return (self(output[0]), *output[1:])


def _is_ours_alone(module: nn.Module, output: Tensor) -> bool:
    """Whether nobody else can hold what a module has just returned, so that it may be changed.

    A Linear makes its output anew; another hook, or autograd, could have kept it.
    """
    hooks = len(module._forward_hooks) + len(module_hooks._global_forward_hooks)
    return type(module) is nn.Linear and hooks == 1 and not output.requires_grad and output.is_contiguous()


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    stored = value.to(dtype)
    if finite(stored):
        return stored
    if not finite(value):
        raise QuantizationError("the bias is not finite; look for NaN or Inf in the weights or the activations")
    raise QuantizationError(f"a bias of {value.abs().max():.3g} does not fit {dtype}; set bc.dtype=float32")


def attach(
    module: nn.Module,
    bias: Tensor | LowRank,
    granularity: str,
    context: PositionContext | None = None,
    dtype: torch.dtype = torch.float16,
    layout: str | None = None,
) -> BiasCompensation:
    """Compensate a module's output from now on.

    Where the module is compensated already, the new bias is what remained after the old one, and is added to it.

    Args:
        module: Any module whose output is a tensor or a tuple that starts with one.
        bias: Shape (rows, channels), or a low-rank table.
        granularity: See :class:`BiasCompensation`.
        context: See :class:`BiasCompensation`.
        dtype: Storage type.
        layout: See :func:`to_rows`; None is ``image`` for a convolution and ``tokens`` for any other module.

    Returns:
        The bias, registered as the child ``compensation`` of the module.

    Raises:
        UserError: The module has a bias of another shape.
    """
    old = compensation_of(module)
    if old is not None and old.folded:
        raise UserError("bc: a part of the site's bias is in the module's own already; detach it, or fit both together")
    if old is not None and old.granularity == granularity:
        old, bias = _alike(old, bias)
    rows = bias.base if isinstance(bias, LowRank) else bias
    factors = (bias.left, bias.right) if isinstance(bias, LowRank) and bias.rank else None
    if old is not None:
        if old.bias.shape != rows.shape or old.granularity != granularity:
            raise UserError(
                f"bc.granularity: the site has a {old.granularity} bias of shape {tuple(old.bias.shape)} and cannot "
                f"take a {granularity} one of shape {tuple(rows.shape)}; detach the first, or use the same granularity"
            )
        rows, factors = old.bias.float().to(rows.device) + rows.float(), _joined(old.factors(), factors)
    layout = layout or ("image" if isinstance(module, nn.Conv2d) else "tokens")
    child = BiasCompensation(rows, granularity, context, dtype, layout, factors)
    detach(module)
    module.add_module(CHILD, child)
    module.register_forward_hook(child.hook)
    return child


def _alike(old: BiasCompensation, bias: Tensor | LowRank) -> tuple[BiasCompensation, Tensor | LowRank]:
    """Two tables of a site with as many own rows."""
    if old.granularity == "sink" and isinstance(bias, Tensor):
        most = max(len(old.bias), len(bias))
        rows, bias = (torch.cat([t, t[-1:].expand(most - len(t), -1)]) for t in (old.bias, bias))
        return BiasCompensation(rows, old.granularity, old.context, old.bias.dtype, old.layout), bias
    if not isinstance(bias, LowRank):
        return old, bias
    empty = bias.left.new_zeros(len(bias.left) + bias.own - len(old.bias) + 1, 0), bias.right[:0]
    left, right = old.factors() or empty
    table = LowRank(*(part.to(bias.base) for part in (old.bias, left, right)))
    own = max(table.own, bias.own)
    table, bias = table.owning(own), bias.owning(own)
    factors = (table.left, table.right) if table.rank else None
    return BiasCompensation(table.base, old.granularity, old.context, old.bias.dtype, old.layout, factors), bias


def _joined(one: tuple[Tensor, Tensor] | None, two: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Factors of the sum of two products."""
    if one is None or two is None:
        return one or two
    left = torch.cat([one[0].to(two[0]), two[0]], dim=1)
    return left, torch.cat([one[1].to(two[1]), two[1]])


def compensation_of(module: nn.Module) -> BiasCompensation | None:
    """The bias attached to a module, if any."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, BiasCompensation) else None


def detach(module: nn.Module) -> None:
    """Remove a module's bias; the output is again what it was."""
    if compensation_of(module) is not None:
        remove_child(module, CHILD)


def folds(module: nn.Module) -> bool:
    """Whether a row that all positions share has a bias of the module's own to go into."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None


def fold(module: nn.Module) -> bool:
    """Fold what positions share into a module's own bias, so that it costs nothing.

    A channel bias goes wholly, and where there is no bias one is made. Of granularities ``sink`` and ``lowrank`` the
    row that later positions share goes, into a bias that is there already, and the others stay as differences from it.

    Args:
        module: A Linear or Conv2d with a :class:`BiasCompensation` attached.

    Returns:
        True if something was folded; False where the site or the granularity does not allow it.

    Raises:
        QuantizationError: The sum does not fit the module's dtype.
    """
    child = compensation_of(module)
    if child is None or child.folded or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False
    own = module.bias
    if own is None and (not child.shared or child.granularity == "lowrank"):
        return False  # a bias that is made has the module's dtype, beyond what lowrank may have been allowed
    if not child.shared and child.granularity not in LED:
        return False
    extra = child.bias[-1].to(module.weight.device, torch.float32)
    total = extra if own is None else own.detach().float() + extra
    stored = total.to(module.weight.dtype)
    if not finite(stored):
        raise QuantizationError(f"a folded bias of {total.abs().max():.3g} does not fit {stored.dtype}; use bfloat16")
    if child.shared:
        detach(module)
    else:
        child.fold_last()
    module.bias = nn.Parameter(stored, requires_grad=False)
    return True


def bias_parameters(model: nn.Module) -> int:
    """Number of bias values that compensation added beside the modules' own parameters."""
    return sum(m.size for m in model.modules() if isinstance(m, BiasCompensation))


def optimal_bias(float_outputs: Sequence[Tensor], quantized_outputs: Sequence[Tensor], granularity: str) -> Tensor:
    """Optimal bias from pairs of outputs (the definition; sites with a closed form do not need it).

    Args:
        float_outputs: Tensors of shape (batch, tokens, channels); batches and lengths may differ.
        quantized_outputs: The same shapes.
        granularity: ``channel``, ``sink`` or ``positional``.

    Returns:
        fp32 bias, shape (rows, channels).
    """
    longest = max(y.shape[1] for y in float_outputs)
    sums = PositionSums(longest, float_outputs[0].shape[-1], float_outputs[0].device)
    for y, y_hat in zip(float_outputs, quantized_outputs, strict=True):
        sums.add(y.float() - y_hat.float(), torch.arange(y.shape[1], device=y.device)[None])
    return sums.mean(granularity)
