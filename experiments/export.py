"""Export a checkpoint for other software: ``python -m experiments.export checkpoint=FOLDER folder=NEW_FOLDER``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bc.checkpoint import provenance_of
from bc.errors import UserError
from bc.export import export_compressed_tensors
from experiments.arguments import command
from experiments.checkpoints import open_checkpoint
from experiments.disk import one_line_disk_errors


@dataclass(frozen=True)
class ExportConfig:
    """Settings of the command.

    Attributes:
        checkpoint: Folder that ``bc.save`` or ``save_model=true`` wrote, with a tokenizer.
        folder: Where the exported model goes; it must not exist yet.
    """

    checkpoint: str
    folder: str

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("folder: is empty; name a new folder")


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside, which takes the folder's name in the end, or is removed after an error.

    Raises:
        UserError: The folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        with one_line_disk_errors("folder", folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()  # an error of this one names a folder that nobody asked for
        with one_line_disk_errors("folder", folder.parent):
            yield temporary
            temporary.rename(folder)
    except OSError as error:  # the kernel's own file systems say that there is no such file
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"folder: {str(folder)!r} cannot be made ({reason}); name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(config: ExportConfig) -> str:
    """Write a checkpoint as compressed-tensors; returns where it is.

    Raises:
        UserError: The folder is taken or cannot be written, or the checkpoint holds something that the format cannot.
            Or its tokenizer is damaged.
        DamagedFileError: The checkpoint is damaged.
    """
    folder = Path(config.folder).expanduser()
    with one_line_disk_errors("folder", folder):
        taken = folder.exists()
    if taken:
        raise UserError(f"folder: {config.folder!r} exists already; name a new one")
    model, tokenizer = open_checkpoint(config.checkpoint)
    with made_whole(folder) as temporary:
        export_compressed_tensors(model, temporary, tokenizer)
    line = f"{folder}: load it with AutoModelForCausalLM.from_pretrained (needs the compressed-tensors package)"
    return "\n".join([line, *origin(provenance_of(model))])


def origin(facts: dict[str, Any]) -> Iterator[str]:
    """What a checkpoint says of the cell that it is of; nothing where ``bc.save`` wrote it."""
    if "cell" in facts:
        yield f"made from cell {facts['cell'][:8]}, commit {facts['commit']}, on {facts['device']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a mistake in the input."""
    return command("export", ExportConfig, export, arguments)


if __name__ == "__main__":
    sys.exit(main())
