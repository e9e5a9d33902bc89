"""Tables, figures and status of an experiment that was run, and of one that was not."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import figures, status, tables, wandb_logger
from experiments.compose import load_experiment
from experiments.records import COLUMNS, merge, read_rows, write_rows
from experiments.render import ours
from experiments.run import main
from experiments.store import try_lock
from tests.committed import ROOT
from tests.experiments.conftest import Workspace, assert_one_line


def tiny(workspace: Workspace) -> list[str]:
    return [a for a in workspace.arguments("llama", "data=llm") if not a.startswith("results_dir")]


@pytest.fixture(scope="module")
def demo(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """The demo's cells on a tiny model, at two seeds."""
    workspace = Workspace(shared, tmp_path_factory.mktemp("demo") / "results")
    assert main(["+experiment=demo", "seed=0,1", *workspace.arguments("llama", "data=llm")]) == 0
    yield workspace


def copy(workspace: Workspace, folder: Path) -> Workspace:
    shutil.copytree(workspace.results, folder / "results", ignore=shutil.ignore_patterns("artefacts", "logs"))
    return Workspace(workspace.shared, folder / "results")


def build(workspace: Workspace, *more: str) -> int:
    return tables.main(["demo", *tiny(workspace), "--results", str(workspace.results), *more])


def test_cells_csv(demo: Workspace, tmp_path: Path) -> None:
    workspace = copy(demo, tmp_path)
    assert build(workspace) == 0
    first = (workspace.results / "cells.csv").read_bytes()
    rows = read_rows(workspace.results / "cells.csv")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(demo.cells()) == 15
    assert {row["seed"] for row in rows} == {"0", "1"}
    for row in rows:
        folder = next(c for c in demo.cells() if c.name.endswith(row["cell"][:8]))
        assert float(row["value"]) == json.loads((folder / "result.json").read_text())["metrics"][0]["value"]
        assert row["experiment"] == "demo"
        assert row["commit"]
    assert build(workspace) == 0
    assert (workspace.results / "cells.csv").read_bytes() == first


def test_cells_of_other_experiments_count_where_they_are_listed(demo: Workspace) -> None:
    """Those run for another experiment do at the seeds that this one lists, and at no other."""
    results = [json.loads((folder / "result.json").read_text()) for folder in demo.cells()]
    _, runs = load_experiment("demo", tiny(demo))
    assert len(tables.new_results(runs, results, "demo")) == 15
    for result in results:
        result["provenance"]["experiment"] = "other"
    listed = tables.new_results(runs, results, "demo")
    assert len(listed) == 8 and {result["label"]["seed"] for result in listed} == {0}


def test_table_from_a_fresh_clone(demo: Workspace, tmp_path: Path) -> None:
    workspace = copy(demo, tmp_path)
    assert build(workspace) == 0
    formats = {p.suffix: p.read_bytes() for p in (workspace.results / "tables").glob("demo.*")}
    assert set(formats) == {".md", ".tex", ".csv", ".html"}
    rows = (workspace.results / "cells.csv").read_bytes()
    shutil.rmtree(workspace.results / "cells")
    shutil.rmtree(workspace.results / "tables")
    assert build(workspace) == 0
    assert (workspace.results / "cells.csv").read_bytes() == rows
    assert {p.suffix: p.read_bytes() for p in (workspace.results / "tables").glob("demo.*")} == formats


def test_table_shows_seeds_and_storage(demo: Workspace, tmp_path: Path) -> None:
    workspace = copy(demo, tmp_path)
    assert build(workspace) == 0
    text = (workspace.results / "tables" / "demo.md").read_text()
    assert text.count("(n=2)") == 7
    with (workspace.results / "tables" / "demo.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 8
    quantized = [line for line in lines if line["quantizer"] != "none"]
    assert all(float(line["deviation"]) >= 0 and line["seeds"] == "2" for line in quantized)
    assert float(lines[0]["bits_per_weight"]) == pytest.approx(32, rel=0.1)
    sink = next(line for line in quantized if line["bc"] == "sink")
    assert float(sink["bias_parameters"]) > 0
    assert "\\bottomrule" in (workspace.results / "tables" / "demo.tex").read_text()


def test_missing_cells_say_why(demo: Workspace, tmp_path: Path) -> None:
    workspace = copy(demo, tmp_path)
    for folder in workspace.cells():
        if "-rtn-w4-off-" in folder.name:
            shutil.rmtree(folder)
        if "-gptq-w3-sink-" in folder.name:
            (folder / "result.json").unlink()
            error = f"data.paths.c4: nothing there; {'set it, ' * 40}or leave it"
            (folder / "status.json").write_text(json.dumps({"state": "failed", "error": error}))
    assert build(workspace) == 0
    text = (workspace.results / "tables" / "demo.md").read_text()
    assert "| not run |" in text
    assert f"| no data: data.paths.c4: nothing there; {'set it, ' * 14}set" in text and "it, … |" in text
    with (workspace.results / "tables" / "demo.csv").open() as stream:
        assert f"no data: {error}" in {line["missing"] for line in csv.DictReader(stream)}


def test_published_values_stand_beside_ours(tmp_path: Path) -> None:
    assert tables.main(["table2", "--results", str(tmp_path)]) == 0
    with (tmp_path / "tables" / "table2.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    published = Path(__file__).parents[2] / "results" / "published" / "table2_llm.csv"
    with published.open() as stream:
        printed = [float(row["value"]) for row in csv.DictReader(stream)]
    assert sorted(float(line["published"]) for line in lines) == sorted(printed)
    assert {line["missing"] for line in lines} == {"not run"}


def test_difference_from_published() -> None:
    line = tables.Line(None, "c4", [3.0, 5.0], published=tables.Published(3.5, ""))  # type: ignore[arg-type]
    assert line.mean == 4
    assert line.difference == 0.5
    assert line.deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("values", "listed", "shown"),
    [
        ([3.0, 5.0], 2, "4.00 ± 1.41 (n=2)"),
        ([3.0, 5.0], 1, "4.00 ± 1.41 (n=2)"),  # more seeds than the experiment lists by itself
        ([3.0, 5.0], 5, "4.00 ± 1.41 (n=2 of 5)"),
        ([3.0], 3, "3.00 (n=1 of 3)"),
        ([3.0], 1, "3.00"),
        ([], 3, "not run"),
    ],
)
def test_a_mean_over_fewer_seeds_than_listed_says_so(values: list[float], listed: int, shown: str) -> None:
    assert ours(tables.Line(None, "c4", values, missing="not run", listed=listed)) == shown  # type: ignore[arg-type]


def test_rows_without_files_stay(tmp_path: Path) -> None:
    old = dict.fromkeys(COLUMNS, "0") | {"experiment": "other", "cell": "aa", "w_bits": "10"}
    new = dict.fromkeys(COLUMNS, "0") | {"experiment": "other", "cell": "bb", "w_bits": "9"}
    write_rows(tmp_path / "cells.csv", [old])
    merged = merge(read_rows(tmp_path / "cells.csv"), [new, old | {"value": "0.1"}])
    assert [row["cell"] for row in merged] == ["bb", "aa"]
    assert merged[1]["value"] == "0.1"


def test_foreign_cells_csv_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.csv").write_text("a,b\n1,2\n")
    assert tables.main(["demo", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert (tmp_path / "cells.csv").read_text() == "a,b\n1,2\n"


GOOD = dict.fromkeys(COLUMNS, "0") | {"experiment": "other", "calibration_samples": "", "value": "inf"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: f"{text}<<<<<<< HEAD\n", "line 3: it has not 31 fields"),
        (lambda text: text + text.splitlines()[1] + ",0\n", "line 3: it has not 31 fields"),
        (lambda text: text.replace("inf", "many"), "line 2: value 'many' is not a number"),
        (lambda text: text.replace("inf", ""), "line 2: value '' is not a number"),
        (lambda text: text.replace(",inf,0,0,", ",inf,0,0.5,"), "line 2: seed '0.5' is not a number"),
        (lambda text: f"<<<<<<< HEAD\n{text}", "its columns are not those of cells.csv"),
        (lambda text: text.replace("other", "\udcff"), "codec can't decode"),
    ],
)
def test_a_damaged_cells_csv_is_refused(
    tmp_path: Path, damage: Callable[[str], str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.csv"
    write_rows(path, [GOOD])
    assert read_rows(path) == [GOOD]
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    before = path.read_bytes()
    assert tables.main(["demo", "--results", str(tmp_path)]) == 2
    assert_one_line(capsys, str(path), said, "restore the file from version control")
    assert path.read_bytes() == before


def test_two_tables_at_once_lose_no_rows(demo: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else comes in between reading and writing."""
    workspace, free = copy(demo, tmp_path), []

    def probed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with try_lock(workspace.results / tables.LOCK, 0) as was_free:
                free.append(was_free)
            return function(*arguments)

        return call

    for name in ("read_rows", "write_rows", "write_scores"):
        monkeypatch.setattr(tables, name, probed(getattr(tables, name)))
    assert build(workspace) == 0
    assert free == [False] * 3


def test_unknown_experiment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for program in (tables.main, status.main, figures.main):
        assert program(["tabel2", "--results", str(tmp_path)]) == 2
        assert "did you mean 'table2'" in capsys.readouterr().err


def test_from_wandb(demo: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [json.loads((c / "result.json").read_text()) for c in demo.cells()]

    class Run:
        def __init__(self, result: dict[str, Any]) -> None:
            self.id, self.summary = result["cell"], {wandb_logger.RESULT_KEY: json.dumps(result)}

    class Api:
        def runs(self, project: str) -> list[Run]:
            assert project == "bias-compensation"
            return [Run(result) for result in results]

    import wandb

    monkeypatch.setattr(wandb, "Api", Api)
    mirrored = Workspace(demo.shared, tmp_path / "mirrored")
    assert build(mirrored, "--from", "wandb") == 0
    local = copy(demo, tmp_path)
    assert build(local) == 0
    assert (mirrored.results / "cells.csv").read_bytes() == (local.results / "cells.csv").read_bytes()


def test_figure(demo: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = copy(demo, tmp_path)
    arguments = ["demo", *tiny(workspace), "--results", str(workspace.results)]
    assert figures.main(arguments) == 2
    assert "has no value" in capsys.readouterr().err
    assert build(workspace) == 0
    assert figures.main(arguments) == 0
    assert {p.suffix for p in (workspace.results / "figures").iterdir()} == {".png", ".svg"}


def test_status(demo: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = copy(demo, tmp_path)
    first, second, third, fourth = [c for c in workspace.cells() if "-s0-" in c.name][:4]
    shutil.rmtree(first)
    for folder, content in ((second, "failed"), (third, "running"), (fourth, "interrupted")):
        (folder / "result.json").unlink()
        record = {"state": content, "error": "the last line", "host": "node7", "pid": 1, "started": "now"}
        (folder / "status.json").write_text(json.dumps(record))
    (third / ".lock").touch()
    assert status.main(["demo", *tiny(workspace), "--results", str(workspace.results)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[1]: line for line in lines[:-1]}
    assert found[first.name].startswith("waiting")
    assert found[second.name].startswith("failed") and found[second.name].endswith("the last line")
    assert found[third.name].startswith("interrupted") and "node7" in found[third.name]
    assert found[fourth.name].startswith("interrupted")
    assert lines[-1] == "8 cells: 4 complete, 1 failed, 2 interrupted, 1 waiting"
    assert status.main(["--results", str(workspace.results)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("14 cells")
    assert status.main(["--results", str(tmp_path / "nothing")]) == 0
    assert "no cells yet" in capsys.readouterr().out


def test_no_two_rows_of_a_committed_csv_are_the_same_setting() -> None:
    """Whatever cells differ in is a column: all but the numbers tells every row from the others."""
    numbers = ("published", "ours", "deviation", "difference", "bits_per_weight", "bias_parameters", "missing", "note")
    for path in sorted((ROOT / "results" / "tables").glob("*.csv")):
        if "_paired" in path.stem:
            continue
        table = pd.read_csv(path, dtype=str)
        assert {"test_samples", "limit", "offset"} <= set(table)
        keys = table.drop(columns=[*numbers])
        assert not keys.duplicated().any(), (path.name, keys[keys.duplicated(keep=False)])
