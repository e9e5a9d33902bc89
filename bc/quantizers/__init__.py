"""Quantizers: one file each, found by discovery.

A file in this package that defines a subclass of :class:`~bc.quantizers.base.Quantizer` with a ``name`` is a
quantizer; nothing else needs to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from functools import cache
from typing import Any

from bc.errors import UserError, unknown
from bc.quantizers.base import Quantizer
from bc.settings import Bits, build_dataclass

__all__ = ["Quantizer", "available", "create", "of_kind", "option_names"]


@cache
def available() -> dict[str, type[Quantizer]]:
    """Name → class of every quantizer in this package."""
    found: dict[str, type[Quantizer]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        for value in vars(loaded).values():
            defined = isinstance(value, type) and issubclass(value, Quantizer) and value.__module__ == loaded.__name__
            if defined and value.name:
                found[value.name] = value
    return dict(sorted(found.items()))


def of_kind(kind: str) -> list[str]:
    """Names of the quantizers of a kind: ``weight`` or ``weight_activation``."""
    return [name for name, cls in available().items() if cls.kind == kind]


def create(name: str, bits: Bits, **options: Any) -> Quantizer:
    """Make a quantizer by name.

    Args:
        name: One of :func:`available`.
        bits: Bit widths and group size.
        options: The quantizer's own options (its ``Options`` dataclass).

    Raises:
        UserError: The name or an option is unknown, or a value has the wrong type or range.
    """
    classes = available()
    if name not in classes:
        raise unknown("quantizer", name, classes)
    cls = classes[name]
    settings = build_dataclass(cls.Options, options, f"quantizer.{name}")
    if cls.kind == "weight" and bits.activation < 16:
        raise UserError(
            f"bits.activation: {bits.activation} does not go with quantizer {name!r}, which quantizes weights only; "
            "set bits.activation=16 or choose a weight-and-activation quantizer"
        )
    return cls(bits, settings)


def option_names(name: str) -> list[str]:
    """Names of a quantizer's own options."""
    return [f.name for f in fields(available()[name].Options)]
