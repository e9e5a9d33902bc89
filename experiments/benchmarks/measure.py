"""Runs what is measured in processes of their own, and keeps what was measured with what it was measured on."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bc import device as devices
from experiments.provenance import commit, versions

MARK = "measured: "
CPU = torch.device("cpu")


def run(
    function_path: str, arguments: dict[str, Any], repeats: int, python: str = sys.executable
) -> list[dict[str, Any]]:
    """Call a function, each time in a new process.

    Args:
        function_path: ``module:function``; what it returns must go into JSON.
        arguments: Its keyword arguments, as JSON has them.
        repeats: Number of calls.
        python: The interpreter.

    Returns:
        For each call ``cpu_seconds``, ``wall_seconds``, ``peak_mib`` (memory that the call took at most, over what the
        process had before it) and ``result``.

    Raises:
        RuntimeError: The call failed.
    """
    command = [python, "-m", __name__, function_path, json.dumps(arguments)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            raise RuntimeError(f"{function_path} {arguments}: {done.stderr.strip() or 'no result'}")
        found.append(json.loads(lines[-1].removeprefix(MARK)))
    return found


def peak_mib() -> float:
    """Most memory that this process had so far, or since it was forgotten, MiB."""
    return devices.peak_memory_mb(CPU)


def forget_peak() -> None:
    """Let the peak start anew from what the process has now; Linux alone can."""
    devices.reset_peak_memory(CPU)


@dataclass
class Memory:
    """Most memory that this process itself held while it was watched, over what it had before, GiB."""

    peak_gib: float = 0.0


@contextmanager
def own_memory(every: float = 0.02) -> Iterator[Memory]:
    """Watch the process's own memory, without the pages of files that it maps; needs Linux.

    Args:
        every: Seconds between two looks.
    """
    memory, before, done = Memory(), _own_gib(), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            memory.peak_gib = max(memory.peak_gib, _own_gib() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def _own_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) / 2**20


def _measured(function_path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, name = function_path.partition(":")
    function = getattr(import_module(module), name)
    forget_peak()
    before, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    result = function(**arguments)
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_mib": peak_mib() - before,
        "result": result,
    }


def machine() -> dict[str, Any]:
    """What a measurement was made on: processor, cores, threads, versions, commit."""
    found = versions()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": found["torch"],
        "python": found["python"],
        "commit": commit(),
    }


def _processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, each with :func:`machine`; older rows with other columns keep their values."""
    old: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf8", newline="") as stream:
            old = list(csv.DictReader(stream))
    about = machine()
    everything = [*old, *({**row, **about} for row in rows)]
    columns = list(dict.fromkeys(name for row in everything for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)


def report(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows (see :func:`write`) and print them, a line each."""
    write(path, rows)
    for row in rows:
        print(
            "  ".join(
                f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
            )
        )


if __name__ == "__main__":
    print(MARK + json.dumps(_measured(sys.argv[1], json.loads(sys.argv[2]))))
