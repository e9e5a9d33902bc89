"""Where a result comes from: versions, commit, device, times, memory, command."""

from __future__ import annotations

import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bc import device as devices
from experiments.secrets import redact

PACKAGES = (
    "bias-compensation",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
)
UNKNOWN_COMMIT = "unknown"


class Stopwatch:
    """Seconds per stage of a cell."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@cache
def versions() -> dict[str, str]:
    """Python's and the main packages' versions; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """The git commit of the code, ``-dirty`` appended if files differ from it; ``unknown`` outside a repository."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return UNKNOWN_COMMIT
    # what a run writes is not a change of the code
    changed = _git("status", "--porcelain", "--", "bc", "conf", "experiments", "pyproject.toml")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(
    device: torch.device, seconds: dict[str, float], seeds: dict[str, int], experiment: str
) -> dict[str, Any]:
    """Everything about how a result came to be that is not part of its identity.

    Args:
        device: Where the cell ran.
        seconds: Time per stage.
        seeds: Name → seed.
        experiment: The experiment that it was run for.
    """
    return {
        "commit": commit(),
        "versions": versions(),
        "device": devices.describe(device),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "seeds": seeds,
        "experiment": experiment,
        "command": redact(shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]])),
    }
