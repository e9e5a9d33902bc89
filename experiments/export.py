"""Export a checkpoint for other software: ``python -m experiments.export checkpoint=FOLDER folder=NEW_FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bc.checkpoint import open_model
from bc.errors import UserError
from bc.export import export_compressed_tensors
from experiments.arguments import command


@dataclass(frozen=True)
class ExportConfig:
    """Settings of the command.

    Attributes:
        checkpoint: Folder that ``bc.save`` or ``save_model=true`` wrote, with a tokenizer.
        folder: Where the exported model goes; it must not exist yet.
    """

    checkpoint: str
    folder: str


def export(config: ExportConfig) -> str:
    """Write a checkpoint as compressed-tensors; returns where it is.

    Raises:
        UserError: The folder is taken, or the checkpoint holds something that the format cannot.
        DamagedFileError: The checkpoint is damaged.
    """
    from transformers import AutoTokenizer

    folder = Path(config.folder).expanduser()
    if folder.exists():
        raise UserError(f"folder: {config.folder!r} exists already; name a new one")
    model = open_model(Path(config.checkpoint))
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.checkpoint, trust_remote_code=False)
    except (OSError, ValueError):
        tokenizer = None  # a checkpoint without one is exported without one
    path = export_compressed_tensors(model, folder, tokenizer)
    return f"{path.parent}: load it with AutoModelForCausalLM.from_pretrained (needs the compressed-tensors package)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a mistake in the input."""
    return command("export", ExportConfig, export, arguments)


if __name__ == "__main__":
    sys.exit(main())
