"""Processes that are killed and stopped for real: what was complete stays, and the same command completes the rest."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from experiments.run import tidy
from experiments.status import state_of, stores
from tests.experiments import faulty
from tests.experiments.conftest import Workspace

CELLS = ("-m", "quantizer=gptq", "bits=w3", "bc='off',sink")
COMPLETE = ("quantizer=gptq", "bits=w4", "bc='off'")


def contents(workspace: Workspace) -> dict[str, str]:
    """What was measured, by cell."""
    found = {c.name: json.loads((c / "result.json").read_text()) for c in workspace.cells()}
    return {name: json.dumps([r["metrics"], r["error_before"], r["error_after"]]) for name, r in found.items()}


@pytest.fixture(scope="module")
def reference(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes out where nothing goes wrong."""
    workspace = Workspace(shared, tmp_path_factory.mktemp("reference") / "results")
    assert workspace.run(*COMPLETE) == 0
    assert workspace.run(*CELLS) == 0
    return contents(workspace)


def leftovers(workspace: Workspace) -> list[str]:
    found = [p.name for folder in ("cells", "artefacts") for p in (workspace.results / folder).rglob(".*")]
    return [name for name in found if not name.endswith(".lock")]


def stop(workspace: Workspace, flag: Path, place: str, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a sweep when its second cell has come to a place; returns its exit status and errors."""
    when = ["bc='off'"] if place in ("calibrating", "writing_artefact") else ["bc=sink"]
    sweep = faulty.start(tidy(workspace.arguments("llama", *CELLS)), {"place": place, "when": when, "flag": flag})
    faulty.wait_until(flag.exists, sweep)
    sweep.send_signal(number)
    _, errors = sweep.communicate(timeout=faulty.PATIENCE)
    return sweep.returncode, errors


@pytest.mark.parametrize("place", ["calibrating", "writing_artefact", "writing_result"])
def test_sigkill(workspace: Workspace, tmp_path: Path, reference: dict[str, str], place: str) -> None:
    assert workspace.run(*COMPLETE) == 0
    (complete,) = [c / "result.json" for c in workspace.cells()]
    before = complete.read_bytes()
    code, _ = stop(workspace, tmp_path / "flag", place, signal.SIGKILL)
    assert code == -signal.SIGKILL
    states = [state_of(store)[0] for store in stores(workspace.results, None, ())]
    done = 1 if place == "writing_result" else 0  # the sweep's own first cell
    assert sorted(states) == ["complete"] * (1 + done) + ["interrupted"]
    assert leftovers(workspace) or place == "calibrating"
    assert workspace.run(*CELLS) == 0
    assert leftovers(workspace) == []
    assert contents(workspace) == reference
    assert complete.read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm(
    workspace: Workspace, tmp_path: Path, reference: dict[str, str], number: signal.Signals, code: int
) -> None:
    assert workspace.run(*COMPLETE) == 0
    found, errors = stop(workspace, tmp_path / "flag", "calibrating", number)
    assert found == code
    assert "Traceback" not in errors
    states = [state_of(store) for store in stores(workspace.results, None, ())]
    assert sorted(state for state, _ in states) == ["complete", "interrupted"]
    assert leftovers(workspace) == []
    assert workspace.run(*CELLS) == 0
    assert contents(workspace) == reference
