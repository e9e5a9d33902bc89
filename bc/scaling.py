"""Folding the scales of a Linear's input channels into the module before it.

If a norm or Linear A feeds a group of Linears B channel by channel, dividing A's output channels by s and multiplying
B's input channels by s leaves the function of the model as it is. After AWQ this makes the column scales free: B holds
exactly its grid, and every Linear is an ordinary quantized one.

Which module precedes each group is declared by the family (``before``). What comes between must commute with a positive
scale of each channel: nothing, ReLU, a product with another branch (LLaMA's gate), or attention for the values. It
does not hold, and nothing is folded, where a norm's output is also the residual (OPT-350M), where several heads read
the same values (grouped-query attention), and across GELU (BLOOM's MLP).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bc.chains import block_list
from bc.errors import UserError
from bc.grid import QuantizedWeight
from bc.models import Family, family_of, submodule
from bc.packing import packed
from bc.parts import find, linear
from bc.quantizers.awq import ScaledWeight
from bc.quantizers.base import SiteResult


def predecessors(model: nn.Module, family: Family) -> tuple[str, ...]:
    """For each group of Linears, the path of the module that a scale of its inputs folds into, or empty.

    Args:
        model: A language model.
        family: Its adapter.
    """
    config, block = _config(model), block_list(model, family)[0]
    residual_after_norm = not getattr(config, "do_layer_norm_before", True) or getattr(
        config, "apply_residual_connection_post_layernorm", False
    )
    found = []
    for paths, path in zip(family.linears, family.before or ("",) * len(family.linears), strict=True):
        module = submodule(block, path) if path else None
        if isinstance(module, nn.Linear):
            features = linear(block, paths[0]).in_features
            ok = module.out_features in (features, 3 * features)
            if path == family.mlp.entry:  # an activation function comes between
                ok = ok and getattr(config, "activation_function", "") == "relu"
        else:
            ok = getattr(module, "weight", None) is not None and not residual_after_norm
        found.append(path if ok else "")
    return tuple(found)


def fold_input_scale(model: nn.Module, site: str, scale: Tensor) -> None:
    """Multiply the input channels of a group of Linears and divide what feeds them, in place.

    Args:
        model: A float language model.
        site: Name of a Linear of the group, as in :func:`bc.pipeline.sites`.
        scale: Shape (in,), positive.

    Raises:
        UserError: The scale cannot be folded at this place of this model.
    """
    family = family_of(model)
    index, path = site.removeprefix(f"{family.blocks}.").split(".", 1)
    block = block_list(model, family)[int(index)]
    number = next(i for i, paths in enumerate(family.linears) if path in paths)
    before = predecessors(model, family)[number]
    if not before:
        raise UserError(f"{site}: a scale of its inputs cannot be folded; keep it beside the weight")
    for member in family.linears[number]:
        module = linear(block, member)
        module.weight.data = (module.weight.float() * scale.float()).to(module.weight)
    source = find(block, before)
    rows = _rows(model, source, len(scale))
    for parameter in (getattr(source, "weight", None), getattr(source, "bias", None)):
        if parameter is not None:
            parameter.data = _divided(parameter.data, rows, scale)


def fold_scales(model: nn.Module, results: dict[str, SiteResult]) -> dict[str, SiteResult]:
    """Fold AWQ's column scales wherever the model allows it.

    The float model is changed in place and keeps its function. Put the returned weights into it as usual.

    Args:
        model: The float model that was quantized.
        results: Name of each Linear → its quantized weight, from :func:`bc.pipeline.calibrate`.

    Returns:
        The same with plain grids where the scale was folded; their quantized function is the same.
    """
    family, results = family_of(model), dict(results)
    for i, block in enumerate(block_list(model, family)):
        for paths, before in zip(family.linears, predecessors(model, family), strict=True):
            names = [f"{family.blocks}.{i}.{path}" for path in paths]
            scaled = [w for w in (results[name].weight for name in names) if isinstance(w, ScaledWeight)]
            if not before or len(scaled) < len(names):
                continue
            scale = scaled[0].column_scale.to(next(block.parameters()).device)
            if not all(torch.equal(w.column_scale, scaled[0].column_scale) for w in scaled):
                continue
            fold_input_scale(model, names[0], scale)
            for name, weight in zip(names, scaled, strict=True):
                results[name] = packed(SiteResult(weight.on_grid(), notes=results[name].notes))
            name = f"{family.blocks}.{i}.{before}"
            if name in results:
                found = results[name].weight
                assert isinstance(found, (QuantizedWeight, ScaledWeight))
                rows = _rows(model, linear(block, before), len(scale)).to(found.scale.device)
                divided = replace(found, scale=_divided(found.scale, rows, scale.to(found.scale.device)))
                results[name] = packed(SiteResult(divided, notes=results[name].notes))
    return results


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose AWQ scales lie in the modules before, as far as the model allows it.

    Biases were fitted to outputs of sites, and every output that the copy changes is divided with its bias and
    multiplied back by the Linear that reads it, so the copy keeps the model's function.

    Args:
        model: A language model that :func:`bc.quantize` has changed, whose biases are in the modules' own.

    Returns:
        The copy; the model stays as it is.
    """
    twin = copy.deepcopy(model)
    twin.__dict__["_quantized"] = fold_scales(twin, model.__dict__["_quantized"])
    for name, result in twin.__dict__["_quantized"].items():
        module = find(twin, name)
        assert isinstance(module, nn.Linear)
        module.weight.data = result.weight.dequantize().to(module.weight)
    return twin


def _config(model: nn.Module) -> Any:
    return model.config


def _rows(model: nn.Module, source: nn.Module, features: int) -> Tensor:
    """Output channels of the preceding module that feed the group, in the order of the group's input channels."""
    if isinstance(source, nn.Linear) and source.out_features == 3 * features:  # BLOOM: (heads, 3, head size)
        heads = _config(model).num_attention_heads
        return torch.arange(3 * features).view(heads, 3, -1)[:, 2].reshape(-1)
    return torch.arange(features)


def _divided(value: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """The tensor with some of its rows (entries of its first axis) divided."""
    out, rows = value.float().clone(), rows.to(value.device)
    out[rows] = out[rows] / scale.float().reshape(-1, *[1] * (value.dim() - 1))
    return out.to(value)
