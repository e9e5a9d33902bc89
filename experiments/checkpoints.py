"""Checkpoints as commands read them and cells keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bc.checkpoint import MODEL_FILE, DamagedFileError, check_model, open_model
from bc.errors import UserError
from experiments.store import set_aside

AGAIN = "run its command once more with save_model=true, or bc.save"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def open_checkpoint(folder: str) -> tuple[nn.Module, Any]:
    """A checkpoint's model, on the CPU, and its tokenizer; None where none was saved.

    Args:
        folder: As the command line gives it.

    Raises:
        UserError: There is no checkpoint, or its tokenizer is damaged.
        DamagedFileError: The checkpoint is damaged; the message names the file and the cure.
    """
    path = Path(folder).expanduser()
    try:
        model = open_model(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; or make the checkpoint again: {AGAIN}") from error
    return model, read_tokenizer(path)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint; None where the folder has no file of one.

    Raises:
        UserError: The files cannot be read, or hold no vocabulary.
    """
    from transformers import AutoTokenizer

    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        return None
    blamed = files[0]
    try:
        for path in (path for path in files if path.suffix == ".json"):
            blamed = path
            json.loads(path.read_bytes())
        blamed = files[0]
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(found) <= len(found.all_special_tokens):  # what transformers makes up where a file lacks
            raise ValueError("it has no vocabulary")
    except Exception as error:  # tokenizers raises nothing more special
        reason = " ".join(str(error).split())
        cure = f"put it back, or remove the checkpoint and make it again: {AGAIN}"
        raise UserError(f"checkpoint: the tokenizer's {blamed} is damaged ({reason}); {cure}") from error
    return found


def lacks(folder: Path) -> bool:
    """Whether a folder holds no whole checkpoint; all of it is read."""
    try:
        check_model(folder)
    except (UserError, DamagedFileError):
        return True
    return False


def set_damaged_aside(folder: Path) -> None:
    """Move a checkpoint that is not whole out of the way; what a killed process left before the weights stays."""
    try:
        if (folder / MODEL_FILE).exists():
            check_model(folder)
    except (UserError, DamagedFileError) as error:
        set_aside(folder, str(error))
