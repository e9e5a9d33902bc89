"""What is different between cells of language and of vision models: data, model and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from bc.pipeline import Engine
from experiments.config import CellConfig

SelectionScore = Callable[[nn.Module], tuple[float, ...]]


@dataclass
class Samples:
    """Samples of a cell.

    Attributes:
        calibration: What the quantizer is calibrated on: token ids or images.
        fit: What biases are fitted on.
        selection: What fits nothing, without labels.
        labels: Of the selection images.
        test: Data set → what it is scored on.
    """

    calibration: Tensor | None = None
    fit: Tensor | None = None
    selection: Tensor | None = None
    labels: Tensor | None = None
    test: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scores:
    """What came of the test samples.

    Attributes:
        metrics: Data set, metric, value, number of samples.
        outcomes: Data set → what each sample scored, for paired comparisons; see :mod:`experiments.compare`.
    """

    metrics: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One kind of models."""

    def check(self, cell: CellConfig) -> None:
        """Refuse a cell whose data or model are absent, before anything is loaded."""

    def samples(self, cell: CellConfig) -> Samples:
        """Read the data of a cell."""

    def load(self, cell: CellConfig) -> nn.Module:
        """Load the float model."""

    def evaluate(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> Scores:
        """Score the test samples."""

    def selection_score(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> SelectionScore:
        """A compensated model → its score on the selection samples, higher being better; ``model`` is the float one."""


def task_of(cell: CellConfig) -> Task:
    """The task of a cell."""
    if cell.domain == "images":
        from experiments.vision import VisionTask

        return VisionTask()
    from experiments.language import LanguageTask

    return LanguageTask()
