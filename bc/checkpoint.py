"""Quantized weights, statistics and whole models on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bc.chains import is_vision
from bc.compensation import BiasCompensation, attach
from bc.errors import UserError
from bc.linear_map import LinearMap
from bc.models import submodule
from bc.packing import pack, unpack
from bc.positions import PositionContext
from bc.quantizers.base import SiteResult
from bc.regularise import LowRank
from bc.statistics import PositionSums
from bc.storage import DamagedFileError, errors_of_the_system, read, restore_result, store_result, write

__all__ = [
    "DamagedFileError",
    "check_model",
    "load_means",
    "load_weights",
    "open_model",
    "pack",
    "provenance_of",
    "save_means",
    "save_model",
    "save_weights",
    "unpack",
]

FORMAT = "bias-compensation-weights-1"
MODEL_FORMAT = "bias-compensation-model-1"
MODEL_FILE = "quantized.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
NO_LINEAR_MAPS = "checkpoint: linear maps (bc.method=linear) cannot be saved; choose another bc.method"
SECOND = "/second"  # after the names of sums of half the samples
STATE = "state/"  # before the names of tensors that are stored as they are
BUFFER = "buffer/"  # before those of buffers that a state dict leaves out, such as rotary frequencies


def save_weights(path: Path, weights: dict[str, SiteResult], metadata: dict[str, str]) -> None:
    """Write how sites are quantized to one file; it appears complete or not at all.

    Args:
        path: The file to make; parents are made too.
        weights: Site → result, as from :func:`bc.pipeline.calibrate`.
        metadata: Facts to keep in the header.

    Raises:
        TypeError: A weight or an activation quantizer of a kind that has no file format.
    """
    tensors: dict[str, Tensor] = {}
    sites = _store_all(weights, tensors)
    header = {"format": FORMAT, "sites": json.dumps(sites), **metadata}
    write(path, tensors, header)


def _store_all(weights: dict[str, SiteResult], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: store_result(name, result, tensors) for name, result in weights.items()}


def _restore_all(sites: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, SiteResult]:
    return {name: restore_result(name, site, tensors) for name, site in sites.items()}


def load_weights(path: Path) -> tuple[dict[str, SiteResult], dict[str, str]]:
    """Read what :func:`save_weights` wrote.

    Raises:
        DamagedFileError: The file is truncated, altered or of another format.
    """
    tensors, metadata = read(path, FORMAT)
    try:
        return _restore_all(json.loads(metadata.pop("sites")), tensors), metadata
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path}: the file does not hold what its header says ({error})") from error


def save_means(folder: Path, means: dict[str, PositionSums], metadata: dict[str, str]) -> None:
    """Write sums of inputs by position to ``means.safetensors`` in a folder; complete or not at all."""
    halves = {f"{name}{SECOND}": sums.second for name, sums in means.items() if sums.second is not None}
    tensors: dict[str, Tensor] = {}
    for name, sums in (means | halves).items():
        tensors |= {f"{name}.total": sums.total.float(), f"{name}.count": sums.count.float()}
    write(folder / "means.safetensors", tensors, {"format": "bias-compensation-means-1", **metadata})


def load_means(folder: Path) -> dict[str, PositionSums]:
    """Read what :func:`save_means` wrote.

    Raises:
        DamagedFileError: The file is truncated, altered or of another format.
    """
    tensors, _ = read(folder / "means.safetensors", "bias-compensation-means-1")
    out = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part == "total":
            sums = PositionSums(*tensors[key].shape)
            sums.total, sums.count = tensors[key], tensors[f"{name}.count"].double()
            out[name] = sums
    for name in [name for name in out if name.endswith(SECOND)]:
        out[name.removesuffix(SECOND)].second = out.pop(name)
    return out


def save_model(model: nn.Module, folder: Path, tokenizer: Any = None, provenance: dict[str, Any] | None = None) -> Path:
    """Write a quantized and compensated language model to a folder.

    Args:
        model: A model that :func:`bc.quantize` or :func:`bc.pipeline.compensate` has changed.
        folder: Where to; made if need be. It gets ``config.json``, ``quantized.safetensors``, the settings of
            generation and the tokenizer's files.
        tokenizer: The model's tokenizer, to be saved beside it.
        provenance: Facts to keep in the file's header; by default those of the checkpoint that the model comes from.

    Returns:
        The weights' file.

    Raises:
        UserError: The model is not quantized, or an error left it half done.
    """
    weights = model.__dict__.get("_quantized")
    if not isinstance(weights, dict):
        raise UserError("model: it is not quantized; call bc.quantize first")
    if any(isinstance(module, LinearMap) for module in model.modules()):
        raise UserError(NO_LINEAR_MAPS)
    if is_vision(model):
        raise UserError("checkpoint: a vision model's cannot be saved; give a language model")
    folder = Path(folder).expanduser()
    config: Any = model.config
    tensors: dict[str, Tensor] = {}
    sites = _store_all(weights, tensors)
    biases = {name: m for name, m in model.named_modules() if isinstance(m, BiasCompensation)}
    quantized = {f"{name}.weight" for name in weights}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name in quantized or (value.numel() and value.data_ptr() in seen):  # tied weights are stored once
            continue
        seen.add(value.data_ptr())
        tensors[f"{STATE}{name}"] = value.cpu()
    tensors |= {f"{BUFFER}{name}": value.cpu() for name, value in _unsaved(model).items()}
    header = {
        "format": MODEL_FORMAT,
        "sites": json.dumps(sites),
        "compensation": json.dumps({name: child.granularity for name, child in biases.items()}),
        "folded": json.dumps([name for name, child in biases.items() if child.folded]),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": config._attn_implementation,  # equal outputs, bit by bit, need the same one
        "provenance": json.dumps(provenance_of(model) if provenance is None else provenance),
    }
    hashes = _save_beside(model, folder, tokenizer)
    header |= {CONFIG: hashes.pop(CONFIG), "files": json.dumps(hashes, sort_keys=True)}
    write(folder / MODEL_FILE, tensors, header)
    return folder / MODEL_FILE


def _save_beside(model: nn.Module, folder: Path, tokenizer: Any) -> dict[str, str]:
    """Write what lies beside the weights; returns the SHA-256 of each file by its path in the folder."""
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    if getattr(config, "dtype", None) is None:  # as in every model that was read from a file
        config.dtype = next(model.parameters()).dtype
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".beside-") as name:  # what is there is what was written
        fresh, hashes = Path(name), {}
        config.save_pretrained(fresh)
        if generation is not None:
            generation.save_pretrained(fresh)
        if tokenizer is not None:
            with errors_of_the_system(folder):
                tokenizer.save_pretrained(fresh)
        for path in sorted(path for path in fresh.rglob("*") if path.is_file()):
            inner = path.relative_to(fresh)
            hashes[inner.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
            (folder / inner).parent.mkdir(exist_ok=True)
            path.replace(folder / inner)
    return hashes


def open_model(folder: Path) -> nn.Module:
    """Read what :func:`save_model` wrote: a model on the CPU whose outputs are equal to the saved one's, bit by bit.

    Args:
        folder: The folder.

    Raises:
        UserError: The folder holds no such model.
        DamagedFileError: The file, or one that was saved beside it, is missing, truncated or altered.
    """
    from transformers import AutoConfig, GenerationConfig

    path, tensors, header = _read_whole(folder)
    config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    options: dict[str, Any] = {"dtype": getattr(torch, header["dtype"]), "attn_implementation": header["attention"]}
    model = _skeleton(config, options, tensors)
    if (path.parent / GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path.parent)
        except (OSError, ValueError) as error:
            name = path.with_name(GENERATION)
            raise DamagedFileError(f"{name}: cannot be read ({error}); mend or remove it") from error
    try:
        folded = json.loads(header.get("folded", "[]"))  # earlier files have none
        _fill(model, tensors, json.loads(header["sites"]), json.loads(header["compensation"]), folded)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{path}: the file does not fit its config.json ({error})") from error
    model.__dict__["_provenance"] = json.loads(header.get("provenance", "{}"))
    return model.eval().requires_grad_(False)


def _skeleton(config: Any, options: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A model of a configuration whose weights take no memory yet, where the file has all that it needs."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    computed = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    if not computed and all(f"{BUFFER}{name}" in tensors for name in _unsaved(model)):  # earlier files have no buffers
        return model
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def provenance_of(model: nn.Module) -> dict[str, Any]:
    """What the checkpoint that a model was opened from says of how it was made; empty where it says nothing."""
    return dict(model.__dict__.get("_provenance", {}))


def check_model(folder: Path) -> None:
    """Refuse a folder that :func:`open_model` would; all is read and nothing is built.

    Raises:
        UserError: The folder holds no model.
        DamagedFileError: A file is missing, truncated or altered.
    """
    _read_whole(folder)


def _read_whole(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The weights' file, what it holds and its header, with what lies beside it checked."""
    path = Path(folder).expanduser() / MODEL_FILE
    if not path.is_file():
        raise UserError(f"checkpoint: no {MODEL_FILE} in {str(folder)!r}; give a folder written by bc.save")
    tensors, header = read(path, MODEL_FORMAT)
    _check_beside(path.with_name(CONFIG), header.get(CONFIG))  # earlier files do not know its hash, nor the others'
    for name, expected in json.loads(header.get("files", "{}")).items():
        _check_beside(path.parent / name, expected)
    return path, tensors, header


def _check_beside(path: Path, expected: str | None) -> None:
    """Refuse a file that is not the saved one."""
    if not path.is_file():
        raise DamagedFileError(f"{path}: is missing; put back the one that was saved with {MODEL_FILE}")
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: cannot be read ({error}); put back the one that was saved") from error
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise DamagedFileError(
            f"{path}: its SHA-256 is {found[:16]}…, {MODEL_FILE} was saved with {expected[:16]}…; put back the one "
            "that was saved"
        )


def _fill(
    model: nn.Module, tensors: dict[str, Tensor], sites: dict[str, Any], compensated: dict[str, str], folded: list[str]
) -> None:
    """Give a new model the stored weights and biases."""
    context = PositionContext.of(model)
    rest = {key.removeprefix(STATE): value for key, value in tensors.items() if key.startswith(STATE)}
    for name, granularity in compensated.items():
        bias = rest.pop(f"{name}.bias")
        table: Tensor | LowRank = bias
        if f"{name}.left" in rest:
            table = LowRank(bias, rest.pop(f"{name}.left"), rest.pop(f"{name}.right"))
        child = attach(_module(model, name.rpartition(".")[0]), table, granularity, context, bias.dtype)
        child.folded = name in folded
    for key in [k for k in rest if k.endswith(".bias") and _bare(model, k)]:  # a folded bias where there was none
        _module(model, key.removesuffix(".bias")).bias = nn.Parameter(rest[key], requires_grad=False)
    results = _restore_all(sites, tensors)
    for name, result in results.items():
        own, weight = _module(model, name).weight, result.weight
        assert isinstance(own, Tensor) and weight is not None
        rest[f"{name}.weight"] = weight.dequantize().to(own.dtype)
    missing, unexpected = model.load_state_dict(rest, strict=False, assign=True)
    tied = {key for key in missing if key.endswith("lm_head.weight") and model.config.tie_word_embeddings}  # type: ignore[union-attr]
    absent = [k for k in missing if k not in tied and ".compensation." not in k]
    if absent or unexpected:
        raise ValueError(f"missing {absent[:3]}, unexpected {unexpected[:3]}")
    for name in _unsaved(model):
        if f"{BUFFER}{name}" in tensors:  # a model that was cast has others than a new one
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, tensors[f"{BUFFER}{name}"])
    model.tie_weights()  # type: ignore[operator]
    model.__dict__["_quantized"] = results


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not in the state dict."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def _module(model: nn.Module, name: str) -> nn.Module:
    module = submodule(model, name)
    if module is None:
        raise KeyError(name)
    return module


def _bare(model: nn.Module, key: str) -> bool:
    owner = submodule(model, key.removesuffix(".bias"))
    return isinstance(owner, nn.Linear) and owner.bias is None
