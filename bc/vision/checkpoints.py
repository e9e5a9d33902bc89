"""Weights of vision models from files: a user's checkpoint, and the embedded ones."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bc.errors import UserError, pickled

ASSETS = Path(__file__).parents[1] / "data" / "assets"
ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
TOP = ("pos_embed", "patch_embed.proj.weight")  # found behind a prefix too
SIZED = (*TOP, "relative_position_bias_table")  # what depends on the size of images, patches or windows
IN_FOLDER = ("model.safetensors", "pytorch_model.bin")


def locate(path: str) -> Path:
    """The checkpoint file at a path.

    Raises:
        UserError: There is none.
    """
    given = Path(path).expanduser()
    for candidate in [given] if given.is_file() else [given / name for name in IN_FOLDER]:
        if candidate.is_file() and candidate.suffix in ENDINGS:
            return candidate
    raise UserError(
        f"model.path: no checkpoint at {path!r}; give a file ({', '.join(ENDINGS)}) or a folder with "
        f"{' or '.join(IN_FOLDER)}"
    )


def read_into(model: nn.Module, path: Path) -> None:
    """Load a checkpoint's weights into a model, in timm's names or in those of the original code.

    Raises:
        UserError: The file is unreadable, or holds another model's weights.
    """
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickled("model.path", path) from error
    except Exception as error:  # torch's, pickle's and safetensors' errors share no other base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path: {str(path)!r} cannot be read ({reason}); give the model's checkpoint") from error
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        problems = _strangers(model, state)
        if problems and convert is not None:
            problems = _resampled(model, state)
            if not problems:
                state = convert(state, model)
                problems = _strangers(model, state)
    except (KeyError, IndexError, RuntimeError, AttributeError) as error:
        problems = [str(error)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"model.path: {str(path)!r} holds another model's weights ({'; '.join(problems[:3])}{more}); "
            "give the checkpoint of the model that is named"
        )
    model.load_state_dict(state)


def _strangers(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """What keeps a state dict from being a model's."""
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown" for name in state if name not in own]
    both = [name for name in own if name in state]
    return wrong + [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in both
        if state[name].shape != own[name].shape
    ]


def _resampled(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """What timm's conversion would interpolate without a word: tables of another image, window or patch size."""
    own, prefix = model.state_dict(), getattr(model, "num_prefix_tokens", 0)
    found = []
    for name, value in state.items():
        key = next((key for key in (name, *TOP) if key in own and f".{name}".endswith(f".{key}")), "")
        if not key.endswith(SIZED) or not isinstance(value, Tensor):
            continue
        given, wanted = tuple(value.shape), tuple(own[key].shape)
        if key.endswith("pos_embed"):  # some layouts have no class token in it, or no first axis
            other = given[-1:] != wanted[-1:] or abs(given[-2] - wanted[-2]) > prefix
        elif key.endswith("weight"):  # some layouts have a matrix for the convolution
            other = len(given) == 4 and given[-2:] != wanted[-2:]
        else:
            other = given != wanted
        if other:
            found.append(f"{name} is {given}, not {wanted}")
    return found


def embedded_file(name: str) -> Path:
    """The committed checkpoint of an embedded model: ``tiny_vit``, ``tiny_deit``, ``tiny_swin``, ``vit_s14_probe``."""
    return ASSETS / f"{name}.safetensors"


def _committed(name: str) -> Path:
    return embedded_file("vit_s14_probe" if name == "vit_s14" else name)


def check_embedded(name: str) -> None:
    """Refuse an embedded model whose committed weights are absent.

    Raises:
        UserError: Naming the file and the command that makes it.
    """
    path = _committed(name)
    if not path.is_file():
        raise UserError(
            f"model: the embedded weights {str(path)!r} are absent; "
            f"make them with `python -m experiments.training.train_tiny {path.stem}`"
        )


@cache
def embedded_revision(name: str) -> str:
    """First 12 digits of the SHA-256 of an embedded model's committed weights; empty where there are none."""
    path = _committed(name)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else ""


def read_embedded(model: nn.Module, name: str) -> None:
    """Load the weights of an embedded model.

    Raises:
        UserError: A file is absent, damaged, or cannot be fetched.
    """
    if name == "vit_s14":
        from bc.data.embedded import vision_backbone

        state = _read(vision_backbone()) | _read(embedded_file("vit_s14_probe"))
    else:
        state = _read(embedded_file(name))
    model.load_state_dict({key: value.float() for key, value in state.items()})


def metrics(name: str) -> dict[str, Any]:
    """What the training script recorded beside an embedded checkpoint: accuracy, seed, versions, commit."""
    with safe_open(embedded_file(name), "pt") as file:
        return json.loads(file.metadata()["metrics"])


def write(path: Path, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint in half precision with its record, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}
    save_file(tensors, partial, {"format": "pt", "metrics": json.dumps(record, sort_keys=True)})
    partial.chmod(0o644)
    partial.replace(path)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model: the embedded weights {str(path)!r} cannot be read ({error}); "
            f"make them with `python -m experiments.training.train_tiny {path.stem}`"
        ) from error
