"""Where results lie: on the command line, below the user's own folder, in this machine's settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import figures, status, tables
from tests.experiments.conftest import Workspace, assert_one_line

ROOT = Path(__file__).parents[2]
RTN = ("quantizer=rtn", "bits=w3", "bc=sink")


@pytest.mark.parametrize("given", ["~/results", "'~/results'"])
def test_the_users_own_folder(
    workspace: Workspace,
    tmp_path: Path,
    given: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert Workspace(workspace.shared, Path(given)).run(*RTN) == 0
    assert not (tmp_path / "~").exists()
    assert len(workspace.cells()) == 1 and (workspace.results / "logs").is_dir()
    capsys.readouterr()
    assert status.main(["--results", "~/results"]) == 0
    assert "1 cells: 1 complete" in capsys.readouterr().out


def test_commands_that_read_take_what_a_run_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"results_dir={tmp_path / 'here'}"
    assert tables.main(["demo", "seed=0", given]) == 0
    assert (tmp_path / "here" / "tables" / "demo.md").is_file()
    capsys.readouterr()
    assert figures.main(["demo", given]) == 2  # it is read: it has no rows
    assert_one_line(capsys, "demo")
    assert tables.main(["demo", given, "--results", str(tmp_path / "here")]) == 0
    capsys.readouterr()
    assert tables.main(["demo", given, "--results", str(tmp_path / "there")]) == 2
    assert_one_line(capsys, "--results: ", "several folders")
    assert tables.main(["demo", "results_dir="]) == 2
    assert_one_line(capsys, "results_dir: '' is not a folder name")


def test_this_machines_own_settings(tmp_path: Path) -> None:
    """Runs and the commands that read honour them; a file without its first line is refused."""
    for name in ("bc", "experiments", "hydra_plugins"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    local = tmp_path / "conf" / "local" / "default.yaml"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        line = [sys.executable, "-m", *arguments]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    local.write_text("# @package _global_\nresults_dir: mine\n")
    done = command("experiments.tables", "demo")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "tables" / "demo.md").is_file() and not (tmp_path / "results").exists()
    local.write_text("results_dir: mine\n")
    for arguments in (["experiments.status"], ["experiments.run", "model=tiny_vit", "data=embedded_vision"]):
        done = command(*arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: conf/local/default.yaml: lacks its first line, '# @package _global_'")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which none can be made")
def test_a_folder_that_cannot_be_made(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert Workspace(workspace.shared, Path("/proc/none")).run(*RTN) == 2
    assert_one_line(capsys, "results_dir: '/proc/none' cannot be made (no such file", "set results_dir to a folder")
