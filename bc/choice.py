"""Choice among settings of Bias Compensation, made on selection samples.

``search``: Gong et al. (arXiv 2404.01892) search the 31 non-empty unions of layer, attention, MLP, block and model.
``auto``: granularity, stream, scope and the number of sinks together, within a budget of bits per weight; one candidate
is no compensation. Which is best is a choice like any other: it is made on samples that are neither fitted nor
tested on.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from bc.affine import has_scales
from bc.calibration import Samples
from bc.chains import chain_of, is_vision
from bc.errors import QuantizationError
from bc.pipeline import Engine, compensate
from bc.progress import track
from bc.quantizers.base import SiteResult
from bc.settings import AUTO, READOUT, Compensation, Stream, presets
from bc.statistics import PositionSums

log = logging.getLogger(__name__)

TABLES = ("positional", "shrink")  # of the window's length: the only ones that a small budget rules out beforehand
FURTHER = 3  # settings that are tried on the blended stream or with a readout too
SEARCHED = ("layer", "attention", "mlp", "block", "model")


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        settings: What was tried.
        score: On the selection samples; tuples are compared in order, higher is better. Empty where it failed.
        bits_per_weight: Of the compensated model; NaN where it failed.
        failure: Why no valid bias was found, by site name.
    """

    settings: Compensation
    score: tuple[float, ...]
    bits_per_weight: float
    failure: str | None = None


def unions() -> list[tuple[str, ...]]:
    """The 31 non-empty unions, small ones first."""
    return [union for size in range(1, len(SEARCHED) + 1) for union in itertools.combinations(SEARCHED, size)]


def candidates(settings: Compensation, *, vision: bool) -> list[Compensation]:
    """What ``search`` or ``auto`` tries, cheap settings first."""
    if AUTO not in settings.scope:
        return [replace(settings, scope=scope) for scope in unions()]
    base = replace(settings, scope=("layer",), granularity="channel", stream="float")
    wide = presets(vision=vision)["paper"].scope
    found = [replace(settings, scope=(), granularity="channel", stream="float")]
    found += [replace(found[0], scope=(READOUT,))] if vision else []
    streams: tuple[Stream, ...] = ("float", "quantized") if vision else ("float",)
    for stream in streams:
        fed = replace(base, stream=stream)
        sink = replace(fed, granularity="sink")
        found += [fed, replace(fed, method="affine"), sink]
        found += [replace(sink, method="affine", sink_positions=max(1, sink.sink_positions))]
        found += [] if vision else [replace(sink, sink_positions=0)]
        found += [replace(fed, granularity=name) for name in ("lowrank", "shrink", "positional")]
        found += [replace(fed, granularity=name, scope=wide) for name in ("sink", "shrink")]
        weighted = tuple(kind for kind in fed.kinds if kind != "matmul")
        if vision and stream == "quantized" and weighted and weighted != fed.kinds:
            # A Linear there makes good what the matmul before it lacks, and the budget is its alone.
            found += [replace(fed, granularity="lowrank", kinds=weighted)]
    return found


def further(trials: list[Trial], *, vision: bool) -> list[Compensation]:
    """The best few of the settings that were tried: a vision model's with a readout, a language model's on the blend.

    Of the streams with earlier errors a language model does better on the blend, a vision model on the whole of them.
    Fits on the blend are dear, and which shape of bias is good hardly depends on the stream, nor on the readout, which
    comes behind all biases but those of the logits.
    """
    best = sorted((t for t in trials if t.settings.enabled), key=lambda trial: trial.score, reverse=True)
    if not vision:
        return [replace(trial.settings, stream="blended") for trial in best[:FURTHER]]
    plain = [t.settings for t in best if READOUT not in t.settings.scope]
    found = [replace(s, scope=(*(scope for scope in s.scope if scope != "model"), READOUT)) for s in plain]
    return list(dict.fromkeys(found))[:FURTHER]


def choose(
    model: nn.Module,
    quantized: dict[str, SiteResult],
    settings: Compensation,
    samples: Samples,
    engine: Engine,
    score: Callable[[nn.Module], tuple[float, ...]],
    means: dict[str, PositionSums] | None = None,
) -> tuple[Compensation, list[Trial]]:
    """Try all candidates on copies of a model.

    Args:
        model: The float model on the CPU; it is not changed.
        quantized: From :func:`bc.pipeline.calibrate`.
        settings: With scope ``search`` (granularity and stream are kept) or ``auto`` (``budget`` is kept).
        samples: Samples to fit biases on.
        engine: How to run.
        score: Scores a compensated model on the selection samples, higher being better.
        means: As for :func:`bc.pipeline.compensate`; with halves for ``auto``.

    Returns:
        The best settings (the earlier where two are equal; with ``auto`` among those whose bits per weight are at most
        ``budget`` above no compensation), and all trials. With ``auto``, tables of the window's length that are beyond
        the budget are not tried.

    Raises:
        QuantizationError: By site name, where no candidate has valid biases.
    """

    def tried(candidate: Compensation) -> Trial:
        twin = copy.deepcopy(model)
        try:
            report = compensate(twin, quantized, candidate, samples, engine, means=means)
        except QuantizationError as error:
            log.warning("a %s candidate is out of the choice: %s", candidate.granularity, error)
            return Trial(candidate, (), float("nan"), str(error))
        return Trial(candidate, score(twin), report.bits_per_weight)

    def size(candidate: Compensation) -> float:
        """Bits per weight, which do not depend on how many samples are fitted; 0 rules nothing out."""
        try:
            return compensate(copy.deepcopy(model), quantized, candidate, samples[:1], engine).bits_per_weight
        except QuantizationError:  # with all samples it may go better; if not, the trial says so
            return 0.0

    known = {*chain_of(model).scopes}
    chosen = [c for c in candidates(settings, vision=is_vision(model)) if known.issuperset(c.scope)]
    if not all(map(has_scales, quantized.values())):
        chosen = [candidate for candidate in chosen if candidate.method != "affine"]
    limit = float("inf")
    trials = []
    if AUTO in settings.scope:
        trials = [tried(chosen[0])]
        limit = trials[0].bits_per_weight + settings.budget
        sizes = {shape: size(shape) for shape in dict.fromkeys(map(_shape, chosen)) if shape.granularity in TABLES}
        chosen = [c for c in chosen[1:] if sizes.get(_shape(c), 0.0) <= limit]
    trials += [tried(candidate) for candidate in track(chosen, "choice of a setting", unit="setting")]
    if AUTO in settings.scope:
        best = further([t for t in trials if t.bits_per_weight <= limit], vision=is_vision(model))
        best = [candidate for candidate in best if known.issuperset(candidate.scope)]
        trials += [tried(candidate) for candidate in track(best, "variants of the best", unit="setting")]
    allowed = [trial for trial in trials if trial.bits_per_weight <= limit]
    if not allowed:
        raise QuantizationError(str(trials[-1].failure))
    return max(allowed, key=lambda trial: trial.score).settings, trials


def _shape(candidate: Compensation) -> Compensation:
    """A setting of the same size that is fitted sooner."""
    return replace(candidate, stream="float")
