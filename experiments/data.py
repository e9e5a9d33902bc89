"""Schema of the data section: which samples calibrate, fit, choose and score; texts or images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bc.data.sources import SOURCES
from bc.errors import UserError, unknown
from bc.settings import build_dataclass


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
        _check_names(self.datasets)


@dataclass(frozen=True)
class TextData:
    """Calibration, selection and test texts; ``paths`` are not part of a cell's identity."""

    calibration: CalibrationConfig
    selection: SelectionConfig
    evaluation: EvaluationConfig
    paths: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageCalibration:
    """Training images that the quantizer is calibrated on; without a seed of their own they follow the cell's."""

    dataset: str
    samples: int
    seed: int | None = None

    def __post_init__(self) -> None:
        require("data.calibration.samples", self.samples, 1)
        _check_seed("data.calibration.seed", self.seed)


@dataclass(frozen=True)
class ImageFit:
    """Training images that biases are fitted on; without a seed of their own they follow the cell's."""

    samples: int
    seed: int | None = None

    def __post_init__(self) -> None:
        require("data.compensation.samples", self.samples, 1)
        _check_seed("data.compensation.seed", self.seed)


@dataclass(frozen=True)
class ImageEvaluation:
    """Test images; ``limit`` and ``offset`` make a partial run."""

    datasets: tuple[str, ...]
    limit: int | None = None
    offset: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("offset", 0)):
            value = getattr(self, name)
            if value is not None:
                require(f"data.evaluation.{name}", value, least)
        _check_names(self.datasets)


@dataclass(frozen=True)
class ImageData:
    """Calibration, fitting, selection and test images; the last three fields are not part of a cell's identity."""

    calibration: ImageCalibration
    compensation: ImageFit
    selection: SelectionConfig
    evaluation: ImageEvaluation
    paths: dict[str, str | None] = field(default_factory=dict)
    workers: int | None = None
    cache: bool = True

    def with_seed(self, seed: int) -> tuple[int, int]:
        """Seeds of the calibration and of the fitting images in a cell of this seed."""
        own = (self.calibration.seed, self.compensation.seed)
        return seed if own[0] is None else own[0], seed if own[1] is None else own[1]


DataConfig = TextData | ImageData
PATHS = (*SOURCES, "imagenet")
PARTS: dict[str, tuple[str, ...]] = {
    "text": ("calibration", "selection", "evaluation"),
    "images": ("calibration", "compensation", "selection", "evaluation"),
}


def _check_seed(where: str, seed: int | None) -> None:
    if seed is not None:
        require(where, seed, 0)


def _check_names(datasets: tuple[str, ...]) -> None:
    if not datasets or len(set(datasets)) != len(datasets):
        raise UserError(f"data.evaluation.datasets: {list(datasets)} is not allowed; name one or more, each once")


def require(where: str, value: int, low: int) -> None:
    """Refuse a number below a bound."""
    if value < low:
        raise UserError(f"{where}: {value} is not allowed; use {low} or more")


def data_config(values: Mapping[str, Any]) -> DataConfig:
    """Check the data section; ``kind`` says whether it is about texts or images."""
    kind = values.get("kind", "text")
    if kind not in PARTS:
        raise unknown("data.kind", kind, PARTS)
    known = ("kind", *PARTS[kind], "paths", *(("workers", "cache") if kind == "images" else ()))
    for key in values:
        if key not in known:
            raise unknown("data option", key, known)
    parts = {name: dict(section(values, name, "data.")) for name in PARTS[kind]}
    parts["evaluation"]["datasets"] = strings("data.evaluation.datasets", parts["evaluation"].get("datasets", ()))
    paths = dict(section(values, "paths", "data.")) if values.get("paths") else {}
    for key, path in paths.items():
        if key not in PATHS:  # of both kinds, as one file may hold all that this machine has
            raise unknown("data.paths option", key, PATHS)
        if path is not None and not isinstance(path, str):
            raise UserError(f"data.paths.{key}: {path!r} is a {type(path).__name__}; a path or null is needed")
    selection = build_dataclass(SelectionConfig, parts["selection"], "data.selection")
    if kind == "text":
        return TextData(
            build_dataclass(CalibrationConfig, parts["calibration"], "data.calibration"),
            selection,
            build_dataclass(EvaluationConfig, parts["evaluation"], "data.evaluation"),
            paths,
        )
    workers = values.get("workers")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise UserError(f"data.workers: {workers!r} is not allowed; use 0 or more, or null")
    cache = values.get("cache", True)
    if not isinstance(cache, bool):
        raise UserError(f"data.cache: {cache!r} is not allowed; use true or false")
    return ImageData(
        build_dataclass(ImageCalibration, parts["calibration"], "data.calibration"),
        build_dataclass(ImageFit, parts["compensation"], "data.compensation"),
        selection,
        build_dataclass(ImageEvaluation, parts["evaluation"], "data.evaluation"),
        paths,
        workers,
        cache,
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
