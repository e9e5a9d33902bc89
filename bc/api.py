"""The public face: load, quantize, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bc import device as devices
from bc import models, quantizers, vision
from bc.calibration import Samples
from bc.chains import chain_of, check_settings, is_vision
from bc.checkpoint import open_model, save_model
from bc.choice import choose
from bc.divergence import Divergence
from bc.errors import UserError
from bc.evaluation import Accuracy, evaluate_accuracies, evaluate_accuracy, evaluate_perplexity
from bc.pipeline import Collection, Engine, calibrate, compensate, float_means
from bc.report import Report
from bc.samples import check_samples
from bc.settings import Bits, Compensation

Score = Callable[[nn.Module], float]


def load(name: str | Path, *, path: str | Path | None = None, dtype: str = "float32") -> nn.Module:
    """Load a language or a vision model onto the CPU, in evaluation mode.

    Args:
        name: Catalogue name of either kind (``smollm2_135m``, ``vit_b``); for a language model also a hub id, a local
            folder or a GGUF file; for a vision model also a timm name with its tag.
        path: Local folder or file to read instead of the hub.
        dtype: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        UserError: The name, dtype or family is unknown, or the source is absent.
    """
    name, path = str(name), None if path is None else str(path)
    if name in vision.catalogue() or (name not in models.catalogue() and vision.knows(name)):
        return vision.load(name, path, dtype=dtype)
    return models.load(name, path=path, dtype=dtype)


def quantize(
    model: nn.Module,
    quantizer: str = "rtn",
    bits: str | Bits = "w4",
    bc: str | Compensation = "off",
    calibration: Samples | None = None,
    *,
    held_out: Samples | None = None,
    score: Score | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 4,
    **options: Any,
) -> Report:
    """Quantize a model in place and compensate it; it is left in evaluation mode.

    Args:
        model: A float language or vision model on the CPU, of a known family (:func:`load`).
        quantizer: Name of a quantizer (:func:`bc.quantizers.available`).
        bits: ``w4``, ``w3g64``, ``w4a4``, … or :class:`~bc.settings.Bits`.
        bc: A preset (``off``, ``channel``, ``sink``, ``positional``, ``paper``, …; ``search`` and ``auto`` choose among
            many) or :class:`~bc.settings.Compensation`.
        calibration: Token ids, int64, shape (samples, tokens), or a list (see :func:`bc.calibration.batches`); for a
            vision model images, shape (images, channels, height, width), as its evaluation transform gives them. Only
            a quantizer without data, not compensated, does without.
        held_out: Samples that are not used to fit, for the errors in the report.
        score: What ``search`` and ``auto`` choose by: the quality of a compensated model, the higher the better, on
            samples that are neither fitted nor tested on. By default minus the perplexity of ``held_out``; of a vision
            model minus the divergence from the float model there (:class:`bc.divergence.Divergence`).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or a device.
        batch_size: Samples per forward.
        options: The quantizer's own options.

    Returns:
        Errors per site (on ``calibration`` and ``held_out``), bits per weight with biases counted, bias parameters, and
        the settings (of those that were chosen among, the winner).

    Raises:
        UserError: A setting is unknown or out of range, samples are missing, or the model is quantized already.
        QuantizationError: By site name, where no valid result exists.
    """
    settings = Compensation.parse(bc, vision=is_vision(model))
    if is_vision(model):
        vision.wrap(model)
    model.eval()  # dropout would make noise of what is fitted
    engine = Engine(devices.resolve(device), batch_size)
    method = quantizers.create(quantizer, Bits.parse(bits), **options)
    for where, samples in (("calibration", calibration), ("held_out", held_out)):
        if samples is not None:
            check_samples(model, samples, where)
    check_settings(chain_of(model), settings)
    if settings.searched and calibration is None:
        raise UserError(f"calibration: bc={'+'.join(settings.scope)} needs calibration samples; give some")
    if settings.searched and score is None:
        score = _usual_score(model, held_out, engine)
    collect = Collection.wanted(settings, method)
    results = calibrate(model, method, calibration, engine, collect=collect)
    means = collect.sums if collect else None
    if settings.searched:
        assert calibration is not None and score is not None
        judge = score
        if not is_vision(model):
            means = float_means(model, calibration, engine, halves=settings.wants_halves)
        settings, _ = choose(model, results, settings, calibration, engine, lambda twin: (judge(twin),), means)
    return compensate(
        model,
        results,
        settings,
        calibration,
        engine,
        means=means,
        report_calibration=calibration,
        report_held_out=held_out,
    )


def _usual_score(model: nn.Module, samples: Samples | None, engine: Engine) -> Score:
    """Minus the perplexity of held-out windows, or minus the divergence on held-out images.

    Raises:
        UserError: There are none.
    """
    vision_model = is_vision(model)
    if not isinstance(samples, Tensor) or (not vision_model and samples.dim() != 2):
        wanted = "images" if vision_model else "windows of token ids"
        raise UserError(
            f"held_out: a choice among settings needs {wanted} that fit nothing, as one tensor; give some, or a score"
        )
    if vision_model:
        divergence = Divergence(model, samples, engine)
        return lambda twin: -divergence(twin)
    return lambda twin: -evaluate_perplexity(twin, samples, engine)


def perplexity(model: nn.Module, windows: Tensor, *, device: str | torch.device = "auto", batch_size: int = 4) -> float:
    """Perplexity of a language model; see :func:`bc.evaluation.evaluate_perplexity`.

    Args:
        model: A causal language model on the CPU.
        windows: Token ids, int64, shape (windows, tokens).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or a device.
        batch_size: Windows per forward.
    """
    return evaluate_perplexity(model, windows, Engine(devices.resolve(device), batch_size))


def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "auto"
) -> Accuracy:
    """Top-1 and top-5 accuracy of a vision model; see :func:`bc.evaluation.evaluate_accuracy`.

    Args:
        model: A classifier on the CPU.
        batches: Pairs of images, shape (n, channels, height, width), and labels, int64, shape (n,); for example
            :func:`bc.data.images.test_batches`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or a device.
    """
    return evaluate_accuracy(model, batches, Engine(devices.resolve(device)))


def accuracies(
    models: Mapping[str, nn.Module], batches: Iterable[tuple[Tensor, Tensor]], *, device: str | torch.device = "auto"
) -> dict[str, Accuracy]:
    """Accuracy of several vision models in one pass; see :func:`bc.evaluation.evaluate_accuracies`.

    Args:
        models: Name → classifier on the CPU, the float model and its quantized copies for example.
        batches: As for :func:`accuracy`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or a device.
    """
    return evaluate_accuracies(models, batches, Engine(devices.resolve(device)))


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Save a quantized and compensated model; see :func:`bc.checkpoint.save_model`."""
    return save_model(model, Path(folder), tokenizer)


def open(folder: str | Path) -> nn.Module:
    """Read a model that :func:`save` wrote; see :func:`bc.checkpoint.open_model`."""
    return open_model(Path(folder))
