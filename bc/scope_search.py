"""Choice of the scope of Bias Compensation on selection samples.

Gong et al. (arXiv 2404.01892) search the 31 non-empty unions of layer, attention, MLP, block and model. Which union is
best is a choice like any other: it is made on samples that are neither fitted nor tested on.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from bc.calibration import Samples
from bc.pipeline import Engine, compensate
from bc.progress import track
from bc.quantizers.base import SiteResult
from bc.settings import Compensation
from bc.statistics import PositionSums

SEARCHED = ("layer", "attention", "mlp", "block", "model")


@dataclass(frozen=True)
class Trial:
    """A union of scopes and its score on the selection samples, higher being better."""

    scope: tuple[str, ...]
    score: tuple[float, ...]


def unions() -> list[tuple[str, ...]]:
    """The 31 non-empty unions, small ones first."""
    return [union for size in range(1, len(SEARCHED) + 1) for union in itertools.combinations(SEARCHED, size)]


def search_scope(
    model: nn.Module,
    quantized: dict[str, SiteResult],
    settings: Compensation,
    samples: Samples,
    engine: Engine,
    score: Callable[[nn.Module], tuple[float, ...]],
    means: dict[str, PositionSums] | None = None,
) -> tuple[Compensation, list[Trial]]:
    """Try all unions of scopes on copies of a model.

    Args:
        model: The float model on the CPU; it is not changed.
        quantized: From :func:`bc.pipeline.calibrate`.
        settings: Granularity and stream; the scope is what is searched.
        samples: Samples to fit biases on.
        engine: How to run.
        score: Scores a compensated model on the selection samples; tuples are compared in order, higher is better.
        means: As for :func:`bc.pipeline.compensate`.

    Returns:
        The settings with the best scope (the smaller union where two are equal), and all trials.
    """
    trials = []
    for scope in track(unions(), "scope search", unit="union"):
        twin = copy.deepcopy(model)
        compensate(twin, quantized, replace(settings, scope=scope), samples, engine, means=means)
        trials.append(Trial(scope, score(twin)))
        del twin
    best = max(trials, key=lambda trial: (trial.score, -len(trial.scope)))
    return replace(settings, scope=best.scope), trials
