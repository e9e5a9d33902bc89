"""What small commands have in common: those that take ``key=value``, and those that read a results directory."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf.errors import OmegaConfBaseException

from bc.checkpoint import DamagedFileError
from bc.errors import UserError
from bc.settings import build_dataclass
from experiments.compose import local_results
from experiments.config import results_folder
from experiments.disk import one_line_disk_errors

T = TypeVar("T")
Argument = tuple[str, dict[str, Any]]  # what argparse's add_argument takes
EXPERIMENT: Argument = ("experiment", {"help": "name of a file in conf/experiment"})
ALL = "experiments"  # argument of commands for several at once, which pass over overrides but results_dir=
OVERRIDES: Argument = ("overrides", {"nargs": "*", "help": "overrides that the experiment was run with"})


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
        for field in fields(config):  # type: ignore[arg-type]
            if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"{field.name}: is missing; write {field.name}=…")
        print(act(build_dataclass(config, values, name)))
    except (UserError, DamagedFileError, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _told(overrides: Sequence[str]) -> list[str]:
    """Overrides without those that say nothing about cells."""
    return [text for text in overrides if not text.startswith(("cells_at_once=", "results_dir="))]


def _results(given: Path | None, overrides: Sequence[str]) -> Path:
    """The results directory: of ``--results``, of ``results_dir=`` as a sweep has it, of this machine's settings.

    Raises:
        UserError: It is not one folder.
    """
    named = [text.partition("=")[2] for text in overrides if text.startswith("results_dir=")]
    folders = [results_folder(name) for name in named] + ([given.expanduser()] if given is not None else [])
    if len(set(folders)) > 1:
        raise UserError(f"--results: {' and '.join(map(str, folders))} are several folders; name one")
    results = folders[0] if folders else local_results()
    if results.exists() and not results.is_dir():
        raise UserError(f"--results: {str(results)!r} is not a folder; name the results directory")
    return results


def reading_command(
    name: str,
    description: str,
    act: Callable[[argparse.Namespace], Iterable[object]],
    own: Sequence[Argument],
    arguments: Sequence[str] | None = None,
) -> int:
    """Read arguments, ``--results`` among them, and print what comes of them line by line.

    Args:
        name: Of the module in this package.
        description: One sentence for ``--help``.
        act: What to do with the arguments; gives what to print.
        own: Arguments beside ``--results``.
        arguments: Of the process by default.

    Returns:
        0, or 2 for a mistake in the input or a disk that is full, which is one line on standard error.
    """
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=description)
    for flag, facts in own:
        parser.add_argument(flag, **facts)
    place = "results directory (default: results_dir of conf/local/default.yaml, or results)"
    parser.add_argument("--results", type=Path, help=place)
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("experiments").setLevel(logging.INFO)
    try:
        options.results = _results(options.results, [*vars(options).get("overrides", ()), *vars(options).get(ALL, ())])
        if "overrides" in options:
            options.overrides = _told(options.overrides)
        with one_line_disk_errors("--results", options.results):
            for line in act(options):
                print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
