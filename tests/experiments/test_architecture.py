"""Imports run one way, and only one file names a kind of accelerator."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bc").rglob("*.py")) + sorted((ROOT / "experiments").rglob("*.py"))
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "bc")]
FORBIDDEN = {"hydra", "omegaconf", "wandb", "experiments", "conf"}
DEVICE = ROOT / "bc" / "device.py"


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def docstrings(tree: ast.AST) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            found.add(id(node.body[0].value))
    return found


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_library_knows_nothing_of_the_runner(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))} & FORBIDDEN


@pytest.mark.parametrize("path", [p for p in FILES if p != DEVICE], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_names_cuda(path: Path) -> None:
    tree = ast.parse(path.read_text())
    prose = docstrings(tree)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Attribute) and node.attr == "cuda"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            assert not re.match(r"cuda(:|$)", node.value), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400
