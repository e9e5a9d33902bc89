"""Vision transformers: families found by discovery, models loaded by name or from a checkpoint file.

``load`` returns timm's own model with named matmuls (:mod:`bc.vision.attention`); ``units`` shows it as a chain of
units with their sites (:mod:`bc.vision.base`); ``preprocessing`` gives its evaluation transform.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bc.errors import UserError, unknown
from bc.vision.base import ROLES, Site, Source, Unit, VisionFamily

if TYPE_CHECKING:
    from bc.vision.transforms import Preprocessing

__all__ = [
    "ROLES",
    "Site",
    "Source",
    "Unit",
    "VisionFamily",
    "catalogue",
    "check",
    "classes",
    "create",
    "families",
    "family_of",
    "knows",
    "load",
    "preprocessing",
    "sites",
    "units",
    "wrap",
]


@cache
def families() -> dict[str, VisionFamily]:
    """Name → adapter of every family in this package."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, VisionFamily):
            found[family.name] = family
    return dict(sorted(found.items()))


def catalogue() -> dict[str, Source]:
    """Name → source of every model known by name."""
    return {name: source for family in families().values() for name, source in family.catalogue.items()}


def family_of(model: nn.Module) -> VisionFamily:
    """Adapter of a loaded model.

    Raises:
        UserError: The family is unknown; the message lists those known.
    """
    for family in families().values():
        if type(model).__name__ in family.classes:
            return family
    known = [name for family in families().values() for name in family.classes]
    raise unknown("model: the class", type(model).__name__, known)


def create(name: str) -> nn.Module:
    """A model with random weights, as timm builds it: attention unnamed, in training mode.

    Args:
        name: Catalogue name, or a timm name of a known family.

    Raises:
        UserError: The name or the family is unknown.
    """
    return _create(_source(name))


def check(name: str, path: str | None = None) -> None:
    """Find out cheaply whether a model can be had; arguments and errors as :func:`load`, but for the hub's.

    Raises:
        UserError: Also where a part of the model is not covered.
    """
    from bc.vision import checkpoints

    source = _source(name)
    if path is not None:
        checkpoints.locate(path)
    elif source.embedded:
        checkpoints.check_embedded(source.embedded)
    elif "." not in source.timm:
        raise _untagged(name, source)
    classes(name)


@cache
def classes(name: str) -> int:
    """How many classes a model tells apart, found without its weights.

    Args:
        name: As for :func:`create`.

    Returns:
        The number of its logits; 0 for a model without a head.

    Raises:
        UserError: The name or the family is unknown, or a part of the model is not covered.
    """
    with torch.device("meta"):
        model: Any = create(name)
    units(wrap(model))
    return int(model.num_classes)


def _untagged(name: str, source: Source) -> UserError:
    return UserError(
        f"model: {name!r} names no weights; add timm's tag ({_tags(source.timm)}), or set model.path to a checkpoint"
    )


def load(name: str, path: str | None = None, *, dtype: str = "float32") -> nn.Module:
    """Load a model onto the CPU, in evaluation mode, without gradients, with named matmuls.

    Args:
        name: Catalogue name, or a timm name with its tag (``vit_tiny_patch16_224.augreg_in21k_ft_in1k``).
        path: Checkpoint to read instead of the hub: a ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file, or a
            folder with ``model.safetensors`` or ``pytorch_model.bin``.
        dtype: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        UserError: The name, dtype or family is unknown, the weights are absent, or they are another model's.
    """
    from bc.models import DTYPES
    from bc.vision import checkpoints

    if dtype not in DTYPES:
        raise unknown("model.dtype", dtype, DTYPES)
    source = _source(name)
    if path is not None:
        model = _create(source)
        checkpoints.read_into(model, checkpoints.locate(path))
    elif source.embedded:
        model = _create(source)
        checkpoints.read_embedded(model, source.embedded)
    elif "." not in source.timm:
        raise _untagged(name, source)
    else:
        model = _create(source, pretrained=True)
    return wrap(model).to(DTYPES[dtype]).eval().requires_grad_(False)


def wrap(model: nn.Module) -> nn.Module:
    """Give every attention of a model named matmuls, in place; a second call changes nothing."""
    return family_of(model).wrap(model)


def units(model: nn.Module) -> list[Unit]:
    """A wrapped model as a chain of units; see :class:`~bc.vision.base.Unit`."""
    return family_of(model).units(model)


def sites(model: nn.Module) -> list[Site]:
    """All sites of a wrapped model, in forward order."""
    return [site for unit in units(model) for site in unit.sites]


def preprocessing(model: nn.Module | str) -> Preprocessing:
    """The evaluation transform of a model.

    Args:
        model: A model that was loaded here or created by timm, or its name as for :func:`create`.

    Raises:
        UserError: The name is unknown, or the model is not timm's and so has no transform of its own.
    """
    from bc.vision.transforms import Preprocessing

    found = create(model) if isinstance(model, str) else model
    if not getattr(found, "pretrained_cfg", None):  # timm would take ImageNet's usual values
        raise UserError(
            f"preprocessing: a {type(found).__name__} is no model of timm's; give a model that bc.load has loaded, "
            "or its name"
        )
    return Preprocessing.of(found)


def knows(name: str) -> bool:
    """Whether a name is timm's, with or without a tag."""
    import timm

    return "/" not in name and bool(timm.is_model(name.partition(".")[0]))


def _source(name: str) -> Source:
    source = catalogue().get(name)
    if source is not None:
        return source
    import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise UserError(
            f"model: {name!r} is not known; allowed: {', '.join(catalogue())}, or a timm name with its tag "
            "(vit_tiny_patch16_224.augreg_in21k_ft_in1k)"
        )
    if tag and name not in timm.list_pretrained(f"{base}.*"):
        raise UserError(f"model: timm has no weights {name!r}; allowed tags: {_tags(base)}")
    return Source(name)


def _tags(base: str) -> str:
    import timm

    return ", ".join(full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")) or "none"


def _create(source: Source, pretrained: bool = False) -> nn.Module:
    import timm

    options: dict[str, Any] = dict(source.options)
    if source.preprocessing:
        options["pretrained_cfg_overlay"] = dict(source.preprocessing)
    try:
        model = timm.create_model(source.timm, pretrained=pretrained, **options)
    except Exception as error:  # the hub client's, its HTTP library's and the file system's share no other base
        if not pretrained:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: the weights of {source.timm!r} cannot be had from the hub ({reason.rstrip('.')}); "
            "set model.path to a checkpoint file (.safetensors or .pth), or connect to the hub"
        ) from error
    family_of(model)
    return model
