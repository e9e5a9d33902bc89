"""Files of ours: safetensors with a hash of their content, codes packed to their bit width, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bc.activation_grids import Noisy
from bc.activations import ActivationQuantizer
from bc.grid import QuantizedWeight, group_index
from bc.quantizers import available
from bc.quantizers.base import STORABLE, SiteResult

INTEGERS = (torch.int16, torch.int32)  # stand for int64; earlier files have 32 bits for indices of groups, too


class DamagedFileError(ValueError):
    """A file of ours is truncated, altered or not what it should be; the message names it."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, ``bits`` bits each, most significant bit first.

    Args:
        codes: uint8, any shape, values below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8, shape (ceil(codes · bits / 8),).
    """
    flat = codes.reshape(-1).cpu().numpy()
    planes = np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(planes.reshape(-1)))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes of the given shape."""
    count = int(np.prod(shape))
    planes = np.unpackbits(packed.cpu().numpy(), count=count * bits).reshape(count, bits)
    padded = np.concatenate([np.zeros((count, 8 - bits), np.uint8), planes], axis=1)
    return torch.from_numpy(np.packbits(padded, axis=1).reshape(shape).copy())


def _weights() -> dict[str, type]:
    """Forms of quantized weights by what files call them."""
    available()  # every quantizer's file has been read then
    return {"affine": QuantizedWeight, **STORABLE}


def _activations(base: type[ActivationQuantizer] = ActivationQuantizer) -> dict[str, type[ActivationQuantizer]]:
    """All activation quantizers by name."""
    available()
    found = {base.__name__: base}
    for cls in base.__subclasses__():
        found |= _activations(cls)
    return found


def store_result(name: str, result: SiteResult, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a site's result beside the others; returns what the header has to say of it."""
    site = {} if result.weight is None else store_weight(name, result.weight, tensors)
    site["notes"] = result.notes
    if result.inputs:
        inputs = [_store_input(f"{name}.input{i}", quantizer, tensors) for i, quantizer in enumerate(result.inputs)]
        site["inputs"] = inputs
    return site


def restore_result(name: str, site: dict[str, Any], tensors: dict[str, Tensor]) -> SiteResult:
    """A site's result from its tensors and what the header says of it."""
    weight = restore_weight(name, site, tensors) if "kind" in site else None
    inputs = [_restore_input(f"{name}.input{i}", facts, tensors) for i, facts in enumerate(site.get("inputs", ()))]
    return SiteResult(weight, inputs, site["notes"])


def _store_input(name: str, quantizer: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if _activations().get(type(quantizer).__name__) is not type(quantizer):
        raise TypeError(f"{name}: a {type(quantizer).__name__} cannot be saved")
    facts: dict[str, Any] = {"kind": type(quantizer).__name__}
    if hasattr(quantizer, "bits"):
        facts["bits"] = quantizer.bits
    if isinstance(quantizer, Noisy):
        facts["base"] = _store_input(f"{name}.base", quantizer.base, tensors)
    tensors |= {f"{name}.{key}": value for key, value in quantizer.named_buffers(recurse=False)}
    return facts


def _restore_input(name: str, facts: dict[str, Any], tensors: dict[str, Tensor]) -> ActivationQuantizer:
    cls = _activations()[facts["kind"]]
    values: dict[str, Any] = {key: value for key, value in facts.items() if key != "kind"}
    if "base" in values:
        values["base"] = _restore_input(f"{name}.base", facts["base"], tensors)
    start = f"{name}."
    own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    return cls(**values, **{key: value for key, value in own.items() if "." not in key})


def store_weight(name: str, weight: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put a weight's tensors, packed, beside the others; returns what the header has to say of it."""
    kinds = [kind for kind, cls in _weights().items() if type(weight) is cls]
    if not kinds:
        raise TypeError(f"{name}: a {type(weight).__name__} cannot be saved; mark it with bc.quantizers.base.storable")
    site: dict[str, Any] = {"kind": kinds[0], "values": {}, "packed": {}}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if not isinstance(value, Tensor):
            site["values"][field.name] = value
            continue
        if field.name == "zero_point" and getattr(weight, "symmetric", False):  # known from the bit width
            continue
        if field.name == "group" and (size := _run_length(value)):  # known from the group size
            site["columns"], site["group_size"] = len(value), size
            continue
        bits = _packed_bits(field.name, value, weight)
        if bits:
            site["packed"][field.name] = {"shape": list(value.shape), "bits": bits}
            value = pack(value.to(torch.uint8), bits)
        tensors[f"{name}.{field.name}"] = value.to(_integer(field.name, value)) if value.dtype == torch.int64 else value
    return site


def _integer(field: str, value: Tensor) -> torch.dtype:
    """Type that whole numbers are stored as; indices of groups as the 16 bits that the accounting counts."""
    return torch.int16 if field == "group" and int(value.max()) < 2**15 else torch.int32


def _run_length(group: Tensor) -> int:
    """Group size where the groups are runs of equal length in column order (the last may be shorter), else 0."""
    size = int((group == 0).sum())
    return size if size and torch.equal(group, group_index(len(group), size, group.device)) else 0


def _packed_bits(field: str, value: Tensor, weight: Any) -> int:
    """Bits that an element of a field is packed to; 0 leaves the tensor as it is."""
    if value.dtype == torch.bool:
        return 1
    return int(weight.bits) if field in ("codes", "zero_point") else 0


def restore_weight(name: str, site: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """A weight from its tensors and what the header says of it."""
    cls = _weights()[site["kind"]]
    values: dict[str, Any] = dict(site["values"])
    for field in fields(cls):
        key = f"{name}.{field.name}"
        if field.name in site["packed"]:
            how = site["packed"][field.name]
            codes = unpack(tensors[key], how["bits"], tuple(how["shape"]))
            as_found = codes if field.name == "codes" else codes.bool()  # what else is packed was bool
            values[field.name] = codes.float() if field.name == "zero_point" else as_found
        elif key in tensors:
            values[field.name] = tensors[key].long() if tensors[key].dtype in INTEGERS else tensors[key]
    if "group_size" in site:
        values["group"] = group_index(site["columns"], site["group_size"])
    if "zero_point" not in values and any(field.name == "zero_point" for field in fields(cls)):
        values["zero_point"] = torch.full_like(values["scale"], 2 ** (values["bits"] - 1))
    return cls(**values)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that carries a hash of its content, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}  # sites may share one
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        temporary = folder / path.name
        with errors_of_the_system(temporary):
            save_file(tensors, str(temporary), {**metadata, "content": content_hash(tensors, metadata)})
        share(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def errors_of_the_system(path: Path) -> Iterator[None]:
    """Raise a library's own error that stands for one of the system (a full disk, say) as an OSError of the path."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise


def share(path: Path) -> None:
    """Give a file the rights that any new file gets: safetensors makes files that their owner alone can read."""
    current = os.umask(0o022)
    os.umask(current)
    path.chmod(0o666 & ~current)


def read(path: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`write` made.

    Raises:
        DamagedFileError: It is not of the expected format, cannot be read, or its content has another hash.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path}: cannot be read as safetensors ({error})") from error
    if metadata.get("format") != expected:
        raise DamagedFileError(f"{path}: is not a {expected} file")
    wanted = metadata.pop("content", "")
    found = content_hash(tensors, metadata)
    if found != wanted:
        raise DamagedFileError(f"{path}: the content's SHA-256 is {found[:16]}…, the header says {wanted[:16]}…")
    return tensors, metadata


def content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over metadata and over names, shapes, types and bytes of tensors, in order of name."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
