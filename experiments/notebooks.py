"""Take times and versions out of executed notebooks, so that their diffs read: ``python -m experiments.notebooks``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.frame import ROOT
from experiments.records import write_text


def tidied(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook without what differs from run to run, outputs of one stream in one piece."""
    notebook["metadata"] = {"kernelspec": notebook["metadata"]["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        outputs: list[dict[str, Any]] = []
        for output in cell.get("outputs", []):
            last = outputs[-1] if outputs else {}
            if output["output_type"] == "stream" and last.get("name") == output["name"]:
                last["text"] = [*last["text"], *output["text"]]
            else:
                outputs.append(output)
        if "outputs" in cell:
            cell["outputs"] = outputs
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    """Tidy the notebooks that are named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.notebooks", description="Tidy executed notebooks.")
    parser.add_argument("notebook", nargs="*", type=Path, help="files (default: all in notebooks/)")
    for path in parser.parse_args(arguments).notebook or sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not path.is_file():
            parser.error(f"notebook: {path} is not a file; name an executed notebook, or none for all")
        notebook = tidied(json.loads(path.read_text("utf8")))
        write_text(path, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
