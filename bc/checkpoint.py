"""Files of quantized weights and statistics: safetensors, codes packed to their bit width, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bc.compensation import PositionSums
from bc.grid import QuantizedWeight
from bc.quantizers.base import WeightResult

FORMAT = "bias-compensation-weights-1"


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


def save_weights(path: Path, weights: dict[str, WeightResult], metadata: dict[str, str]) -> None:
    """Write quantized weights to one file; it appears complete or not at all.

    Args:
        path: The file to make; parents are made too.
        weights: Site → quantized weight, as from :func:`bc.pipeline.calibrate`.
        metadata: Facts to keep in the header.
    """
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    for name, result in weights.items():
        weight = result.weight
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{name}: a {type(weight).__name__} cannot be saved")
        tensors[f"{name}.codes"] = pack(weight.codes, weight.bits)
        tensors[f"{name}.scale"] = weight.scale.contiguous()
        if not weight.symmetric:
            tensors[f"{name}.zero_point"] = pack(weight.zero_point.to(torch.uint8), weight.bits)
        tensors[f"{name}.group"] = weight.group.to(torch.int32)
        sites[name] = {
            "shape": list(weight.codes.shape),
            "bits": weight.bits,
            "symmetric": weight.symmetric,
            "trivial_groups": weight.trivial_groups,
            "notes": result.notes,
        }
    header = {"format": FORMAT, "sites": json.dumps(sites), **metadata}
    _write(path, tensors, header)


def load_weights(path: Path) -> tuple[dict[str, WeightResult], dict[str, str]]:
    """Read what :func:`save_weights` wrote.

    Raises:
        DamagedFileError: The file is truncated, altered or of another format.
    """
    tensors, metadata = _read(path, FORMAT)
    out: dict[str, WeightResult] = {}
    try:
        for name, site in json.loads(metadata.pop("sites")).items():
            bits, scale = site["bits"], tensors[f"{name}.scale"]
            if site["symmetric"]:
                zero = torch.full_like(scale, 2 ** (bits - 1))
            else:
                zero = unpack(tensors[f"{name}.zero_point"], bits, tuple(scale.shape)).float()
            codes = unpack(tensors[f"{name}.codes"], bits, tuple(site["shape"]))
            group = tensors[f"{name}.group"].long()
            weight = QuantizedWeight(codes, scale, zero, bits, site["symmetric"], group, site["trivial_groups"])
            out[name] = WeightResult(weight, site["notes"])
    except (KeyError, ValueError) as error:
        raise DamagedFileError(f"{path}: the file does not hold what its header says ({error})") from error
    return out, metadata


def save_means(folder: Path, means: dict[str, PositionSums], metadata: dict[str, str]) -> None:
    """Write sums of inputs by position to ``means.safetensors`` in a folder; complete or not at all."""
    tensors = {f"{name}.total": sums.total.float() for name, sums in means.items()}
    tensors |= {f"{name}.count": sums.count.float() for name, sums in means.items()}
    _write(folder / "means.safetensors", tensors, {"format": "bias-compensation-means-1", **metadata})


def load_means(folder: Path) -> dict[str, PositionSums]:
    """Read what :func:`save_means` wrote.

    Raises:
        DamagedFileError: The file is truncated, altered or of another format.
    """
    tensors, _ = _read(folder / "means.safetensors", "bias-compensation-means-1")
    out = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part == "total":
            sums = PositionSums(*tensors[key].shape)
            sums.total, sums.count = tensors[key].double(), tensors[f"{name}.count"].double()
            out[name] = sums
    return out


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that carries a hash of its content, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        temporary = folder / path.name
        save_file(tensors, str(temporary), {**metadata, "content": content_hash(tensors, metadata)})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
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
