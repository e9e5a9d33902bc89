"""The public face: load, quantize, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bc import device as devices
from bc import quantizers
from bc.calibration import Samples
from bc.checkpoint import open_model, save_model
from bc.evaluation import evaluate_perplexity
from bc.pipeline import Engine, calibrate, compensate
from bc.report import Report
from bc.settings import Bits, Compensation


def quantize(
    model: nn.Module,
    quantizer: str = "rtn",
    bits: str | Bits = "w4",
    bc: str | Compensation = "off",
    calibration: Samples | None = None,
    *,
    held_out: Samples | None = None,
    device: str = "auto",
    batch_size: int = 4,
    **options: Any,
) -> Report:
    """Quantize a model in place and compensate it.

    Args:
        model: A float causal language model on the CPU, of a known family.
        quantizer: Name of a quantizer (:func:`bc.quantizers.available`).
        bits: ``w4``, ``w3g64``, … or :class:`~bc.settings.Bits`.
        bc: A preset (``off``, ``channel``, ``sink``, ``positional``, ``paper``) or
            :class:`~bc.settings.Compensation`.
        calibration: Token ids, int64, shape (samples, tokens), or a list (see :func:`bc.calibration.batches`). Only a
            quantizer without data, not compensated, does without.
        held_out: Samples that are not used to fit, for the errors in the report.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: Samples per forward.
        options: The quantizer's own options.

    Returns:
        Errors per site (on ``calibration`` and ``held_out``), bits per weight with biases counted, bias parameters.

    Raises:
        UserError: A setting is unknown or out of range, samples are missing, or the model is quantized already.
        QuantizationError: By site name, where no valid result exists.
    """
    settings, engine = Compensation.parse(bc), Engine(devices.resolve(device), batch_size)
    method = quantizers.create(quantizer, Bits.parse(bits), **options)
    results = calibrate(model, method, calibration, engine)
    return compensate(
        model, results, settings, calibration, engine, report_calibration=calibration, report_held_out=held_out
    )


def perplexity(model: nn.Module, windows: Tensor, *, device: str = "auto", batch_size: int = 4) -> float:
    """Perplexity of a language model; see :func:`bc.evaluation.evaluate_perplexity`.

    Args:
        model: A causal language model on the CPU.
        windows: Token ids, int64, shape (windows, tokens).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        batch_size: Windows per forward.
    """
    return evaluate_perplexity(model, windows, Engine(devices.resolve(device), batch_size))


def save(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """Save a quantized and compensated model; see :func:`bc.checkpoint.save_model`."""
    return save_model(model, Path(folder), tokenizer)


def open(folder: str | Path) -> nn.Module:
    """Read a model that :func:`save` wrote; see :func:`bc.checkpoint.open_model`."""
    return open_model(Path(folder))
