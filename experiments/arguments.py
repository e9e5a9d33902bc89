"""Small commands that take ``key=value`` arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml
from omegaconf.errors import OmegaConfBaseException

from bc.checkpoint import DamagedFileError
from bc.errors import UserError
from bc.settings import build_dataclass

T = TypeVar("T")


def command(name: str, config: type[T], act: Callable[[T], str], arguments: Sequence[str] | None = None) -> int:
    """Read arguments into a dataclass, act on it and print the outcome.

    Args:
        name: Of the command, for messages.
        config: Dataclass of its settings; values of ``str`` fields are taken as they are, others read as YAML.
        act: What to do; returns what to print.
        arguments: Of the process by default.

    Returns:
        0, or 2 for a mistake in the input, which is one line on standard error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        values: dict[str, Any] = {}
        for argument in given:
            key, equals, text = argument.partition("=")
            if not equals:
                known = " ".join(f"{field}=…" for field in config.__annotations__)
                raise UserError(f"{name}: {argument!r} is not key=value; write {known}")
            values[key] = text if config.__annotations__.get(key) == "str" else yaml.safe_load(text)
        print(act(build_dataclass(config, values, name)))
    except (UserError, DamagedFileError, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
