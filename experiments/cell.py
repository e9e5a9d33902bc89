"""Execute one cell: check, lock, compute, commit."""

from __future__ import annotations

import gc
import logging
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bc import chains, models, pipeline, quantizers
from bc import device as devices
from bc.checkpoint import save_model
from bc.choice import choose
from bc.errors import UserError
from bc.quantizers.base import Quantizer, SiteResult
from bc.report import Report
from bc.settings import Compensation
from bc.statistics import PositionSums
from experiments.artefacts import Shared, calibration_statistics, float_statistics, quantized_weights
from experiments.attempts import with_smaller_batches
from experiments.checkpoints import lacks, set_damaged_aside
from experiments.config import BATCH, CellConfig, RunConfig
from experiments.data import ImageData
from experiments.float_first import say_unchecked
from experiments.identity import SCHEMA, bc_label, bc_name, cell_hash, scientific, shape_name, slug
from experiments.provenance import Stopwatch, provenance
from experiments.store import FAILED, INTERRUPTED, RUNNING, CellStore
from experiments.tasks import Samples, task_of
from experiments.wandb_logger import Mirror

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        state: ``complete``, ``skipped`` (was complete), ``busy`` (another process has it), ``failed`` or ``not run``.
        slug: The cell's name; empty where the configuration was too wrong to have one.
        line: What to tell.
        mistake: The failure is the user's to mend.
    """

    state: Literal["complete", "skipped", "busy", "failed", "not run"]
    slug: str = ""
    line: str = ""
    mistake: bool = False


def run_cell(run: RunConfig) -> Outcome:
    """Run a cell unless it is complete or another process is at it; failures are recorded, not raised."""
    name = slug(run.cell)
    store = CellStore(run.results, name, cell_hash(run.cell))
    keep = run.save_model and not run.cell.is_float and lacks(checkpoint_folder(run))
    if (done := store.result()) and not keep:
        return Outcome("skipped", name, f"{name}: complete already, {metrics_line(done)}")
    with store.lock() as free:
        if not free:
            host = (store.status() or {}).get("host", "another host")
            return Outcome("busy", name, f"{name}: is being run on {host}; passed over")
        if done := store.result():  # finished while we waited for the lock, or only its checkpoint is wanted
            outcome = Outcome("skipped", name, f"{name}: complete already, {metrics_line(done)}")
            if keep:
                outcome = _keep_locked(run, store) or outcome
        else:
            outcome = _run_locked(run, store)
    if outcome.state == "failed":
        gc.collect()  # the traceback kept the cell's tensors and files alive; the sweep goes on
    return outcome


def _run_locked(run: RunConfig, store: CellStore) -> Outcome:
    store.mark(RUNNING)
    log.info("%s: starts", store.slug)
    say_unchecked(run)
    mirror = Mirror(run, store.slug)
    try:
        (result, sites), batches = with_smaller_batches(run, lambda attempt: compute(attempt, mirror))
        result["provenance"] |= batches
        store.commit(result, sites)
        mirror.complete(result, sites)
    except Exception as error:
        store.mark(FAILED, error)
        mirror.fail(error)
        return failure(store, error, f"traceback in {store.folder}/status.json")
    except BaseException as error:  # Ctrl-C, SIGTERM: say so and let it pass
        store.mark(INTERRUPTED, error)
        mirror.fail(error)
        raise
    finally:
        mirror.finish()
    return Outcome("complete", store.slug, f"{store.slug}: {metrics_line(result)}")


def _keep_locked(run: RunConfig, store: CellStore) -> Outcome | None:
    """Make the checkpoint of a complete cell, whose result and status stay; says what went wrong, if anything did."""
    try:
        set_damaged_aside(checkpoint_folder(run))
        with_smaller_batches(run, keep_checkpoint)
    except Exception as error:
        log.debug("%s: its checkpoint", store.slug, exc_info=error)
        return failure(store, error, "its result stays; the checkpoint was not made")
    return None


def failure(store: CellStore, error: Exception, more: str) -> Outcome:
    """What is told of a failed cell; of an error that is not a mistake with its kind, and more."""
    mistake = isinstance(error, UserError)
    line = " ".join(str(error).split()) or type(error).__name__
    return Outcome("failed", store.slug, line if mistake else f"{type(error).__name__}: {line} ({more})", mistake)


def compute(run: RunConfig, mirror: Mirror) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compute a cell's result and its per-site table."""
    cell, watch = run.cell, Stopwatch()
    quiet_without_terminal()
    engine = make_engine(run)
    torch.manual_seed(cell.seed)
    task = task_of(cell)
    task.check(cell)
    mirror.start()
    devices.reset_peak_memory(engine.device)
    with watch.stage("data"):
        samples = task.samples(cell)
    with watch.stage("load"):
        model = task.load(cell)
    chains.check_settings(chains.chain_of(model), cell.bc)
    report = float_report(model)
    facts: dict[str, Any] = {"seconds_quantize": 0.0, "seconds_bc": 0.0}
    if not cell.is_float:
        report, facts = quantize(run, model, samples, engine, watch)
        if run.save_model:
            write_checkpoint(run, model)
    with watch.stage("evaluate"):
        scores = task.evaluate(model, samples, engine, cell)
    mirror.log({f"{row['metric']}/{row['dataset']}": row["value"] for row in scores.metrics})
    before, after = report.error("held_out") or (None, None)
    sites = [site.row() for site in report.sites]
    result = {
        "schema": SCHEMA,
        "cell": cell_hash(cell),
        "slug": slug(cell),
        "config": scientific(cell),
        "label": label(cell) | facts.pop("chosen", {}),
        "metrics": scores.metrics,
        "outcomes": scores.outcomes,
        "bits_per_weight": report.bits_per_weight,
        "bias_parameters": report.bias_parameters,
        "error_before": before,
        "error_after": after,
        "damping_retries": sum(int(row.get("damping_retries", 0)) for row in sites),
        "seconds_evaluate": watch.seconds["evaluate"],
        "peak_memory_mb": devices.peak_memory_mb(engine.device),
        "provenance": provenance(engine.device, watch.seconds, seeds(cell), run.experiment)
        | {"engine": asdict(run.engine)},
        **facts,
    }
    del model
    devices.release(engine.device)
    return result, sites


def quantize(
    run: RunConfig, model: Any, samples: Samples, engine: pipeline.Engine, watch: Stopwatch
) -> tuple[Report, dict[str, Any]]:
    """Quantize and compensate a model in place, by way of the artefacts that cells share.

    Returns:
        The report; and the seconds of quantization (of when the weights were made) and of BC (statistics included),
        and the scope where it was searched.
    """
    cell, settings = run.cell, run.cell.bc
    assert samples.calibration is not None
    calibration = samples.calibration
    quantizer = quantizers.create(cell.quantizer, cell.bits, **cell.options)
    say_short_groups(model, cell)
    means, seen = None, settings.enabled and settings.stream == "calibration"
    fed = settings.method == "bias" or settings.stream == "blended"  # affine outputs on the float stream need pairs
    closed = fed and ("layer" in settings.scope or settings.searched)
    if cell.domain == "text" and closed and not seen:
        with watch.stage("statistics"):
            measure = partial(pipeline.float_means, model, calibration, engine, halves=cell.bc.wants_halves)
            means = float_statistics(run.results, cell, model, measure)
    with watch.stage("quantize"):
        if seen:
            means = seen_statistics(run, model, quantizer, calibration, engine)
        walk = partial(pipeline.calibrate, model, quantizer, calibration, engine)
        weights = quantized_weights(run.results, cell, model, walk)
    facts: dict[str, Any] = {"seconds_quantize": weights.seconds}
    if settings.searched:
        with watch.stage("search"):
            settings, facts["choice"] = choose_settings(model, weights.value, samples, engine, cell, means)
        facts["chosen"] = shape_of(settings)
        log.info("  %s is best on the selection samples", bc_label(settings, cell.domain))
    with watch.stage("compensate"):
        report = pipeline.compensate(
            model,
            weights.value,
            settings,
            samples.fit,
            engine,
            means=means.value if means else None,
            report_calibration=_first(samples.fit, cell.report.calibration_samples),
            report_held_out=_first(samples.selection, cell.report.held_out_samples),
        )
    spent = watch.seconds["compensate"] - report.seconds_measure + watch.seconds.get("search", 0.0)
    spent += means.seconds if means and not seen else 0.0  # those that were seen come with the weights
    return report, facts | {"seconds_bc": spent if cell.bc.enabled else 0.0}


def seen_statistics(
    run: RunConfig, model: Any, quantizer: Quantizer, calibration: Tensor, engine: pipeline.Engine
) -> Shared[dict[str, PositionSums]]:
    """Sums of the inputs that the quantizer saw, from the pass that makes the weights where they are not there yet."""
    cell = run.cell

    def make() -> dict[str, PositionSums]:
        collect = pipeline.Collection(cell.bc.wants_halves, "calibration")
        walk = partial(pipeline.calibrate, model, quantizer, calibration, engine, collect=collect)
        if quantized_weights(run.results, cell, model, walk).found:
            walk()
        return collect.sums

    return calibration_statistics(run.results, cell, model, make)


def choose_settings(
    model: Any,
    quantized: dict[str, SiteResult],
    samples: Samples,
    engine: pipeline.Engine,
    cell: CellConfig,
    means: Shared[dict[str, PositionSums]] | None,
) -> tuple[Compensation, list[dict[str, Any]]]:
    """The settings that are best on the selection samples, and what every candidate scored."""
    task = task_of(cell)
    assert samples.fit is not None
    settings, trials = choose(
        model,
        quantized,
        cell.bc,
        samples.fit,
        engine,
        task.selection_score(model, samples, engine, cell),
        means.value if means else None,
    )
    return settings, [
        {
            "setting": bc_label(trial.settings, cell.domain),
            "score": list(trial.score),
            "bits_per_weight": None if trial.failure else trial.bits_per_weight,
            **({"failure": trial.failure} if trial.failure else {}),
        }
        for trial in trials
    ]


def checkpoint_folder(run: RunConfig) -> Path:
    """Where a cell's quantized model is kept."""
    return run.results / "checkpoints" / slug(run.cell)


def write_checkpoint(run: RunConfig, model: Any) -> None:
    """Keep a quantized model with its tokenizer, and how it came to be."""
    cell = run.cell
    tokenizer = models.load_tokenizer(cell.model.name, path=cell.model.path)
    facts = provenance(devices.resolve(run.engine.device), {}, seeds(cell), run.experiment)
    del facts["seconds"]  # they stand in the cell's result, which is not there yet
    facts |= {"config": scientific(cell), "cell": cell_hash(cell)}
    path = save_model(model, checkpoint_folder(run), tokenizer, facts)
    log.info("  checkpoint: %s", path.parent)


def keep_checkpoint(run: RunConfig) -> None:
    """Make the checkpoint of a cell that is complete; its result stays as it is."""
    cell, task = run.cell, task_of(run.cell)
    model = task.load(cell)
    quantize(run, model, task.samples(cell), make_engine(run), Stopwatch())
    write_checkpoint(run, model)


def _first(windows: Tensor | None, count: int) -> Tensor | None:
    return windows[:count] if windows is not None and count else None


def float_report(model: Any) -> Report:
    """Storage of the float model: what quantization would have shrunk."""
    modules = [site.module for site in chains.chain_of(model).sites if site.kind != "matmul"]
    tensors: list[Any] = [t for m in modules for t in (m.weight, m.bias) if t is not None]
    bits = sum(t.numel() * t.element_size() * 8 for t in tensors)
    return Report([], bits, sum(t.numel() for m in modules if isinstance(t := m.weight, Tensor)), 0)


def say_short_groups(model: Any, cell: CellConfig) -> None:
    """Tell where the group size does not divide a matrix's inputs."""
    size = cell.bits.group_size
    if size < 1:
        return
    linears = [site.module for site in chains.chain_of(model).sites if isinstance(site.module, nn.Linear)]
    for inputs in sorted({module.in_features for module in linears}):
        if inputs % size:
            log.info(
                "  bits.group_size: %d does not divide %d inputs; the last group has %d", size, inputs, inputs % size
            )


def make_engine(run: RunConfig) -> pipeline.Engine:
    """The engine on its device, with the fixed arithmetic policy."""
    config = run.engine
    devices.set_arithmetic(config.matmul, deterministic=config.deterministic)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    batch_size = config.batch_size or BATCH[run.cell.domain]
    dtype = None if config.activations_dtype is None else models.DTYPES[config.activations_dtype]
    device = devices.resolve(config.device, "engine.device")
    return pipeline.Engine(device, batch_size, config.activations, dtype, config.memory_mib)


def quiet_without_terminal() -> None:
    """Switch transformers' progress bars off where nobody watches."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def seeds(cell: CellConfig) -> dict[str, int]:
    """Seed of each set of samples."""
    if cell.is_float:
        return {}
    if isinstance(cell.data, ImageData):
        calibration, fit = cell.data.with_seed(cell.seed)
        return {"calibration": calibration, "compensation": fit, "selection": cell.seed}
    return {"calibration": cell.seed, "selection": cell.seed}


def label(cell: CellConfig) -> dict[str, Any]:
    """A cell's settings under the column names of cells.csv."""
    bc, data = cell.bc, cell.data.calibration
    fit = cell.data.compensation if isinstance(cell.data, ImageData) and bc.enabled else data
    return {
        "model": cell.model.name,
        "quantizer": cell.quantizer,
        "w_bits": cell.bits.weight,
        "a_bits": cell.bits.activation,
        "group_size": cell.bits.group_size,
        "bc": bc_name(cell),
        **shape_of(bc),
        "calibration_data": "" if cell.is_float else data.dataset,
        "calibration_samples": 0 if cell.is_float else fit.samples,
        "seed": 0 if cell.is_float else cell.seed,
    }


def shape_of(bc: Compensation) -> dict[str, str]:
    """Granularity, scope and stream as cells.csv has them."""
    if not bc.enabled:
        return {"granularity": "", "scope": "", "stream": ""}
    return {"granularity": shape_name(bc), "scope": "+".join(bc.scope), "stream": bc.stream}


def metrics_line(result: dict[str, Any]) -> str:
    """Metrics of a result in a few words."""
    return ", ".join(f"{row['metric']} {row['dataset']} {row['value']:.4g}" for row in result["metrics"])
