"""The commands of the README and of docs/ are what the programs take; those marked ``<!-- run -->`` are run."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from experiments import costs
from experiments.compose import compose_cell, compose_run, expand, experiment_names, hydra_ready, sweep_points
from experiments.export import ExportConfig
from experiments.generate import GenerateConfig
from experiments.run import tidy
from tests.committed import committed

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = ("python", ".venv/bin/python")
OTHER_PROGRAMS = {"git", "cd", "export", ".venv/bin/hf", ".venv/bin/wandb", "source", ".ci/run"}
BLOCK = re.compile(r"(<!-- run -->\n)?^```(?:bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEY_VALUE = {"experiments.generate": GenerateConfig, "experiments.export": ExportConfig}


def commands(text: str) -> Iterator[tuple[bool, list[str]]]:
    """Every command of the fenced shell blocks, as words, and whether it is to be run."""
    for marked, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                if words := shlex.split(part, comments=True):
                    yield bool(marked), words


FOUND = [(page.name, run, words) for page in PAGES for run, words in commands(page.read_text("utf8"))]


@cache
def verbs() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE))


def name_of(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("page", "words"), [(page, words) for page, _, words in FOUND], ids=name_of)
def test_command_is_understood(page: str, words: list[str]) -> None:
    if words[0] == "make":
        check_make(words[1:])
    elif words[0] in PYTHON:
        assert words[1] == "-m", f"{page}: {words}"
        check_module(words[2], words[3:])
    else:
        assert words[0] in OTHER_PROGRAMS, f"{page}: {words[0]} is not known to this test"


def check_make(words: list[str]) -> None:
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    assert {word for word in words if "=" not in word} <= verbs()
    assert set(settings) <= {"EXPERIMENT", "LAUNCHER", "ARGS", "SUITE", "PYTHON", "VENV"}
    if "EXPERIMENT" in settings:
        assert settings["EXPERIMENT"] in experiment_names()
    if "LAUNCHER" in settings:
        assert (ROOT / "conf" / "hydra" / "launcher" / f"{settings['LAUNCHER']}.yaml").exists() or "mine" in words


@pytest.mark.parametrize(
    ("table", "arguments", "asked"),
    [
        ("1", "", "--imagenet '' --hub"),
        ("1", "data.paths.imagenet=/i data.evaluation.limit=500", "--imagenet '/i' --part --hub"),
        ("1", "'model.path=/models/$${model.name}.safetensors'", "--imagenet ''"),
        ("2", "model.path=/models/llama", "--hub"),
    ],
)
def test_a_table_asks_first_for_what_it_needs(table: str, arguments: str, asked: str) -> None:
    command = ["make", "--dry-run", f"reproduce-table{table}", f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"-m bc\.data (.*?) *\\?$", done.stdout, re.MULTILINE)
    assert found.split() == asked.split()
    assert f"+experiment=table{table}  {arguments.replace('$$', '$')}" in done.stdout


@pytest.mark.parametrize(("free", "said"), [("2999999", "note: 2 GB are free here; "), ("8000000", "")])
def test_a_disk_that_is_nearly_full_is_told_before_the_installation(free: str, said: str, tmp_path: Path) -> None:
    told = tmp_path / "df"
    told.write_text(f"#!/bin/sh\necho Filesystem\necho /dev/x 9999999 1 {free} 1% /\n", encoding="ascii")
    told.chmod(0o755)
    found_first = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [
        "make",
        "--no-print-directory",
        "setup",
        f"VENV={tmp_path / 'venv'}",
        "PYTHON=false",
    ]  # ends before anything is installed
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=found_first)
    assert done.returncode == 2 and "error: PYTHON=false is not Python 3.11" in done.stdout
    assert done.stdout.partition("error")[0].startswith(said) and ("note" in done.stdout) == bool(said)
    assert not (tmp_path / "venv").exists()


def test_the_models_of_table1_are_each_read_from_a_file_of_their_name() -> None:
    from hydra import compose

    files = "model.path=/models/${model.name}.safetensors"
    assert files in (ROOT / "conf" / "experiment" / "table1.yaml").read_text("utf8")
    with hydra_ready():
        section = compose("config", overrides=["+experiment=table1"]).experiment
        for number, name in ((0, "vit_s"), (9, "swin_b_384")):
            assert compose_cell(section, number, [files]).cell.model.path == f"/models/{name}.safetensors"


def check_module(module: str, arguments: list[str]) -> None:
    assert importlib.util.find_spec(module), module
    if module == "experiments.run":
        check_run(arguments)
    elif module in KEY_VALUE:
        assert {word.partition("=")[0] for word in arguments} <= set(KEY_VALUE[module].__annotations__)
    elif module in ("experiments.tables", "experiments.figures", "experiments.status", "experiments.compare"):
        assert {word for word in arguments if "=" not in word and "-" not in word} <= set(experiment_names())


def check_run(arguments: list[str]) -> None:
    """Compose the cells of a command; of an experiment, the first."""
    words = [word for word in tidy(arguments) if word not in ("-m", "--multirun")]
    if any(word.startswith("--") for word in words):
        return
    named = [word.partition("=")[2] for word in words if word.startswith("+experiment=")]
    overrides = [word for word in words if not word.startswith(("+experiment=", "hydra"))]
    with hydra_ready():
        for point in sweep_points(overrides):
            if not named:
                compose_run(point)
                continue
            from hydra import compose

            section = compose("config", overrides=[f"+experiment={named[0]}"]).experiment
            assert expand(section.cells)
            compose_cell(section, 0, point)


RUN = [words for _, run, words in FOUND if run]


@pytest.mark.parametrize("words", RUN, ids=name_of)
def test_command_runs(words: list[str], tmp_path: Path) -> None:
    assert words[0] == "python"
    where = {
        "experiments.run": [f"results_dir={tmp_path}", "logger=none", "engine.device=cpu", "engine.threads=1"],
        "experiments.status": ["--results", str(tmp_path)],
    }[words[2]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words[1:], *where]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_some_commands_are_run_and_many_checked() -> None:
    assert len(RUN) >= 3
    assert len(FOUND) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf8"), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")


def test_the_quick_start_in_python() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text("utf8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "quickstart.md", "exec"), names)
    assert names["report"].bits_per_weight > 4


def test_gains_in_the_protocol_are_the_published_ones() -> None:
    with (ROOT / "results" / "published" / "table1_vit.csv").open(encoding="utf8", newline="") as stream:
        values = {
            (row["method"], row["model"]): float(row["value"])
            for row in csv.DictReader(stream)
            if row["w_bits"] == row["a_bits"] == "4" and row["metric"] == "top1"
        }
    text = (ROOT / "docs" / "protocol.md").read_text("utf8")
    for model in ("vit_base_patch16_384", "vit_base_patch16_224"):
        assert f"{values['PTQ4ViT+BC', model] - values['PTQ4ViT', model]:.2f}" in text


def test_costs_are_those_of_the_committed_rows(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_bytes(committed("results/cells.csv"))
    assert costs.main(["--results", str(tmp_path)]) == 0
    made = (tmp_path / costs.NAME).read_bytes()
    assert made == committed(f"results/{costs.NAME}"), "run make report and commit what it writes"
