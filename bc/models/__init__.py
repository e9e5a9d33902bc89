"""Language models: families found by discovery, models loaded by name, hub id, local folder or GGUF file."""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from bc.errors import UserError, pickled, unknown
from bc.models.base import Family, Source
from bc.progress import quiet_without_terminal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Family", "Source", "catalogue", "families", "family_of", "load", "load_tokenizer", "locate", "submodule"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTIONS = ("auto", "sdpa", "eager")


@cache
def families() -> dict[str, Family]:
    """Name → adapter of every family in this package."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found[family.name] = family
    return dict(sorted(found.items()))


def catalogue() -> dict[str, Source]:
    """Name → source of every model known by name."""
    return {name: source for family in families().values() for name, source in family.catalogue.items()}


def family_of(model: nn.Module) -> Family:
    """Adapter of a loaded model.

    Raises:
        UserError: The family is unknown; the message lists those known.
    """
    return _family_by_type(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _family_by_type(model_type: str) -> Family:
    for family in families().values():
        if model_type in family.model_types:
            return family
    known = [t for family in families().values() for t in family.model_types]
    raise unknown("model: the family", model_type, known)


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """Module at a dotted path; None where the path leads to None (an optional part)."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def locate(name: str, path: str | None = None) -> tuple[str, str, Path | None]:
    """Find what to load for a model, without loading it.

    Args:
        name: A catalogue name, a hub id (``organisation/name``), a local folder or a ``.gguf`` file.
        path: Local folder or GGUF file to read instead of the hub, for a catalogue name.

    Returns:
        (what ``from_pretrained`` takes: folder or hub id, revision, GGUF file or None).

    Raises:
        UserError: Nothing of that name is known or present, or the folder's model is of another family than the name.
    """
    source = catalogue().get(name)
    if path is None and source is not None and source.embedded:
        from bc.data import embedded

        return str(embedded.language_model(source.embedded)), "main", None
    target = path or (source.repo if source is not None else name)
    local = Path(target).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model.path: no GGUF file at {target!r}; give an existing .gguf file")
        return str(local.parent), "main", local
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model.path: {target!r} has no config.json; give a folder written by save_pretrained")
        try:
            model_type = json.loads((local / "config.json").read_text(encoding="utf8"))["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model.path: the config.json of {target!r} names no model_type; write it again") from error
        _require_family(name, _family_by_type(model_type), target)
        return str(local), "main", None
    if path is not None:
        raise UserError(f"model.path: no folder or GGUF file at {path!r}; correct the path or leave it out for the hub")
    if source is None and target.count("/") != 1:
        raise UserError(
            f"model: {name!r} is not known; allowed: {', '.join(catalogue())}, a hub id (organisation/name), "
            "a local folder or a .gguf file"
        )
    return target, source.revision if source else "main", None


def _require_family(name: str, family: Family, path: str) -> None:
    """Refuse a folder of another family than a catalogue name's, under which its results would stand."""
    own = next((known for known in families().values() if name in known.catalogue), family)
    if own.name != family.name:
        raise UserError(
            f"model.path: {path!r} holds a model of the {family.name} family, and {name!r} is of {own.name}; give "
            "the folder of that model, or set model=custom and a model.name of its own"
        )


def load(
    name: str,
    *,
    path: str | None = None,
    dtype: str = "float32",
    attention: str = "auto",
) -> PreTrainedModel:
    """Load a causal language model onto the CPU, in evaluation mode.

    Args:
        name: Catalogue name, hub id, local folder or GGUF file.
        path: Local folder or GGUF file to read instead of the hub.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        attention: ``auto`` (what transformers prefers for the model), ``sdpa`` or ``eager``.

    Raises:
        UserError: The name, dtype, attention or family is unknown, or the source is absent.
    """
    if dtype not in DTYPES:
        raise unknown("model.dtype", dtype, DTYPES)
    if attention not in ATTENTIONS:
        raise unknown("model.attention", attention, ATTENTIONS)
    target, revision, gguf = locate(name, path)
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": False}
    if attention != "auto":
        options["attn_implementation"] = attention
    if gguf is not None:
        options["gguf_file"] = gguf.name
    else:
        options |= {"revision": revision, "use_safetensors": None}
    try:
        if gguf is None:  # a family that is not known is refused before its weights are downloaded
            config = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=False)
            _family_by_type(config.model_type)
            if getattr(config, "quantization_config", None):
                raise UserError(
                    f"model: {name!r} is quantized already ({target!r} has a quantization_config); give the float model"
                )
        bars = quiet_without_terminal() if gguf is not None else nullcontext()  # the conversion's own bar
        with _quiet(), bars:  # what is missing is an error, and said as one
            model, loaded = AutoModelForCausalLM.from_pretrained(
                target, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        _require_complete(name, target, loaded)
        _require_read(name, target, loaded, family_of(model))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model: {name!r} could not be read from {target!r} ({_first_line(error)}); "
            "set model.path to a local folder, or connect to the hub"
        ) from error
    except pickle.UnpicklingError as error:
        raise pickled("model.path", target) from error
    except UserError:
        raise
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            raise UserError(
                f"model.attention: {name!r} has no {attention!r} attention; set model.attention=auto"
            ) from error
        raise
    if gguf is not None:
        drop_quantization_marks(model)
    family_of(model)
    model.config.use_cache = True
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _require_complete(name: str, target: str, loaded: dict[str, Any]) -> None:
    """Refuse a model some of whose weights the files lack, or hold in another shape: they would be random."""
    missing = sorted(loaded.get("missing_keys", ()))
    mismatched = sorted(
        str(key[0]) if isinstance(key, tuple) else str(key) for key in loaded.get("mismatched_keys", ())
    )
    for keys, what in ((missing, "are not in its files"), (mismatched, "have other shapes than its config.json says")):
        if keys:
            raise UserError(
                f"model: {_first_of(keys)} of {name!r} {what} ({target!r}); give the whole checkpoint of a causal "
                "language model, as save_pretrained writes it"
            )


def _require_read(name: str, target: str, loaded: dict[str, Any], family: Family) -> None:
    """Refuse files whose blocks hold weights that the model has no place for: it would be another model."""
    inside = re.compile(rf"(^|\.){re.escape(family.blocks.rpartition('.')[2])}\.\d+\.(.*\.)?(weight|bias)$")
    unread = sorted(key for key in loaded.get("unexpected_keys", ()) if inside.search(key))
    if unread:
        raise UserError(
            f"model: the files of {name!r} ({target!r}) hold {_first_of(unread)}, which the model of their config.json "
            "has no place for; give the config.json that belongs to them"
        )


def _first_of(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def load_tokenizer(name: str, *, path: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; arguments as :func:`load`."""
    target, revision, gguf = locate(name, path)
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False}
    options |= {"gguf_file": gguf.name} if gguf is not None else {"revision": revision}
    try:
        found = AutoTokenizer.from_pretrained(target, **options)
        if len(found) <= len(found.all_special_tokens):  # what transformers makes up where there are no files
            raise ValueError("it has no vocabulary")
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: the tokenizer of {name!r} could not be read from {target!r} ({_first_line(error)}); "
            "put the tokenizer's files into the model's folder"
        ) from error
    return found


def drop_quantization_marks(model: Any) -> None:
    """Make a model that was read from GGUF an ordinary float model, so that it can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
