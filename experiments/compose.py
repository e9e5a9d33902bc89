"""Hydra's side: cells of an experiment file, composition of one cell, and Hydra's errors in one line."""

from __future__ import annotations

import itertools
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from bc.errors import UserError, unknown
from experiments.config import RunConfig, refuse_local_section, results_folder, run_config

HYDRAS, OURS = ("hydra", "omegaconf", "antlr4", "yaml"), ("experiments", "bc")
CONFIG_MODULE, CONFIG_NAME = "conf", "config"
AXES = ("model", "quantizer", "bits", "bc", "data", "seed")  # order of a product, first varies slowest


def local_results() -> Path:
    """The results directory that this machine's own settings name, where there are any.

    Raises:
        UserError: They are malformed.
    """
    if not (Path(__file__).parent.parent / CONFIG_MODULE / "local" / "default.yaml").is_file():
        return Path("results")
    with hydra_ready(), one_line_errors():
        config = compose(CONFIG_NAME)
        refuse_local_section(config)
        return results_folder(config.results_dir)


def register_resolvers() -> None:
    """Make the resolvers that conf/ uses known to OmegaConf."""
    OmegaConf.register_new_resolver("folder", lambda value: str(results_folder(value)), replace=True)
    OmegaConf.register_new_resolver("process", lambda: str(os.getpid()), replace=True, use_cache=True)
    OmegaConf.register_new_resolver("cell_numbers", lambda cells: f"range(0,{len(expand(cells))})", replace=True)


register_resolvers()


def expand(cells: Any) -> list[list[str]]:
    """Overrides of every cell of an experiment.

    Args:
        cells: Entries of ``{key: [values]}``; each is the product of its lists. Keys are config groups or dotted
            settings, values are option names or values.

    Raises:
        UserError: An entry is malformed; names that YAML read as a truth value are pointed out.
    """
    plain = OmegaConf.to_container(cells, resolve=True) if isinstance(cells, ListConfig) else cells
    if not isinstance(plain, list) or not plain:
        raise UserError("experiment.cells: is empty; list at least one {group: [options]} entry")
    out: list[list[str]] = []
    for number, entry in enumerate(plain):
        where = f"experiment.cells[{number}]"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {entry!r} is not a mapping; write {{model: [name], bits: [name]}}")
        keys = sorted(entry, key=lambda k: AXES.index(k) if k in AXES else len(AXES))
        lists = [[_override(where, k, v) for v in _as_list(entry[k])] for k in keys]
        out += [list(combination) for combination in itertools.product(*lists)]
    return out


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _override(where: str, key: str, value: Any) -> str:
    if isinstance(value, bool) and key in AXES:
        raise UserError(
            f"{where}.{key}: {value} is not an option (YAML reads a bare off as False); write 'off' in quotes"
        )
    if isinstance(value, list):
        return f"{key}=[{','.join(str(v) for v in value)}]"
    return f"{key}={'null' if value is None else value}"


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Make :func:`compose` usable outside a Hydra application."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        yield


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain Python values."""
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items() if k != "hydra"}


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """Compose and check one cell from overrides; call within :func:`hydra_ready`."""
    with one_line_errors():
        return run_config(plain(compose(CONFIG_NAME, overrides=list(overrides))))


def job_config(config: DictConfig, job_overrides: Sequence[str]) -> RunConfig:
    """The checked configuration of the cell that a Hydra job is to run.

    Args:
        config: The job's configuration.
        job_overrides: The job's own overrides; those of the user apply to every cell of an experiment.

    Raises:
        UserError: It is malformed, or of an experiment and none of its cells.
    """
    if config.cell is None and not config.experiment.cells:
        with one_line_errors():
            return run_config(plain(config))
    count = len(expand(config.experiment.cells))
    if config.cell is None:  # it would be the default cell under the experiment's name
        raise UserError(
            f"cell: none of the {count} cells of {config.experiment.name} is chosen; leave hydra.mode and "
            "hydra.sweeper to the hydra part of its file (docs/extending.md), which runs them all, or set cell to "
            f"0 to {count - 1}"
        )
    if not (isinstance(config.cell, int) and 0 <= config.cell < count):
        raise UserError(
            f"cell: {config.cell} is not allowed; use 0 to {count - 1}, the cells of {config.experiment.name}"
        )
    return compose_cell(config.experiment, config.cell, job_overrides)


def compose_cell(experiment: DictConfig, number: int, user_overrides: Sequence[str]) -> RunConfig:
    """Compose a cell of an experiment.

    Args:
        experiment: The experiment section.
        number: Which cell.
        user_overrides: Overrides that apply to every cell; they win over the cell's own.

    Raises:
        UserError: It is malformed, or one model's files are given for several.
    """
    cells = expand(experiment.cells)
    own = cells[number]
    users = [o for o in user_overrides if not re.match(r"\+?(cell|experiment)=|hydra[./]", o)]
    given = {o.lstrip("+~").partition("=")[0] for o in users}
    kept = [o for o in own if o.partition("=")[0] not in given]
    refuse_one_path(
        users, {o for cell in cells for o in cell if o.startswith("model=")} if "model" not in given else set()
    )
    head = [f"experiment.name={experiment.name}", f"experiment.suite={experiment.suite}"]
    return compose_run([*kept, *users, *head])


def refuse_one_path(users: Sequence[str], models: set[str]) -> None:
    """Refuse one folder or file for several models, whose results it would all be.

    Raises:
        UserError: Saying how each gets its own.
    """
    for override in users:
        key, _, value = override.lstrip("+").partition("=")
        if key == "model.path" and len(models) > 1 and value not in ("", "null") and not re.search(r"\$\\?\{", value):
            raise UserError(
                f"model.path: {value} would be read for all {len(models)} models of the experiment; write "
                "'model.path=FOLDER/${model.name}' for a folder with one of each name, or choose one with model="
            )


def load_experiment(name: str, user_overrides: Sequence[str] = ()) -> tuple[DictConfig, list[RunConfig]]:
    """An experiment's section and all its cells, checked; nothing is run.

    Raises:
        UserError: No such experiment, or one of its cells is malformed.
    """
    with hydra_ready(), one_line_errors():
        if name not in experiment_names():
            raise unknown("experiment", name, experiment_names())
        section = compose(CONFIG_NAME, overrides=[f"+experiment={name}"]).experiment
        count = len(expand(section.cells))
        points = sweep_points(user_overrides)
        return section, [compose_cell(section, i, point) for i in range(count) for point in points]


def refuse_lists(overrides: Sequence[str]) -> None:
    """Refuse a list of options of one group, which Hydra would merge so that the last wins, and several experiments.

    Raises:
        UserError: Naming the group.
    """
    experiments = [found[1] for text in overrides if (found := re.match(r"\+{0,2}experiment=(.*)", text))]
    if len(experiments) > 1 or any(re.search(r"[,(\[]", value) for value in experiments):
        raise UserError(
            f"experiment: {' '.join(experiments)} is several experiments; run one after the other, +experiment=NAME"
        )
    for text in overrides:
        if found := re.match(r"\+{0,2}(model|quantizer|bits|bc|data)=\[([^]]*)\]$", text):
            group, options = found[1], found[2].replace(" ", "")
            raise UserError(
                f"{group}: [{options}] is a list, and a cell has one {group}; write {group}={options} with -m"
            )


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """The points of a sweep: ``seed=0,1`` is two, a single value is one."""
    refuse_lists(overrides)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    axes = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    return [list(point) for point in itertools.product(*axes)]


def experiment_names() -> list[str]:
    """Names of the experiment files."""
    folder = Path(__file__).parent.parent / CONFIG_MODULE / "experiment"
    return sorted(p.stem for p in folder.glob("*.yaml"))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors into :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not from_hydra(error):
            raise
        raise one_line(error) from error


def from_hydra(error: BaseException) -> bool:
    """Whether Hydra, OmegaConf or their parser raised an error; not all of theirs are of their own classes."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return True
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in names]
    return next((p in HYDRAS for p in reversed(packages) if p in HYDRAS or p in OURS), False)


def one_line(error: BaseException) -> UserError:
    """What is wrong with a configuration, in one line."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, UserError):
            return link
    for link in chain:
        message = _known(link)
        if message is not None:
            return message
    return UserError(" ".join(str(chain[0]).split()))


def _known(error: BaseException) -> UserError | None:
    text = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"(?:find|load) '(\S+?)/?(\w*)'", text)
        group, value = (str(found[1]), str(found[2])) if found else ("config", "")
        return unknown(group, value, error.options or options_of(group))
    if isinstance(error, MissingMandatoryValue):
        key = _full_key(text)
        return UserError(f"{key}: is missing; set {key}=…")
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        key = _full_key(text)
        if key.startswith("quantizer."):  # each has its own
            return UserError(
                f"{key}: is not a setting of the chosen quantizer; its file in conf/quantizer has them all"
            )
        allowed = settings_beside(key, error.parent_node)
        return unknown("setting", key, allowed) if allowed else UserError(f"{key}: is not a setting")
    if isinstance(error, ValidationError) and error.full_key:
        what = text.partition("\n")[0]
        mend = f'; write {error.full_key}=["…"]' if "is not a ListConfig" in what else ""
        return UserError(f"{error.full_key}: {error.value!r} is not allowed ({what}){mend}")
    if found := re.search(r"Ambiguous value for argument '(\S+?)=(\S+)'", text):
        key, value = found.groups()
        other = f", or write {key}=[{value}]" if takes_list(key) else ""
        return UserError(f"{key}: {value} is several values; add -m for a sweep over them{other}")
    if found := re.search(r"Error parsing override '([^']*)'", text):
        return UserError(f"override {found.group(1)!r} is not understood; write key=value")
    return None


def _full_key(text: str) -> str:
    found = re.search(r"full_key: (\S+)", text) or re.search(r"Missing mandatory value: (\S+)", text)
    return found.group(1) if found else "config"


def options_of(group: str) -> list[str]:
    """Names of a config group's options."""
    with hydra_ready():
        loader = GlobalHydra.instance().config_loader()
        return list(loader.get_group_options(group))


def takes_list(key: str) -> bool:
    """Whether a setting is a list in the default configuration."""
    with hydra_ready():
        return isinstance(OmegaConf.select(compose(CONFIG_NAME), key, throw_on_missing=False), ListConfig)


def settings_beside(key: str, node: Any) -> list[str]:
    """Dotted names of the settings that stand beside an unknown one, in the groups that were chosen.

    Args:
        key: The unknown one.
        node: Where it was looked for, as the error has it; where it has none, the default configuration is asked.
    """
    parent = key.rpartition(".")[0]
    if not isinstance(node, DictConfig):
        with hydra_ready():
            node = compose(CONFIG_NAME)
        if parent:
            node = OmegaConf.select(node, parent, throw_on_missing=False)
    names = [str(k) for k in node] if isinstance(node, DictConfig) else []
    hidden = () if parent else ("hydra",)
    return [f"{parent}.{k}" if parent else k for k in names if k not in hidden and not k.startswith("_")]
