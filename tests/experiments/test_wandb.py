"""Uploads to Weights & Biases: later, in the background, to a server that answers, hangs or refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bc.errors import QuantizationError
from experiments import language, tables, wandb_sync
from experiments.run import main, tidy
from tests.experiments import faulty
from tests.experiments.conftest import Workspace
from tests.experiments.fake_wandb import serve

CELL = ("quantizer=rtn", "bits=w3", "bc=sink", "logger=wandb")
ONLINE = (*CELL, "logger.mode=online")
KEY = "local-" + "0" * 40


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client's account, and an end to whatever uploads a test has started."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ENTITY", "me")
    before = len(wandb_sync._started)
    yield
    for process in wandb_sync._started[before:]:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        finally:
            process.wait()


def result(workspace: Workspace) -> dict[str, Any]:
    (folder,) = workspace.cells()
    value: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return value


def log_of(workspace: Workspace) -> str:
    return (workspace.results / "logs" / wandb_sync.LOG).read_text()


def test_offline_runs_are_uploaded_later(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.run(*CELL) == 0
    with serve() as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        assert backend.requests == []
        assert wandb_sync.main(["--results", str(workspace.results)]) == 0
        stored = result(workspace)
        (name,) = backend.runs
        assert name == stored["cell"]
        assert backend.runs[name]["project"] == "bias-compensation"
        assert backend.runs[name]["groupName"] == "adhoc"
        assert json.loads(backend.runs[name]["summary"]["result_json"]) == stored
        count = len(backend.requests)
        assert wandb_sync.main(["--results", str(workspace.results)]) == 0
        assert len(backend.requests) == count


def test_a_cell_that_ran_again_is_one_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)

        def fail() -> None:
            with monkeypatch.context() as patch:
                patch.setattr(language, "window_losses", lambda *_: (_ for _ in ()).throw(QuantizationError("no")))
                assert workspace.run(*CELL) == 1

        fail()
        assert wandb_sync.main(["--results", str(workspace.results)]) == 0
        (name,) = backend.runs
        assert backend.runs[name]["summary"]["error"] == "no"
        fail()
        fail()
        assert len(wandb_sync.waiting_runs(workspace.results)) == 1  # the last attempt's
        assert workspace.run(*CELL) == 0
        assert wandb_sync.main(["--results", str(workspace.results)]) == 0
        assert list(backend.runs) == [name] == [result(workspace)["cell"]]
        assert json.loads(backend.runs[name]["summary"]["result_json"]) == result(workspace)


def test_online_uploads_when_the_cell_has_ended(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        assert workspace.run(*ONLINE) == 0
        (upload,) = wandb_sync._started[-1:]
        assert upload.wait(faulty.PATIENCE) == 0, log_of(workspace)
        assert json.loads(backend.runs[result(workspace)["cell"]]["summary"]["result_json"]) == result(workspace)
        assert wandb_sync.waiting_runs(workspace.results) == []


def test_a_server_that_hangs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(hang=True) as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        assert workspace.run(*ONLINE) == 0
        assert result(workspace)["metrics"]
        (upload,) = wandb_sync._started[-1:]
        faulty.wait_until(lambda: backend.requests)
        assert upload.poll() is None  # it waits for an answer, and nobody waits for it
        assert workspace.run(*ONLINE[:-1], "logger.mode=online", "seed=1") == 0
        assert len(wandb_sync.waiting_runs(workspace.results)) == 2


def test_a_server_that_refuses(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert workspace.run(*ONLINE) == 0
        assert result(workspace)["metrics"]
        assert len(wandb_sync.waiting_runs(workspace.results)) == 1


def test_uploads_give_up_and_never_queue(
    workspace: Workspace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workspace.run(*CELL) == 0
    with serve(hang=True) as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        assert wandb_sync.upload(workspace.results, 1.0) == 1
        assert "no answer within 1 s; `make wandb-sync` tries again" in capfd.readouterr().out
    with wandb_sync._turn(workspace.results, wait=True) as first:
        assert first
        with wandb_sync.FileLock(workspace.results / "wandb" / ".line.lock"):
            assert wandb_sync.main(["--results", str(workspace.results), "--background"]) == 0
    assert len(wandb_sync.waiting_runs(workspace.results)) == 1


def test_a_cell_that_is_being_run_is_not_uploaded(workspace: Workspace, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    fault = {"place": "evaluating", "when": ["quantizer=rtn"], "flag": flag}
    sweep = faulty.start(tidy(workspace.arguments("llama", *CELL)), fault)
    try:
        faulty.wait_until(flag.exists, sweep)
        assert list((workspace.results / "wandb").glob("offline-run-*"))
        assert wandb_sync.waiting_runs(workspace.results) == []
    finally:
        sweep.kill()
        sweep.communicate()
    assert len(wandb_sync.waiting_runs(workspace.results)) == 1


def test_disabled_writes_nothing(workspace: Workspace) -> None:
    assert workspace.run(*CELL, "logger.mode=disabled") == 0
    assert not (workspace.results / "wandb").exists()


def test_the_table_from_wandb_is_the_table_from_files(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, by way of the client: uploaded runs give the cells.csv that the result files give."""
    run = [a for a in workspace.arguments("llama", "data=llm") if not a.startswith(("results_dir", "logger"))]
    assert (
        main(["+experiment=table2_embedded", "cell=0,2", *run, f"results_dir={workspace.results}", "logger=wandb"]) == 0
    )
    assert len(workspace.cells()) == 2
    other = tmp_path / "other"
    with serve() as backend:
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        assert wandb_sync.main(["--results", str(workspace.results)]) == 0
        for results, source in ((workspace.results, "files"), (other, "wandb")):
            arguments = ["table2_embedded", *run, "--results", str(results), "--from", source]
            assert tables.main(arguments) == 0
    assert (other / "cells.csv").read_bytes() == (workspace.results / "cells.csv").read_bytes()
    assert (other / "tables" / "table2_embedded.md").read_bytes() == (
        workspace.results / "tables" / "table2_embedded.md"
    ).read_bytes()
