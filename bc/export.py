"""Export to formats that other software loads: compressed-tensors ``pack-quantized``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bc.compensation import BiasCompensation
from bc.errors import UserError
from bc.grid import QuantizedWeight, group_index
from bc.linear_map import LinearMap
from bc.models import family_of, submodule
from bc.quantizers.awq import ScaledWeight
from bc.quantizers.base import SiteResult
from bc.scaling import folded_copy
from bc.storage import apart, errors_of_the_system, share

BIAS_SWITCHES = {"llama": (("self_attn.", "attention_bias"), ("mlp.", "mlp_bias"))}


def export_compressed_tensors(model: nn.Module, folder: Path, tokenizer: Any = None) -> Path:
    """Write a quantized model as compressed-tensors, which plain ``transformers`` loads without any code of ours.

    Only what the format holds without loss is exported: symmetric weights on rows or equal groups, and channel biases
    that were folded into the modules' own. AWQ's scales of input channels go into the norm or Linear before, as
    :mod:`bc.scaling` says, where they can.

    Args:
        model: A model that :func:`bc.quantize` has changed, with ``bc`` off or ``channel`` at layer scope. It stays as
            it is.
        folder: Where to; made if need be. It gets ``config.json``, ``model.safetensors``, the settings of generation
            and the tokenizer's files.
        tokenizer: The model's tokenizer, to be saved beside it.

    Returns:
        The weights' file.

    Raises:
        UserError: The model is not quantized, or holds something that the format cannot; the message says what can be
            exported instead. Or the package compressed-tensors is not installed.
        OSError: The folder cannot be written.
    """
    try:
        from compressed_tensors.compressors import pack_to_int32
    except ModuleNotFoundError as error:
        raise UserError(
            f"export: the package {error.name} is not installed; install the extra of that name: "
            "pip install 'bias-compensation[export]'"
        ) from error
    weights = model.__dict__.get("_quantized")
    if not isinstance(weights, dict):
        raise UserError("model: it is not quantized; call bc.quantize first")
    _check_biases(model)
    if any(isinstance(result.weight, ScaledWeight) for result in weights.values()):
        _check_zero_points(weights)  # before the copy, which takes the memory of a model
        model = folded_copy(model)
        weights = model.__dict__["_quantized"]
    scheme = _scheme(weights)
    tensors = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in weights}
    for name, result in weights.items():
        weight = result.weight
        middle = 2 ** (weight.bits - 1)
        tensors[f"{name}.weight_packed"] = pack_to_int32((weight.codes.int() - middle).to(torch.int8), weight.bits)
        tensors[f"{name}.weight_scale"] = weight.scale
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape)
    config = _config(model, scheme, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        with errors_of_the_system(folder):
            tokenizer.save_pretrained(folder)
    if config.tie_word_embeddings:
        tensors.pop(f"{family_of(model).head}.weight", None)
    path = folder / "model.safetensors"
    tensors = apart(tensors)
    with errors_of_the_system(path):
        save_file(tensors, path, {"format": "pt"})
    share(path)
    return path


def _check_biases(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LinearMap):
            raise UserError(
                f"export: the linear map at {name.removesuffix('.compensation')} has no place in the format; "
                "quantize with bc=channel (which folds) or bc=off"
            )
    left = {m.granularity: name for name, m in model.named_modules() if isinstance(m, BiasCompensation)}
    for granularity, name in left.items():
        raise UserError(
            f"export: the {granularity} bias at {name.removesuffix('.compensation')} has no place in the format; "
            "quantize with bc=channel (which folds) or bc=off, or keep this model with bc.save"
        )


def _check_zero_points(weights: dict[str, SiteResult]) -> None:
    """Refuse them: compressed-tensors 0.20 makes room for unpacked ones only, so loading would fail."""
    for name, result in weights.items():
        if not getattr(result.weight, "symmetric", True):
            raise UserError(
                f"export: {name} has zero points, which plain transformers does not load from packed weights; "
                "quantize with symmetric=true, or keep this model with bc.save"
            )


def _scheme(weights: dict[str, SiteResult]) -> dict[str, Any]:
    """The one scheme that all the weights share, in the format's terms."""
    _check_zero_points(weights)
    schemes = set()
    for name, result in weights.items():
        weight = result.weight
        if isinstance(weight, ScaledWeight):
            raise UserError(
                f"export: the AWQ scales of {name} do not fold into a norm or Linear before it in this model, and the "
                "format has no place for them; export RTN or GPTQ weights, or keep this model with bc.save"
            )
        if type(weight) is not QuantizedWeight:
            raise UserError(
                f"export: {name} is a {type(weight).__name__}, which the format cannot hold; "
                "export RTN or GPTQ weights, or keep this model with bc.save"
            )
        columns, groups = weight.codes.shape[1], weight.scale.shape[1]
        size = columns // groups
        expected = group_index(columns, size if groups > 1 else -1)
        if weight.scale.shape[0] == 1 and len(weight.codes) > 1:
            raise UserError(f"export: {name} has one scale for the whole matrix; use granularity=row")
        if columns % groups or not torch.equal(weight.group.cpu(), expected):
            raise UserError(
                f"export: the groups of {name} are not runs of equal length; use a group size that divides {columns}, "
                "without act_order (or with static_groups)"
            )
        schemes.add((weight.bits, size if groups > 1 else None))
    if len(schemes) != 1:
        raise UserError(f"export: sites have {len(schemes)} different grids; one bit width and group size is needed")
    bits, group_size = schemes.pop()
    strategy = "group" if group_size else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size}


def _config(model: nn.Module, scheme: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The model's configuration with the format's section, and biases switched on where they were made."""
    family = family_of(model)
    config: Any = copy.deepcopy(model.config)
    heads = [family.head, *(n for n, m in model.named_modules() if _stays_float(n, m, tensors))]
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": sorted(set(heads)),
    }
    for prefix, switch in BIAS_SWITCHES.get(family.name, ()):
        paths = [p for group in family.linears for p in group if p.startswith(prefix)]
        names = [f"{family.blocks}.{i}.{p}" for i in range(config.num_hidden_layers) for p in paths]
        if any(f"{name}.bias" in tensors for name in names):
            setattr(config, switch, True)
            for name in names:  # the switch makes all of them
                owner = submodule(model, name)
                assert isinstance(owner, nn.Linear)
                tensors.setdefault(f"{name}.bias", torch.zeros(owner.out_features, dtype=owner.weight.dtype))
    return config


def _stays_float(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return isinstance(module, nn.Linear) and f"{name}.weight_packed" not in tensors
