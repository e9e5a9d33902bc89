"""A sweep on a real Slurm of one node, with a cancelled and a preempted cell, gives what it gives without."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments import status
from experiments.run import tidy
from tests.experiments import faulty
from tests.experiments.conftest import Workspace

SCRIPT = Path(__file__).with_name("slurm.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CELLS = ("-m", "quantizer=rtn,gptq", "bits=w3,w4", "bc=sink")
CANCELLED, PREEMPTED = "rtn-w3", "gptq-w4"
SLURM = (
    "hydra/launcher=slurm",
    "hydra.launcher.gpus_per_node=0",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=null",
    "hydra.launcher.timeout_min=1",  # Slurm's shortest
    "hydra.launcher.signal_delay_s=10",
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing; Debian: apt install slurm-wlm munge)")
    with tempfile.TemporaryDirectory(prefix="bc-slurm-") as folder:
        started = subprocess.run(["bash", SCRIPT, "start", folder], capture_output=True, text=True, check=False)
        try:
            assert started.returncode == 0, started.stderr
            yield {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path}
        finally:
            subprocess.run(["bash", SCRIPT, "stop", folder], check=True)
            time.sleep(0.5)  # the daemons write their last state


def ask(slurm: dict[str, str], *command: str) -> str:
    environment = {**os.environ, **slurm}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def job_ids(slurm: dict[str, str]) -> dict[int, str]:
    """Job ids of the array's tasks, by number of the cell."""
    lines = ask(slurm, "squeue", "--noheader", "--array", "--states=all", "--format=%i").split()
    return {int(line.partition("_")[2]): line for line in lines if "_" in line}


def state(slurm: dict[str, str], job: str) -> str:
    return ask(slurm, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def metrics(workspace: Workspace) -> dict[str, str]:
    return {c.name: json.dumps(json.loads((c / "result.json").read_text())["metrics"]) for c in workspace.cells()}


def cell_state(workspace: Workspace, name: str) -> Callable[[], str]:
    def ask_status() -> str:
        (store,) = [s for s in status.stores(workspace.results, None, ()) if f"-{name}-" in s.slug]
        return status.state_of(store)[0]

    return ask_status


def test_a_cancelled_and_a_preempted_cell_complete(slurm: dict[str, str], workspace: Workspace, tmp_path: Path) -> None:
    cancelled, preempted = tmp_path / "cancelled", tmp_path / "preempted"
    faults = [
        {"place": "evaluating", "when": ["quantizer=rtn", "bits=w3"], "flag": cancelled},
        {"place": "evaluating", "when": ["quantizer=gptq", "bits=w4"], "flag": preempted},
    ]
    sweep = faulty.start(tidy(workspace.arguments("llama", *CELLS, *SLURM)), *faults, **slurm)
    try:
        faulty.wait_until(cancelled.exists, sweep)
        first = job_ids(slurm)[0]
        ask(slurm, "scancel", first)
        faulty.wait_until(lambda: state(slurm, first) == "CANCELLED", sweep)
        assert cell_state(workspace, CANCELLED)() == "interrupted"
        ask(slurm, "scontrol", "requeue", first)
        faulty.wait_until(preempted.exists, sweep)
        faulty.wait_until(lambda: cell_state(workspace, PREEMPTED)() == "interrupted", sweep)
        output, errors = sweep.communicate(timeout=faulty.PATIENCE)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, errors
    assert "4 complete" in output
    jobs = job_ids(slurm)
    restarts = {
        number: re.findall(r"Restarts=(\d+)", ask(slurm, "scontrol", "show", "job", jobs[number])) for number in jobs
    }
    assert restarts == {0: ["1"], 1: ["0"], 2: ["0"], 3: ["1"]}
    assert len(list((workspace.results / "artefacts").glob("weights-*.safetensors"))) == 4
    plain = Workspace(workspace.shared, tmp_path / "plain")
    assert plain.run(*CELLS) == 0
    assert len(metrics(workspace)) == 4
    assert metrics(workspace) == metrics(plain)


def test_a_job_that_dies_is_one_failed_cell(slurm: dict[str, str], workspace: Workspace, tmp_path: Path) -> None:
    """There is no accounting here: what became of the job has to be learnt from the queue."""
    cells, flag = ("-m", "quantizer=rtn", "bits=w3,w4", "bc=sink"), tmp_path / "flag"
    fault = {"place": "evaluating", "when": ["bits=w3"], "flag": flag}
    sweep = faulty.start(tidy(workspace.arguments("llama", *cells, *SLURM)), fault, **slurm)
    try:
        process = faulty.wait_until(lambda: flag.exists() and flag.read_text(), sweep)
        os.kill(int(process), signal.SIGKILL)
        output, errors = sweep.communicate(timeout=faulty.PATIENCE)
    finally:
        sweep.kill()
    assert sweep.returncode == 1, errors
    assert "error: cell 0 of the sweep: its process died" in errors
    assert "1 complete, 1 failed" in output
    assert workspace.run(*cells) == 0
    assert len(metrics(workspace)) == 2
