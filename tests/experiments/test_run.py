"""The whole command line on tiny models: sweeps, skipping, sharing, failures, interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bc import device as devices
from bc.checkpoint import load_means
from bc.errors import QuantizationError
from experiments import language
from experiments.records import rows_of
from experiments.run import main, tidy
from tests.conftest import tiny_model
from tests.experiments.conftest import Workspace, make_tokenizer

ROOT = Path(__file__).parents[2]
SWEEP = ("-m", "quantizer=gptq", "bits=w3", "bc='off',sink,paper")
RTN = ("quantizer=rtn", "bits=w3", "bits.group_size=16", "bc='off'")

# runs the command line in a process that dies, without warning, when it evaluates its second cell
DYING = """
import os, signal, sys
from experiments import language, run
evaluated, evaluate = [], language.window_losses
def dying(*args):
    evaluated.append(1)
    if len(evaluated) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*args)
language.window_losses = dying
run.main(sys.argv[1:])
"""


def metrics(workspace: Workspace) -> dict[str, str]:
    return {c.name: json.dumps(json.loads((c / "result.json").read_text())["metrics"]) for c in workspace.cells()}


def states(workspace: Workspace) -> list[str]:
    return [json.loads((c / "status.json").read_text())["state"] for c in workspace.cells()]


@pytest.mark.parametrize("model", ["opt", "opt_350m", "bloom", "llama"])
def test_sweep_on_every_family(workspace: Workspace, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*SWEEP, model=model) == 0
    results = [json.loads((c / "result.json").read_text()) for c in workspace.cells()]
    assert [r["label"]["bc"] for r in results] == ["off", "paper", "sink"]
    for result in results:
        assert result["metrics"][0]["test_samples"] == 8
        assert result["metrics"][0]["value"] > 1
        assert result["provenance"]["seeds"] == {"calibration": 0, "selection": 0}
        assert result["error_after"] <= result["error_before"] or result["label"]["bc"] != "off"
    off, paper, sink = results
    assert off["bias_parameters"] == 0
    assert off["bits_per_weight"] < sink["bits_per_weight"] < paper["bits_per_weight"]
    assert len(list((workspace.results / "artefacts").glob("weights-*"))) == 1
    assert len(list((workspace.results / "artefacts").glob("means-*"))) == 1
    assert "3 complete" in capsys.readouterr().out


def test_the_calibration_stream_keeps_the_sums_of_the_weights(workspace: Workspace) -> None:
    """They come from the pass that makes the weights, or from one more where those are there already."""
    cell = ("quantizer=gptq", "bits=w3", "bc=sink", "bc.stream=calibration")
    folder = workspace.results / "artefacts"
    assert workspace.run(*cell) == 0
    (seen,), (weights,) = folder.glob("seen-*/*"), folder.glob("weights-*")
    assert not list(folder.glob("means-*"))
    first, made = load_means(seen.parent), weights.read_bytes()
    assert workspace.run(*cell, "bc.granularity=channel") == 0  # shares both
    assert len(list(folder.iterdir())) == len([seen, weights]) + len(list(folder.glob(".*")))
    shutil.rmtree(seen.parent)
    assert workspace.run(*cell, "bc.granularity=positional") == 0
    again = load_means(seen.parent)
    assert weights.read_bytes() == made
    assert first.keys() == again.keys() and all(torch.equal(first[k].total, again[k].total) for k in first)
    streams = {json.loads((c / "result.json").read_text())["label"]["stream"] for c in workspace.cells()}
    assert streams == {"calibration"} and len(workspace.cells()) == 3


@pytest.mark.parametrize("settings", [("quantizer=rtn", "bits=w8"), ("quantizer=gptq", "bits=w4")], ids=["rtn", "gptq"])
def test_another_model_of_the_same_name_is_refused(
    workspace: Workspace, tmp_path: Path, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the weights that were made from the one nor its statistics are put into the other."""
    named = ("model.name=mine", *settings)
    assert workspace.run(*named, "bc=off") == 0
    other = tiny_model("llama")
    other.get_submodule("model.layers.1.mlp.up_proj").weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    capsys.readouterr()
    changed = [a for a in workspace.arguments("llama", *named) if a != "model.name=tiny_llama"]
    changed = [a for a in changed if not a.startswith("model.path=")] + [f"model.path={tmp_path / 'other'}"]
    assert main([*changed, "bc=channel"]) == 2
    assert "model.name: 'mine' was a model of other weights when" in capsys.readouterr().err
    assert main([*changed, "bc=channel", "model.name=theirs"]) == 0


def test_finished_cells_are_skipped(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*RTN) == 0
    before = (workspace.cells()[0] / "result.json").read_bytes()
    capsys.readouterr()
    assert workspace.run(*RTN) == 0
    assert "complete already" in capsys.readouterr().out
    assert (workspace.cells()[0] / "result.json").read_bytes() == before


def test_float_cell_is_one_whatever_the_seed(workspace: Workspace) -> None:
    assert workspace.run("-m", "quantizer=none", "bits=float", "seed=0,1") == 0
    (folder,) = workspace.cells()
    result = json.loads((folder / "result.json").read_text())
    assert result["config"]["calibration"] is None
    assert result["bits_per_weight"] == pytest.approx(32, rel=0.1)


def test_unusual_numerics_make_another_cell_and_are_recorded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rtn = ("quantizer=rtn", "bits=w3", "bc=sink")
    unusual = ("engine.matmul=medium", "engine.activations_dtype=bfloat16", "engine.deterministic=true")
    try:
        assert workspace.run(*rtn) == workspace.run(*rtn, "engine.memory_mib=0", *unusual) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        devices.set_arithmetic()
    results = [json.loads((folder / "result.json").read_text()) for folder in workspace.cells()]
    usual, other = sorted(results, key=lambda r: "numerics" in r["config"])
    assert usual["provenance"]["engine"]["matmul"] == "highest"
    wanted = {"matmul": "medium", "activations_dtype": "bfloat16", "deterministic": True, "memory_mib": 0}
    assert wanted.items() <= other["provenance"]["engine"].items()
    assert other["config"]["numerics"] == {"matmul": "medium", "activations_dtype": "bfloat16"}
    assert usual["error_after"] != other["error_after"]
    options = [rows_of(r, "adhoc", "embedded")[0]["options"] for r in (usual, other)]
    assert options[1].split() == sorted([*options[0].split(), "matmul=medium", "activations_dtype=bfloat16"])


def test_short_last_group_is_told(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run("quantizer=rtn", "bits.weight=4", "bits.group_size=24", "report.held_out_samples=0") == 0
    assert "24 does not divide 32 inputs; the last group has 8" in capsys.readouterr().out


def test_killed_and_resumed_sweep_gives_equal_results(workspace: Workspace, tmp_path: Path) -> None:
    arguments = workspace.arguments("llama", *SWEEP)
    died = subprocess.run([sys.executable, "-c", DYING, *tidy(arguments)], cwd=ROOT, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    assert sum((c / "result.json").exists() for c in workspace.cells()) == 1
    assert "running" in states(workspace)
    assert workspace.run(*SWEEP) == 0
    untouched = Workspace(workspace.shared, tmp_path / "untouched")
    assert untouched.run(*SWEEP) == 0
    assert metrics(workspace) == metrics(untouched)


def test_two_launchers_run_every_cell_once(workspace: Workspace) -> None:
    command = [sys.executable, "-m", "experiments.run", *tidy(workspace.arguments("llama", *SWEEP))]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(output.count(": starts") for output in outputs) == 3
    assert len(metrics(workspace)) == 3


@pytest.mark.parametrize("damage", [b"{", b'{"schema": 1}', b'{"schema": 0}', b"\xff\xfe"])
def test_unreadable_result_is_moved_aside(
    workspace: Workspace, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workspace.run(*RTN) == 0
    good = metrics(workspace)
    (workspace.cells()[0] / "result.json").write_bytes(damage)
    assert workspace.run(*RTN) == 0
    assert "moved to" in capsys.readouterr().out
    assert (workspace.cells()[0] / "result.json.damaged-1").read_bytes() == damage
    assert metrics(workspace) == good


def test_damaged_artefact_is_moved_aside(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*RTN) == 0
    good = metrics(workspace)
    (file,) = (workspace.results / "artefacts").glob("weights-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    (workspace.cells()[0] / "result.json").unlink()
    assert workspace.run(*RTN) == 0
    assert file.name in capsys.readouterr().out
    assert file.with_name(f"{file.name}.damaged-1").exists()
    assert metrics(workspace) == good


def break_evaluation(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    def broken(*_: Any) -> float:
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not terminated")
        raise error

    monkeypatch.setattr(language, "window_losses", broken)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (None, 143)])
def test_interruption(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int
) -> None:
    with monkeypatch.context() as patch:
        break_evaluation(patch, error)
        try:
            assert workspace.run(*RTN) == code
        except SystemExit as stop:
            assert stop.code == code
    assert states(workspace) == ["interrupted"]
    assert workspace.run(*RTN) == 0
    assert states(workspace) == ["complete"]


def test_failed_cell_is_recorded_and_the_sweep_goes_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        break_evaluation(patch, QuantizationError("layer 3: not finite"))
        assert workspace.run("-m", "quantizer=rtn", "bits=w3,w4") == 1
    assert states(workspace) == ["failed", "failed"]
    status = json.loads((workspace.cells()[0] / "status.json").read_text())
    assert status["error"] == "layer 3: not finite"
    assert "Traceback" in status["traceback"]
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "2 failed" in shown.out
    assert workspace.run("-m", "quantizer=rtn", "bits=w3,w4") == 0


def test_on_error_raise_stops_the_sweep(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    break_evaluation(monkeypatch, QuantizationError("layer 3: not finite"))
    assert workspace.run("-m", "quantizer=rtn", "bits=w3,w4", "on_error=raise") == 1
    assert states(workspace) == ["failed"]


def test_local_launcher_runs_cells_in_processes(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert workspace.run("-m", "quantizer=rtn", "bits=w3,float", "hydra/launcher=local") == 2
    assert states(workspace) == ["complete"]
    assert "1 complete, 1 failed" in capsys.readouterr().out


def test_nothing_is_written_outside_results(workspace: Workspace, tmp_path: Path) -> None:
    before = set(ROOT.iterdir())
    assert workspace.run(*RTN) == 0
    assert {p for p in ROOT.iterdir() if p.name not in (".ruff_cache", ".mypy_cache", ".pytest_cache")} <= before
    assert {p.name for p in workspace.results.iterdir()} == {"cells", "artefacts", "logs"}
