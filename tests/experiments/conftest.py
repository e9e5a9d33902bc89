"""A workspace with tiny models and texts, and the command line run inside the test's process."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments.run import main
from tests.conftest import MAKERS, VOCABULARY, tiny_model

WINDOW = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *LETTERS]
    names += [f"<{i}>" for i in range(VOCABULARY - len(names))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def make_text(seed: int, lines: int) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices(LETTERS[:26], k=draw.randint(2, 7))) for _ in range(60)]
    return "\n".join(" ".join(draw.choices(words, k=10)) + " ." for _ in range(lines))


@dataclass
class Workspace:
    """Where a test's models, texts and results lie."""

    shared: Path
    results: Path

    def arguments(self, model: str = "llama", *more: str) -> list[str]:
        """Overrides that make a run tiny."""
        return [
            "model=custom",
            f"model.name=tiny_{model}",
            f"model.path={self.shared / model}",
            f"data.paths.wikitext2={self.shared / 'text'}",
            "data.calibration.dataset=wikitext2",
            "data.calibration.samples=8",
            f"data.calibration.window={WINDOW}",
            "data.selection.samples=4",
            "data.evaluation.datasets=[wikitext2]",
            f"data.evaluation.window={WINDOW}",
            "data.evaluation.limit=8",
            "report.calibration_samples=2",
            "report.held_out_samples=2",
            "engine.device=cpu",
            "engine.threads=1",  # two threads on tiny matrices only wait for each other
            "logger=none",
            f"results_dir={self.results}",
            *more,
        ]

    def run(self, *more: str, model: str = "llama") -> int:
        """Run the command line in this process."""
        return main(self.arguments(model, *more))

    def cells(self) -> list[Path]:
        """Folders of cells, by name."""
        return sorted((self.results / "cells").glob("*"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    for name in MAKERS:
        tiny_model(name).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    text = folder / "text"
    text.mkdir()
    for number, split in enumerate(("train", "valid", "test")):
        (text / f"wiki.{split}.raw").write_text(make_text(number, 60))
    return folder


@pytest.fixture
def workspace(shared: Path, tmp_path: Path) -> Workspace:
    return Workspace(shared, tmp_path / "results")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """A mistake was told in one line on standard error that holds these parts."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(part in lines[0] for part in parts), lines[0]
