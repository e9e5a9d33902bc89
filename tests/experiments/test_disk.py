"""Which folder and file an error of the disk is said to be of."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments import status, store, tables
from experiments.disk import disk_error
from tests.experiments.conftest import Workspace, assert_one_line

RTN = ("quantizer=rtn", "bits=w3", "bc=sink")


def forbid(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    """Make files unreadable, also for the superuser."""
    access, opened = os.access, Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path in paths:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in paths and access(path, mode))
    monkeypatch.setattr(Path, "open", refuse)


@pytest.mark.parametrize(
    ("number", "name", "forbidden", "start"),
    [
        (errno.EACCES, "results/.x", False, "results_dir: cannot be written"),
        (errno.EROFS, "results/there", False, "results_dir: cannot be written"),
        (errno.EACCES, "results/there", True, "cannot be read: "),
        (errno.EACCES, "data/there", True, "cannot be read: "),
        (errno.EACCES, "data/new", False, "cannot be written: "),
        (errno.ENOSPC, "results/new", False, "results_dir: no space left"),
        (errno.ENOSPC, "data/new", False, "no space left"),
        (errno.ENOTDIR, "results/there/cells", False, "results_dir: "),
    ],
)
def test_the_results_folder_is_blamed_for_what_is_written_there(
    tmp_path: Path, number: int, name: str, forbidden: bool, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("results", "data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "there").touch()
    if forbidden:
        forbid(monkeypatch, tmp_path / name)
    said = disk_error(OSError(number, "", str(tmp_path / name)), results=tmp_path / "results")
    assert said is not None and str(said).startswith(start), said
    assert disk_error(OSError(errno.ENOTDIR, "", str(tmp_path / "data" / "x")), results=tmp_path / "results") is None


def test_a_model_that_may_not_be_read_is_one_line(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workspace.shared / "llama", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    forbid(monkeypatch, config)
    assert workspace.run(*RTN, f"model.path={tmp_path / 'model'}") == 2
    assert_one_line(capsys, f"error: cannot be read: '{config}' (permission denied)")


@pytest.mark.parametrize("damage", ["forbidden", "folder", "metrics"])
def test_a_result_that_cannot_be_read_stops_nothing(
    workspace: Workspace,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert workspace.run("-m", *RTN[:2], "bc='off',sink") == 0
    path = workspace.cells()[0] / "result.json"
    old = {name: value for name, value in json.loads(path.read_text()).items() if name in store.BEFORE_CHECKSUMS}
    if damage == "forbidden":
        forbid(monkeypatch, path)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(json.dumps(old | {"metrics": [3]}))
    capsys.readouterr()
    assert status.main(["--results", str(workspace.results)]) == 0
    assert "2 cells: 1 complete, 1 failed" in capsys.readouterr().out
    assert len(list(store.all_results(workspace.results))) == 1
    assert f"warning: {path}: " in capsys.readouterr().out
    assert tables.main(["demo", "--results", str(workspace.results)]) == 0


def test_results_that_are_a_file_are_one_line(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.results.write_text("")
    for program, arguments in ((status.main, []), (tables.main, ["demo"])):
        assert program([*arguments, "--results", str(workspace.results)]) == 2
        assert_one_line(capsys, f"error: --results: '{workspace.results}' is not a folder")
    assert workspace.run(*RTN) == 2
    assert_one_line(capsys, "error: results_dir: ")
