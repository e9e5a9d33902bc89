"""Perplexity of language models over non-overlapping windows; top-1 and top-5 accuracy of vision models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bc import device as devices
from bc.calibration import capture, logits, on_device
from bc.chains import block_list
from bc.diagnosis import not_finite
from bc.errors import UserError, headless
from bc.models import family_of, submodule
from bc.pipeline import Engine
from bc.positions import PositionContext
from bc.progress import track

HEADROOM = 0.6  # of the free device memory, for the weights of a model that is evaluated whole


def check_window(model: nn.Module, window: int, where: str = "data") -> None:
    """Refuse a window that is longer than the model's positions; ``where`` begins the message.

    Raises:
        UserError: Naming both lengths.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise UserError(f"{where}: a window of {window} tokens is longer than the model's {longest}; lower the window")


def check_vocabulary(ids: Tensor, known: int | None, where: str = "data") -> None:
    """Refuse token ids that a model does not know; ``where`` begins the message.

    Args:
        ids: Token ids, of an integer type, any shape.
        known: How many the model knows; None where it does not say.
        where: Name of the field or argument.

    Raises:
        UserError: Naming the ids' range and the number known.
    """
    if known is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise UserError(
            f"{where}: token ids from {int(ids.min())} to {int(ids.max())} are not all of the model's {known}; "
            "give those of its own tokenizer"
        )


@torch.no_grad()
def evaluate_perplexity(model: nn.Module, windows: Tensor, engine: Engine | None = None) -> float:
    """Perplexity over windows: exp of the mean, over windows, of the mean cross-entropy of tokens 2 … T.

    On a GPU too small for the whole model, the blocks pass through it one at a time.

    Args:
        model: A causal language model on the CPU.
        windows: Token ids, int64, shape (windows, tokens).
        engine: Device and batch size.

    Returns:
        The perplexity, ≥ 1; infinite where the mean cross-entropy overflows.

    Raises:
        UserError: No windows, windows of one token or longer than the model's positions, or ids it does not know.
        FloatingPointError: A logit is NaN; by the name of the module where that begins.
    """
    return perplexity_of(window_losses(model, windows, engine))


def perplexity_of(losses: Sequence[float]) -> float:
    """Perplexity from the mean cross-entropy of each window; infinite where it overflows."""
    mean = math.fsum(losses) / len(losses)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def window_losses(model: nn.Module, windows: Tensor, engine: Engine | None = None) -> list[float]:
    """Mean cross-entropy of tokens 2 … T of every window; arguments and errors as :func:`evaluate_perplexity`."""
    engine = engine or Engine()
    if not isinstance(windows, Tensor):
        raise UserError(f"data: a {type(windows).__name__} cannot be scored; give token ids, int64, (windows, tokens)")
    if windows.dim() != 2 or len(windows) == 0 or windows.shape[1] < 2:
        raise UserError(f"data: windows of shape {tuple(windows.shape)} cannot be scored; give (windows, 2 or more)")
    if windows.dtype not in (torch.int32, torch.int64):
        raise UserError(f"data: windows of {windows.dtype} cannot be scored; give token ids, int64")
    check_window(model, windows.shape[1])
    check_vocabulary(windows, getattr(getattr(model, "config", None), "vocab_size", None))
    losses: list[float] = []
    parts = windows.split(engine.batch_size)
    if _fits(model, engine.device):
        with evaluating(model), on_device(engine.device, model):
            for ids in track(parts, "perplexity", total=len(parts), unit="batch"):
                ids = ids.to(engine.device)
                output = model(input_ids=ids, use_cache=False)
                if not hasattr(output, "logits"):
                    raise headless(model)
                losses += _losses(output.logits, ids)
    else:
        with evaluating(model):
            losses = _streamed(model, windows, engine)
    if any(map(math.isnan, losses)):
        raise not_finite(model, (partial(model, input_ids=ids, use_cache=False) for ids in parts))
    return losses


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: a model in training mode would drop activations out."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _fits(model: nn.Module, device: torch.device) -> bool:
    free = devices.free_memory_bytes(device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return free is None or size < HEADROOM * free


def _losses(scores: Tensor, ids: Tensor) -> list[float]:
    """Each window's mean cross-entropy, in fp32 (one window at a time, to save memory)."""
    pairs = zip(scores, ids, strict=True)
    return [cross_entropy(row[:-1].float(), target[1:]).item() for row, target in pairs]


@torch.no_grad()
def _streamed(model: nn.Module, windows: Tensor, engine: Engine) -> list[float]:
    """The same with one block on the device at a time."""
    family = family_of(model)
    stream = capture(model, family, windows, engine.batch_size, engine.device, engine.store)
    for block in track(block_list(model, family), "perplexity", unit="block"):
        with on_device(engine.device, block):
            stream.advance(block)
    losses: list[float] = []
    with on_device(engine.device, *(submodule(model, p) for p in family.tail)):
        for i, ids in enumerate(windows.split(engine.batch_size)):
            losses += _losses(logits(model, family, stream, i), ids.to(engine.device))
    PositionContext.of(model).set(None, None)
    return losses


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a vision model.

    Attributes:
        top1: Percent of images whose label has the highest logit.
        top5: Percent of images whose label is among the five highest logits.
        loss: Mean cross-entropy.
        right: Whether each image's label has the highest logit, in their order.
    """

    top1: float
    top5: float
    loss: float
    right: tuple[bool, ...]

    @property
    def samples(self) -> int:
        """Images that were scored."""
        return len(self.right)


@dataclass
class _Tally:
    """What a model has scored so far."""

    right: list[bool] = field(default_factory=list)
    five: int = 0
    loss: float = 0.0

    def add(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Score one more batch, which is on the model's device."""
        images = images.to(next(model.parameters()).dtype)
        scores = model(images).float()
        if bool(scores.isnan().any()):
            raise not_finite(model, [partial(model, images)])
        ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        self.right += ranked[:, 0].tolist()
        self.five += int(ranked.any(1).sum())
        self.loss += cross_entropy(scores, labels, reduction="sum").item()

    def accuracy(self) -> Accuracy:
        """Of all batches."""
        samples = len(self.right)
        if not samples:
            raise UserError("data: there are no images to score; give at least one batch")
        return Accuracy(100 * sum(self.right) / samples, 100 * self.five / samples, self.loss / samples, (*self.right,))


def evaluate_accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], engine: Engine | None = None, total: int | None = None
) -> Accuracy:
    """Top-1 and top-5 accuracy.

    Args:
        model: A classifier on the CPU.
        batches: Images, floating, shape (n, channels, height, width), and labels, int64, shape (n,).
        engine: Device.
        total: Number of batches, for the progress bar.

    Raises:
        UserError: There are no images.
        FloatingPointError: A logit is NaN; by the name of the module where that begins.
    """
    return evaluate_accuracies({"": model}, batches, engine, total)[""]


@torch.no_grad()
def evaluate_accuracies(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    engine: Engine | None = None,
    total: int | None = None,
) -> dict[str, Accuracy]:
    """Accuracy of several models, the float one and its quantized copies say, in one pass: a batch is decoded once.

    Models that fit on the device together stay there; of others each visits it for every batch.

    Args:
        models: Name → classifier on the CPU; all take the same images.
        batches: As for :func:`evaluate_accuracy`.
        engine: Device.
        total: Number of batches, for the progress bar.

    Returns:
        Name → what :func:`evaluate_accuracy` gives.

    Raises:
        UserError: There are no models or no images.
        FloatingPointError: A logit is NaN; by the names of the model and of the module where that begins.
    """
    if not models:
        raise UserError("models: there are none to score; give at least one")
    device = (engine or Engine()).device
    tallies = {name: _Tally() for name in models}
    together = len(models) == 1 or _fits(nn.ModuleList(models.values()), device)
    with evaluating(*models.values()), on_device(device, *(models.values() if together else ())):
        for images, labels in track(batches, "accuracy", total=total, unit="batch"):
            images, labels = images.to(device), labels.to(device)
            for name, model in models.items():
                with on_device(device, *(() if together else (model,))):
                    try:
                        tallies[name].add(model, images, labels)
                    except FloatingPointError as error:
                        raise FloatingPointError(f"{name}: {error}" if name else str(error)) from error
    return {name: tally.accuracy() for name, tally in tallies.items()}
