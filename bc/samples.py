"""What samples may be, checked before anything long begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bc.chains import is_vision
from bc.errors import UserError
from bc.evaluation import check_vocabulary, check_window

TOKENS = "token ids, int64, shape (samples, tokens), or a list of such tensors or of dicts with input_ids"
IMAGES = "images, floating, shape (images, channels, height, width)"


def check_samples(model: nn.Module, samples: Any, where: str) -> None:
    """Refuse what cannot be read, more than once, as the samples of a model.

    Args:
        model: A language or a vision model.
        samples: What was given.
        where: Name of the argument, for the message.

    Raises:
        UserError: Naming the argument, what it is, and what is allowed.
    """
    if is_vision(model):
        _check_images(model, samples, where)
    elif isinstance(samples, Tensor):
        _check_ids(model, samples, where, (2,))
    elif isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
        raise UserError(f"{where}: a {_kind(samples)} is not allowed; give {TOKENS}")
    if not len(samples):
        raise UserError(f"{where}: there are no samples; give at least one")
    if isinstance(samples, Tensor):
        return
    for number, sample in enumerate(samples):
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else sample
        place = f"{where}[{number}]" + ("['input_ids']" if isinstance(sample, Mapping) else "")
        if not isinstance(ids, Tensor):
            raise UserError(f"{place}: a {_kind(ids)} is not allowed; give {TOKENS}")
        _check_ids(model, ids, place, (1, 2))
        if isinstance(sample, Mapping):
            _check_mask(sample.get("attention_mask"), f"{where}[{number}]['attention_mask']")


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"


def _check_ids(model: nn.Module, ids: Tensor, where: str, dimensions: tuple[int, ...]) -> None:
    if ids.dim() not in dimensions or ids.is_floating_point():
        raise UserError(f"{where}: a {_kind(ids)} is not allowed; give {TOKENS}")
    if not ids.shape[-1]:
        raise UserError(f"{where}: a {_kind(ids)} has no tokens; leave it out, or give more text")
    check_window(model, ids.shape[-1], where)
    check_vocabulary(ids, getattr(getattr(model, "config", None), "vocab_size", None), where)


def _check_mask(mask: Any, where: str) -> None:
    """Refuse a mask that leaves nothing of a sample."""
    if isinstance(mask, Tensor) and mask.dim() in (1, 2) and not bool(mask.bool().any(-1).all()):
        raise UserError(f"{where}: a sample is padding throughout; leave it out")


def _check_images(model: Any, samples: Any, where: str) -> None:
    if not isinstance(samples, Tensor) or samples.dim() != 4 or not samples.is_floating_point():
        raise UserError(f"{where}: a {_kind(samples)} is not allowed; give {IMAGES}")
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "img_size", None) if getattr(patches, "strict_img_size", True) else None
    if size is not None and tuple(samples.shape[2:]) != tuple(size):
        found = f"{samples.shape[2]} × {samples.shape[3]}"
        raise UserError(f"{where}: images of {found} do not fit the model; give {size[0]} × {size[1]}")
