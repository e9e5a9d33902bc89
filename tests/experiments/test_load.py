"""Many cells, several processes on one results folder, and processes that are killed at random.

``BC_LOAD=CELLS,PROCESSES,KILLS`` sets the size; by default it is one that takes seconds, 500,8,20 is the full one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments import status
from experiments.run import tidy
from experiments.store import RESULT, all_results
from tests.experiments.conftest import Workspace

ROOT = Path(__file__).parents[2]
CELLS, PROCESSES, KILLS = (int(x) for x in os.environ.get("BC_LOAD", "8,2,2").split(","))


class Watch:
    """Notes what every result file held when it was first seen."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.seen = workspace, dict[str, tuple[int, bytes]]()

    def look(self) -> int:
        for path in (self.workspace.results / "cells").glob(f"*/{RESULT}"):
            if path.parent.name not in self.seen:
                self.seen[path.parent.name] = (path.stat().st_ino, path.read_bytes())
        return len(self.seen)


def start(workspace: Workspace, number: int, log: Path) -> subprocess.Popen[bytes]:
    """A process that runs the whole sweep, beginning elsewhere than the others do."""
    seeds = [(number * CELLS // PROCESSES + i) % CELLS for i in range(CELLS)]
    sweep = ["-m", "quantizer=rtn", "bits=w3", "bc=sink", f"seed={','.join(map(str, seeds))}"]
    sweep += ["report.calibration_samples=0", "report.held_out_samples=0"]
    arguments = tidy(workspace.arguments("llama", *sweep))
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *arguments], cwd=ROOT, stdout=stream, stderr=stream
        )


def test_a_sweep_that_is_killed_at_random_completes(workspace: Workspace, tmp_path: Path) -> None:
    draw, watch = random.Random(0), Watch(workspace)
    logs = [tmp_path / f"{number}.log" for number in range(PROCESSES)]
    processes = [start(workspace, number, log) for number, log in enumerate(logs)]
    kills = sorted(draw.sample(range(1, CELLS), KILLS))  # each when so many cells are complete
    try:
        while any(process.poll() is None for process in processes):
            done = watch.look()
            if kills and done >= kills[0]:
                kills.pop(0)
                number = draw.choice([n for n, process in enumerate(processes) if process.poll() is None])
                processes[number].kill()
                assert processes[number].wait() in (-signal.SIGKILL, 0)
                processes[number] = start(workspace, number, logs[number])
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    assert not kills
    assert [process.wait() for process in processes] == [0] * PROCESSES
    assert watch.look() == CELLS
    assert len(list(all_results(workspace.results))) == CELLS
    assert {state for state, _ in map(status.state_of, status.stores(workspace.results, None, ()))} == {"complete"}
    for name, (inode, content) in watch.seen.items():  # what was committed was never written again
        path = workspace.results / "cells" / name / RESULT
        assert (path.stat().st_ino, path.read_bytes()) == (inode, content)
    starts = [re.findall(r"^(\S+): starts$", log.read_text(), re.MULTILINE) for log in logs]
    assert CELLS <= sum(map(len, starts)) <= CELLS + KILLS
    values = {json.loads(content)["metrics"][0]["value"] for _, content in watch.seen.values()}
    assert len(values) > CELLS // 2  # the seeds make a difference
