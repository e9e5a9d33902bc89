"""The local launcher: dead jobs, a GPU for each process, signals to the launcher."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from bc import device as devices
from experiments.run import tidy
from experiments.store import write_json
from experiments.sweep import OUTCOME, Outcome
from tests.experiments import faulty
from tests.experiments.conftest import Workspace, assert_one_line

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
SWEEP = ("-m", "quantizer=rtn", "bits=w3,w4", "bc='off'", "hydra/launcher=local")


def states(workspace: Workspace) -> dict[str, str]:
    return {c.name.split("-")[2]: json.loads((c / "status.json").read_text())["state"] for c in workspace.cells()}


def test_a_killed_job_is_one_failed_cell(workspace: Workspace, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    fault = {"place": "evaluating", "when": ["bits=w3"], "flag": flag}
    sweep = faulty.start(tidy(workspace.arguments("llama", *SWEEP)), fault)
    process = faulty.wait_until(lambda: flag.exists() and flag.read_text(), sweep)
    os.kill(int(process), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=faulty.PATIENCE)
    assert sweep.returncode == 1
    assert "error: cell 0 of the sweep: its process died" in errors
    assert "1 complete, 1 failed" in output
    assert "Traceback" not in errors
    assert states(workspace) == {"w3": "running", "w4": "complete"}
    assert workspace.run(*SWEEP[:-1]) == 0
    assert set(states(workspace).values()) == {"complete"}


def test_what_an_earlier_sweep_left_in_the_same_folder_does_not_count(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    for number, old in ((0, "complete"), (1, "failed"), (2, "failed")):
        write_json(folder / str(number) / OUTCOME, asdict(Outcome(old, "", "an earlier sweep's")))
    assert workspace.run(*SWEEP[:-1], f"hydra.sweep.dir={folder}") == 0
    flag = tmp_path / "flag"
    fault = {"place": "evaluating", "when": ["bits=w3"], "flag": flag}
    more = (f"hydra.sweep.dir={folder}", "data.evaluation.limit=7")
    sweep = faulty.start(tidy(workspace.arguments("llama", *SWEEP, *more)), fault)
    os.kill(int(faulty.wait_until(lambda: flag.exists() and flag.read_text(), sweep)), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=faulty.PATIENCE)
    assert sweep.returncode == 1
    assert "error: cell 0 of the sweep: its process died" in errors
    assert "1 complete, 1 failed" in output


def test_each_process_has_a_gpu_and_threads_of_its_own(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There need be none: the processes are told by name which one is theirs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setenv("SEEN", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    more = ("engine.device=auto", "engine.threads=null")
    sweep = faulty.start(tidy(workspace.arguments("llama", *SWEEP, *more)))
    output, errors = sweep.communicate(timeout=faulty.PATIENCE)
    assert sweep.returncode == 0, errors
    assert "2 complete" in output
    seen = {path.name: path.read_text() for path in tmp_path.glob("seen-*")}
    assert seen == {"seen-0": "5", "seen-1": "GPU-7"}
    results = [json.loads((c / "result.json").read_text()) for c in workspace.cells()]
    assert [r["provenance"]["threads"] for r in results] == [max(1, devices.cores() // 2)] * 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_launcher_stops_its_processes(
    workspace: Workspace, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    flag = tmp_path / "flag"
    fault = {"place": "evaluating", "when": ["bits=w3"], "flag": flag}
    sweep = faulty.start(tidy(workspace.arguments("llama", *SWEEP)), fault)
    process = int(faulty.wait_until(lambda: flag.exists() and flag.read_text(), sweep))
    sweep.send_signal(number)
    _, errors = sweep.communicate(timeout=faulty.PATIENCE)
    assert sweep.returncode == code
    assert "Traceback" not in errors
    faulty.wait_until(lambda: not Path(f"/proc/{process}").exists())
    assert states(workspace) == {"w3": "interrupted"}


LOCAL, SLURM = "hydra/launcher=local", "hydra/launcher=slurm"
MISTAKES = [
    ([LOCAL, "cells_at_once=two"], "cells_at_once: 'two' is not allowed", "1 or more"),
    ([LOCAL, "cells_at_once=1.5"], "cells_at_once: 1.5 is not allowed", "1 or more"),
    ([LOCAL, "cells_at_once=0"], "cells_at_once: 0 is not allowed", "1 or more"),
    ([LOCAL, "hydra.launcher.timeout_min=abc"], "hydra.launcher.timeout_min: 'abc' is not allowed", "Integer"),
    ([LOCAL, "+hydra.launcher.partition=gpu"], "hydra.launcher: ", "partition"),
    ([SLURM, "hydra.launcher.gpus_per_node=two"], "hydra.launcher.gpus_per_node: 'two' is not allowed", "Integer"),
    ([SLURM, "hydra.launcher.setup='module load cuda'"], "hydra.launcher.setup: 'module load cuda'", 'setup=["…"]'),
    ([SLURM, "hydra.launcher.partiton=gpu"], "'hydra.launcher.partiton' is not known", "'hydra.launcher.partition'?"),
    ([SLURM, "hydra.launcher.partition=gpuu"], "Slurm does not take the jobs", "invalid partition specified: gpuu"),
]


@pytest.mark.parametrize(("arguments", "start", "mend"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_in_a_launcher_is_one_line(
    workspace: Workspace,
    tmp_path: Path,
    arguments: list[str],
    start: str,
    mend: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: gpuu >&2\nexit 1\n")
    for name in ("srun", "sbatch"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert workspace.run("-m", *arguments) == 2
    assert_one_line(capsys, start, mend)
    assert workspace.cells() == []


@pytest.mark.parametrize("missing", ["srun", "sbatch"])
def test_no_slurm_is_one_line(
    workspace: Workspace,
    tmp_path: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / {"srun": "sbatch", "sbatch": "srun"}[missing]
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workspace.run("-m", SLURM) == 2
    assert_one_line(capsys, f"hydra/launcher: slurm needs the program {missing!r}", "hydra/launcher=local")
