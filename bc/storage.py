"""Files of ours: safetensors with a hash of their content, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bc.activation_grids import Noisy
from bc.activations import ActivationQuantizer
from bc.packing import PackedResult, packed
from bc.quantizers import available
from bc.quantizers.base import SiteResult


class DamagedFileError(ValueError):
    """A file of ours is truncated, altered or not what it should be; the message names it."""


def _activations(base: type[ActivationQuantizer] = ActivationQuantizer) -> dict[str, type[ActivationQuantizer]]:
    """All activation quantizers by name."""
    available()
    found = {base.__name__: base}
    for cls in base.__subclasses__():
        found |= _activations(cls)
    return found


def store_result(name: str, result: SiteResult, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a site's result beside the others; returns what the header has to say of it."""
    site: dict[str, Any] = {}
    waiting = packed(result)
    if isinstance(waiting, PackedResult):
        site |= waiting.facts
        tensors |= {f"{name}.{field}": value for field, value in waiting.tensors.items()}
    elif waiting.weight is not None:
        kind = type(waiting.weight).__name__
        raise TypeError(f"{name}: a {kind} cannot be saved; mark it with bc.quantizers.base.storable")
    site["notes"] = result.notes
    if result.inputs:
        inputs = [_store_input(f"{name}.input{i}", quantizer, tensors) for i, quantizer in enumerate(result.inputs)]
        site["inputs"] = inputs
    return site


def restore_result(name: str, site: dict[str, Any], tensors: dict[str, Tensor]) -> SiteResult:
    """A site's result, with its weight still packed, from its tensors and what the header says of it.

    Raises:
        KeyError, TypeError, ValueError: The tensors are not those of the header.
    """
    inputs = [_restore_input(f"{name}.input{i}", facts, tensors) for i, facts in enumerate(site.get("inputs", ()))]
    if "kind" not in site:
        return SiteResult(None, inputs, site["notes"])
    facts = {key: value for key, value in site.items() if key not in ("notes", "inputs")}
    return PackedResult(facts, _of(name, tensors), inputs, site["notes"])


def _of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors directly below a name, by what follows it."""
    start = f"{name}."
    own = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
    return {key: value for key, value in own.items() if "." not in key}


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
    return cls(**values, **_of(name, tensors))


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that carries a hash of its content, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = apart(tensors)
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


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and none sharing memory with another, as safetensors asks; copied only where need be."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        storage = value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != value.numel() * value.element_size()
        seen.add(storage.data_ptr())
        out[name] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    return out


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
