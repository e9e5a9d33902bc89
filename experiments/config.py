"""Schema of a run: what Hydra composes is checked here and turned into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bc import quantizers
from bc.errors import UserError, unknown
from bc.settings import Bits, Compensation, build_dataclass

T = TypeVar("T")

FLOAT = "none"  # the quantizer that leaves the model as it is


@dataclass(frozen=True)
class ModelConfig:
    """Which model; ``path`` and ``attention`` are not part of a cell's identity."""

    name: str
    path: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        if self.name.endswith(".gguf") or (self.path is None and Path(self.name).expanduser().is_dir()):
            raise UserError(
                f"model.name: {self.name!r} is a path; "
                f"set model.path={self.name}, and model.name to a name for its results"
            )


@dataclass(frozen=True)
class CalibrationConfig:
    """Samples that fit."""

    dataset: str
    samples: int
    window: int

    def __post_init__(self) -> None:
        require("data.calibration.samples", self.samples, 1)
        require("data.calibration.window", self.window, 2)


@dataclass(frozen=True)
class SelectionConfig:
    """Samples that fit nothing and choose between settings."""

    samples: int

    def __post_init__(self) -> None:
        require("data.selection.samples", self.samples, 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Test texts."""

    datasets: tuple[str, ...]
    window: int
    limit: int | None = None

    def __post_init__(self) -> None:
        require("data.evaluation.window", self.window, 2)
        if self.limit is not None:
            require("data.evaluation.limit", self.limit, 1)
        if not self.datasets or len(set(self.datasets)) != len(self.datasets):
            raise UserError(
                f"data.evaluation.datasets: {list(self.datasets)} is not allowed; name one or more, each once"
            )


@dataclass(frozen=True)
class DataConfig:
    """Calibration, selection and test texts; ``paths`` are not part of a cell's identity."""

    calibration: CalibrationConfig
    selection: SelectionConfig
    evaluation: EvaluationConfig
    paths: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportConfig:
    """On how many samples the output error of every site is measured."""

    calibration_samples: int = 4
    held_out_samples: int = 8

    def __post_init__(self) -> None:
        require("report.calibration_samples", self.calibration_samples, 0)
        require("report.held_out_samples", self.held_out_samples, 0)


@dataclass(frozen=True)
class EngineConfig:
    """How a cell runs; of no effect on results beyond rounding."""

    device: str = "auto"
    batch_size: int = 4
    activations: Literal["device", "host", "disk"] = "host"
    threads: int | None = None

    def __post_init__(self) -> None:
        require("engine.batch_size", self.batch_size, 1)
        if self.threads is not None:
            require("engine.threads", self.threads, 1)


@dataclass(frozen=True)
class LoggerConfig:
    """Where results are mirrored."""

    name: Literal["wandb", "none"] = "none"
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "bias-compensation"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class CellConfig:
    """One point of a sweep. ``options`` are the quantizer's own, all of them, defaults filled in."""

    model: ModelConfig
    quantizer: str
    options: dict[str, Any]
    bits: Bits
    bc: Compensation
    data: DataConfig
    report: ReportConfig
    seed: int

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.quantizer == FLOAT


@dataclass(frozen=True)
class RunConfig:
    """A cell, and how and where it is run."""

    cell: CellConfig
    engine: EngineConfig
    logger: LoggerConfig
    experiment: str
    results: Path
    on_error: str
    save_model: bool = False


def require(where: str, value: int, low: int) -> None:
    """Refuse a number below a bound."""
    if value < low:
        raise UserError(f"{where}: {value} is not allowed; use {low} or more")


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration.

    Args:
        values: The resolved configuration as plain dicts, lists and scalars.

    Raises:
        UserError: One line that names the key, its value and what is allowed.
    """
    known = {"model", "quantizer", "bits", "bc", "data", "report", "engine", "logger"}
    known |= {"experiment", "seed", "cell", "on_error", "results_dir", "cells_at_once", "save_model"}
    for key in values:
        if key not in known:
            raise unknown("setting", key, known)
    if values["on_error"] not in ("continue", "raise"):
        raise unknown("on_error", values["on_error"], ("continue", "raise"))
    if not isinstance(values["save_model"], bool):
        raise UserError(f"save_model: {values['save_model']!r} is not allowed; use true or false")
    if not isinstance(values["results_dir"], str):
        raise UserError(f"results_dir: {values['results_dir']!r} is not a folder name; set results_dir=results")
    logger = dict(section(values, "logger"))
    logger["tags"] = strings("logger.tags", logger.get("tags", ()))
    return RunConfig(
        cell=cell_config(values),
        engine=build_dataclass(EngineConfig, dict(section(values, "engine")), "engine"),
        logger=build_dataclass(LoggerConfig, logger, "logger"),
        experiment=str(section(values, "experiment").get("name", "adhoc")),
        results=Path(values["results_dir"]),
        save_model=values["save_model"],
        on_error=values["on_error"],
    )


def cell_config(values: Mapping[str, Any]) -> CellConfig:
    """Check the part of a composed configuration that determines results."""
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed: {seed!r} is not allowed; use a whole number of 0 or more")
    bc = dict(section(values, "bc"))
    bc["scope"] = strings("bc.scope", bc.get("scope", ()))
    bits = build_dataclass(Bits, dict(section(values, "bits")), "bits")
    options = dict(section(values, "quantizer"))
    name = options.pop("name", None)
    cell = CellConfig(
        model=build_dataclass(ModelConfig, dict(section(values, "model")), "model"),
        quantizer=name,
        options=quantizer_options(name, bits, options),
        bits=bits,
        bc=build_dataclass(Compensation, bc, "bc"),
        data=data_config(section(values, "data")),
        report=build_dataclass(ReportConfig, dict(section(values, "report")), "report"),
        seed=seed,
    )
    check_combination(cell)
    return cell


def data_config(values: Mapping[str, Any]) -> DataConfig:
    """Check the data section."""
    for key in values:
        if key not in ("calibration", "selection", "evaluation", "paths"):
            raise unknown("data option", key, ("calibration", "selection", "evaluation", "paths"))
    evaluation = dict(section(values, "evaluation", "data."))
    evaluation["datasets"] = strings("data.evaluation.datasets", evaluation.get("datasets", ()))
    paths = dict(section(values, "paths", "data.")) if values.get("paths") else {}
    for key, path in paths.items():
        if path is not None and not isinstance(path, str):
            raise UserError(f"data.paths.{key}: {path!r} is a {type(path).__name__}; a path or null is needed")
    calibration = dict(section(values, "calibration", "data."))
    return DataConfig(
        calibration=build_dataclass(CalibrationConfig, calibration, "data.calibration"),
        selection=build_dataclass(SelectionConfig, dict(section(values, "selection", "data.")), "data.selection"),
        evaluation=build_dataclass(EvaluationConfig, evaluation, "data.evaluation"),
        paths=paths,
    )


def quantizer_options(name: Any, bits: Bits, options: dict[str, Any]) -> dict[str, Any]:
    """A quantizer's options with defaults filled in, checked by making the quantizer."""
    if name == FLOAT:
        if options:
            raise unknown("quantizer.none option", next(iter(options)), ["(none)"])
        return {}
    if name not in quantizers.available():
        raise unknown("quantizer.name", name, [FLOAT, *quantizers.available()])
    if quantizers.available()[name].kind == "weight_activation":
        raise UserError(
            f"quantizer: {name!r} quantizes the weights and activations of vision models, which cannot be run yet; "
            f"choose one of {', '.join(quantizers.of_kind('weight'))}"
        )
    if bits.weight == 16 and bits.activation == 16:
        raise UserError(f"bits: float does not go with quantizer={name}; set quantizer=none or bits=w4")
    return asdict(quantizers.create(name, bits, **options).options)


def check_combination(cell: CellConfig) -> None:
    """Refuse settings that contradict one another."""
    float_bits = cell.bits.weight == 16 and cell.bits.activation == 16
    if cell.is_float and not float_bits:
        raise UserError(f"bits: {cell.bits.label} does not go with quantizer=none, the float model; set bits=float")
    if cell.is_float and cell.bc.enabled:
        raise UserError("bc: there is nothing to compensate with quantizer=none, the float model; set bc=off")
    if cell.report.held_out_samples > cell.data.selection.samples:
        raise UserError(
            f"report.held_out_samples: {cell.report.held_out_samples} is more than the "
            f"{cell.data.selection.samples} of data.selection.samples; lower the one or raise the other"
        )


def section(values: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """A part of the configuration that has to be a mapping."""
    part = values.get(key)
    if not isinstance(part, Mapping):
        raise UserError(f"{prefix}{key}: {part!r} is not a group of settings; choose an option of conf/{key}")
    return part


def strings(where: str, value: Any) -> tuple[str, ...]:
    """A list of names as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: {value!r} is not a list of names; write {where}=[name,name]")
    return tuple(value)
