"""Weights & Biases mirrors results, offline by default, and never fails a cell."""

from __future__ import annotations

import json
from typing import Any

import pytest
import wandb

from tests.experiments.conftest import Workspace

CELL = ("quantizer=rtn", "bits=w3", "bc=sink", "logger=wandb")


def result(workspace: Workspace) -> dict[str, Any]:
    (folder,) = workspace.cells()
    value: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return value


def test_offline_run_is_written(workspace: Workspace) -> None:
    assert workspace.run(*CELL) == 0
    (run,) = (workspace.results / "wandb").glob("offline-run-*")
    digits = result(workspace)["cell"]
    assert run.name.endswith(digits)
    assert (run / f"run-{digits}.wandb").stat().st_size > 0


def test_what_is_mirrored(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, Any] = {}
    logged: list[dict[str, Any]] = []

    class Run:
        summary: dict[str, Any] = {}  # noqa: RUF012
        finished: int | None = None

        def log(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def finish(self, exit_code: int) -> None:
            Run.finished = exit_code

    monkeypatch.setattr(wandb, "init", lambda **settings: opened.update(settings) or Run())
    assert workspace.run(*CELL, "logger.tags=[mine]") == 0
    stored = result(workspace)
    assert opened["id"] == stored["cell"]
    assert opened["group"] == "adhoc"
    assert opened["mode"] == "offline"
    assert opened["config"] == stored["config"]
    assert {"tiny_llama", "rtn", "w3", "bc-sink", "seed-0", "mine"} == set(opened["tags"])
    assert logged[0] == {"perplexity/wikitext2": stored["metrics"][0]["value"]}
    assert len(logged[1]["sites"].data) == 3 * 7
    assert json.loads(Run.summary["result_json"]) == stored
    assert Run.finished == 0


def test_failure_does_not_fail_the_cell(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no such entity")

    monkeypatch.setattr(wandb, "init", refuse)
    assert workspace.run(*CELL) == 0
    assert "warning: W&B: no such entity" in capsys.readouterr().out
    assert result(workspace)["metrics"]


def test_failure_while_logging_does_not_fail_the_cell(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    assert workspace.run(*CELL) == 0
    assert result(workspace)["metrics"]
