"""Schema of a run: what Hydra composes is checked here and turned into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bc import models, quantizers, vision
from bc.checkpoint import NO_LINEAR_MAPS
from bc.errors import UserError, unknown
from bc.matching import check_goes_with
from bc.settings import Bits, Compensation, build_dataclass, presets
from experiments.data import DataConfig, ImageData, data_config, require, section, strings

T = TypeVar("T")

FLOAT = "none"  # the quantizer that leaves the model as it is
REPORT = {"text": (4, 8), "images": (64, 64)}  # samples on which errors are measured, where nothing is said
MOST_THREADS = 4096
LARGEST_SEED = {"text": 2**63 - 1, "images": 2**32 - 1}  # of PyTorch's and NumPy's draws
BATCH = {"text": 4, "images": 64}


@dataclass(frozen=True)
class ModelConfig:
    """Which model; ``path`` and ``attention`` are not part of a cell's identity."""

    name: str
    path: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "eager"] = "auto"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError(f"model.name: {self.name!r} is empty; set model.name to a name for its results")
        if self.name.endswith(".gguf") or (self.path is None and Path(self.name).expanduser().is_dir()):
            raise UserError(
                f"model.name: {self.name!r} is a path; "
                f"set model.path={self.name}, and model.name to a name for its results"
            )


@dataclass(frozen=True)
class ReportConfig:
    """On how many samples the output error of every site is measured."""

    calibration_samples: int
    held_out_samples: int

    def __post_init__(self) -> None:
        require("report.calibration_samples", self.calibration_samples, 0)
        require("report.held_out_samples", self.held_out_samples, 0)


@dataclass(frozen=True)
class Numerics:
    """What of the engine changes results by more than the order of sums; part of a cell's identity where it is unusual.

    ``activations_dtype`` is None where storing activations loses nothing.
    """

    activations_dtype: Literal["float32", "bfloat16"] | None = None
    matmul: Literal["highest", "high", "medium"] = "highest"


@dataclass(frozen=True)
class EngineConfig:
    """How a cell runs; beside what is in :class:`Numerics` of no effect on results beyond rounding."""

    device: str = "auto"
    batch_size: int | None = None
    activations: Literal["device", "host", "disk"] = "host"
    activations_dtype: Literal["float32", "bfloat16"] | None = None
    memory_mib: int | None = None
    matmul: Literal["highest", "high", "medium"] = "highest"
    deterministic: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.memory_mib is not None:
            require("engine.memory_mib", self.memory_mib, 0)
        for name in ("batch_size", "threads"):
            value = getattr(self, name)
            if value is not None:
                require(f"engine.{name}", value, 1)
        if self.threads is not None and self.threads > MOST_THREADS:  # PyTorch's own end is a crash
            raise UserError(f"engine.threads: {self.threads} is not allowed; use 1 to {MOST_THREADS}, or null")


@dataclass(frozen=True)
class LoggerConfig:
    """Where results are mirrored."""

    name: Literal["wandb", "none"] = "none"
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "bias-compensation"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExperimentConfig:
    """What a cell is run for."""

    name: str = "adhoc"
    suite: Literal["paper", "embedded"] = "paper"
    title: str = ""
    published: str | None = None
    cells: list = field(default_factory=list)


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
    numerics: Numerics = Numerics()

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.quantizer == FLOAT

    @property
    def domain(self) -> Literal["text", "images"]:
        """Whether it is about a language or a vision model."""
        return "images" if isinstance(self.data, ImageData) else "text"

    @property
    def metric(self) -> str:
        """What its table shows."""
        return "top1" if self.domain == "images" else "perplexity"


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


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration.

    Args:
        values: The resolved configuration as plain dicts, lists and scalars.

    Raises:
        UserError: One line that names the key, its value and what is allowed.
    """
    known = {"model", "quantizer", "bits", "bc", "data", "report", "engine", "logger"}
    known |= {"experiment", "seed", "cell", "on_error", "results_dir", "cells_at_once", "save_model"}
    refuse_local_section(values)
    for key in values:
        if key not in known:
            raise unknown("setting", key, known)
    for key in sorted({"on_error", "results_dir", "save_model", "seed"} - values.keys()):
        raise UserError(f"{key}: the setting was deleted; leave out ~{key}, or set {key}=…")
    if values["on_error"] not in ("continue", "raise"):
        raise unknown("on_error", values["on_error"], ("continue", "raise"))
    if not isinstance(values["save_model"], bool):
        raise UserError(f"save_model: {values['save_model']!r} is not allowed; use true or false")
    cell = cell_config(values)
    if values["save_model"] and cell.domain == "images":
        raise UserError("save_model: true is for language models; set save_model=false for a vision model")
    if values["save_model"] and cell.is_float:
        raise UserError("save_model: the float model (quantizer=none) is not saved; set save_model=false")
    if values["save_model"] and cell.bc.method == "linear":
        raise UserError(f"save_model: {NO_LINEAR_MAPS}, or set save_model=false")
    logger = dict(section(values, "logger"))
    logger["tags"] = strings("logger.tags", logger.get("tags", ()))
    return RunConfig(
        cell=cell,
        engine=engine_config(values),
        logger=build_dataclass(LoggerConfig, logger, "logger"),
        experiment=experiment_config(values).name,
        results=results_folder(values["results_dir"]),
        save_model=values["save_model"],
        on_error=values["on_error"],
    )


def results_folder(value: Any) -> Path:
    """The results directory of a setting, ``~`` being the user's own folder.

    Raises:
        UserError: It is empty or no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"results_dir: {value!r} is not a folder name; set results_dir=results")
    return Path(value).expanduser()


def refuse_local_section(values: Mapping[Any, Any]) -> None:
    """Refuse settings of conf/local that are none because of their file's first line.

    Raises:
        UserError: Naming the line.
    """
    if "local" in values:
        raise UserError(
            "conf/local/default.yaml: lacks its first line, '# @package _global_', without which its settings are "
            "not this project's; put it above them"
        )


def experiment_config(values: Mapping[str, Any]) -> ExperimentConfig:
    """Check the experiment section.

    Raises:
        UserError: It has an unknown key, or its file lacks the line that makes it a section of its own.
    """
    given = dict(section(values, "experiment"))
    if "experiment" in given:
        raise UserError(
            "experiment: the file in conf/experiment lacks its first line, '# @package _global_', without which its "
            "cells are not listed; put it above them"
        )
    return build_dataclass(ExperimentConfig, given, "experiment")


def cell_config(values: Mapping[str, Any]) -> CellConfig:
    """Check the part of a composed configuration that determines results."""
    seed = values["seed"]
    bc = dict(section(values, "bc"))
    data = data_config(section(values, "data"))
    domain: Literal["text", "images"] = "images" if isinstance(data, ImageData) else "text"
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED[domain]:
        raise UserError(f"seed: {seed!r} is not allowed; use a whole number of 0 or more, to {LARGEST_SEED[domain]}")
    for key in ("scope", "kinds"):
        bc[key] = strings(f"bc.{key}", bc.get(key, ()))
    if bc["scope"] == ("paper",):
        bc["scope"] = presets(vision=domain == "images")["paper"].scope
    model = build_dataclass(ModelConfig, dict(section(values, "model")), "model")
    check_domain(model.name, domain)
    bits = build_dataclass(Bits, dict(section(values, "bits")), "bits")
    options = dict(section(values, "quantizer"))
    name = options.pop("name", None)
    cell = CellConfig(
        model=model,
        quantizer=name,
        options=quantizer_options(name, bits, options, domain),
        bits=bits,
        bc=build_dataclass(Compensation, bc, "bc"),
        data=data,
        report=report_config(section(values, "report"), domain),
        seed=seed,
        numerics=numerics_of(engine_config(values), model),
    )
    check_combination(cell)
    check_report(section(values, "report"), cell)
    return cell


def engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """Check the engine section."""
    return build_dataclass(EngineConfig, dict(section(values, "engine")), "engine")


def numerics_of(engine: EngineConfig, model: ModelConfig) -> Numerics:
    """The engine's share in what determines results."""
    lossless = engine.activations_dtype in ("float32", model.dtype)
    return Numerics(None if lossless else engine.activations_dtype, engine.matmul)


def report_config(values: Mapping[str, Any], domain: str) -> ReportConfig:
    """Check the report section; null is the domain's usual number."""
    usual = dict(zip(("calibration_samples", "held_out_samples"), REPORT[domain], strict=True))
    given = {key: value for key, value in values.items() if value is not None or key not in usual}
    return build_dataclass(ReportConfig, usual | given, "report")


def quantizer_options(name: Any, bits: Bits, options: dict[str, Any], domain: str) -> dict[str, Any]:
    """A quantizer's options with defaults filled in, checked by making the quantizer."""
    if name == FLOAT:
        if options:
            raise unknown("quantizer.none option", next(iter(options)), ["(none)"])
        return {}
    if not isinstance(name, str) or name not in quantizers.available():
        raise unknown("quantizer.name", name, [FLOAT, *quantizers.available()])
    if quantizers.available()[name].kind == "weight_activation" and domain == "text":
        raise UserError(
            f"quantizer: {name!r} quantizes the weights and activations of vision models; for a language model "
            f"choose one of {', '.join(quantizers.of_kind('weight'))}, or set data=imagenet or data=embedded_vision"
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
    if cell.bc.enabled:
        check_goes_with(cell.bc, quantizers.available()[cell.quantizer])
    strange = [scope for scope in ("downsample", "stage", "readout") if scope in cell.bc.scope]
    if strange and cell.domain == "text":
        raise UserError(
            f"bc.scope: no {strange[0]!r} in a language model; allowed: layer, attention, mlp, block, model"
        )
    if cell.bc.searched and not cell.data.selection.samples:
        raise UserError("data.selection.samples: 0 leaves nothing to choose a scope on; set it to 1 or more")


def check_report(given: Mapping[str, Any], cell: CellConfig) -> None:
    """Refuse errors on more samples than there are; the usual number of those fitted on adapts itself."""
    fitted = "compensation" if isinstance(cell.data, ImageData) else "calibration"
    most = {"held_out_samples": ("selection", cell.data.selection.samples)}
    if given.get("calibration_samples") is not None:
        most["calibration_samples"] = (fitted, getattr(cell.data, fitted).samples)
    for key, (name, samples) in most.items():
        asked = getattr(cell.report, key)
        if asked > samples:
            raise UserError(
                f"report.{key}: {asked} is more than the {samples} of data.{name}.samples; "
                "lower the one or raise the other"
            )


def check_domain(name: str, domain: str) -> None:
    """Refuse a vision model with texts and a language model with images."""
    if domain == "text" and name in vision.catalogue():
        raise UserError(f"model: {name!r} is a vision model; set data=imagenet or data=embedded_vision")
    if domain == "images" and name in models.catalogue():
        raise UserError(f"model: {name!r} is a language model; set data=llm or data=embedded_llm")
