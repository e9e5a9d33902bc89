"""Language models: texts, perplexity, and what is checked before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bc import models
from bc.errors import UserError
from bc.evaluation import check_vocabulary, evaluate_perplexity, perplexity_of, window_losses
from bc.pipeline import Engine
from experiments import hub
from experiments.config import CellConfig
from experiments.data import TextData
from experiments.tasks import Samples, Scores, SelectionScore

POSITION_FIELDS = ("max_position_embeddings", "n_positions")  # a model without either has no limit of its own


def texts_of(cell: CellConfig) -> TextData:
    """The cell's texts."""
    assert isinstance(cell.data, TextData)
    return cell.data


class LanguageTask:
    """See :class:`experiments.tasks.Task`."""

    def check(self, cell: CellConfig) -> None:
        """Texts are there, the model is there, or the hub answers; windows fit the model's positions.

        Raises:
            UserError: The first thing that is wrong.
        """
        from bc.data import text

        paths = texts_of(cell).paths
        for dataset, role in texts_needed(cell):
            text.check(dataset, role, paths)
        target, revision, gguf = models.locate(cell.model.name, cell.model.path)
        missing = [text.where_from(name) for name, role in texts_needed(cell) if not text.is_here(name, role, paths)]
        if gguf is None and not Path(target).is_dir() and not hub.has_weights(target, revision):
            missing.insert(0, f"the model {target} (model.path)")
        hub.require(missing)
        check_windows(cell, positions(target, revision) if gguf is None else positions_in_gguf(gguf))

    def samples(self, cell: CellConfig) -> Samples:
        """Tokenize the texts that a cell needs.

        Raises:
            UserError: A text is missing or too short, or the tokenizer gives ids that the model does not know.
        """
        from bc.data import text

        data, seed = texts_of(cell), cell.seed
        tokenizer = models.load_tokenizer(cell.model.name, path=cell.model.path)
        out = Samples()
        if not cell.is_float:
            c, count = data.calibration, data.selection.samples
            out.calibration = text.calibration_windows(c.dataset, tokenizer, c.samples, c.window, seed, data.paths)
            out.fit = out.calibration
            if count:
                out.selection = text.selection_windows(c.dataset, tokenizer, count, c.window, seed, data.paths)
        e = data.evaluation
        for dataset in e.datasets:
            out.test[dataset] = text.test_windows(dataset, tokenizer, e.window, e.limit, data.paths)
        check_tokenizer(cell, out)
        return out

    def load(self, cell: CellConfig) -> nn.Module:
        """The float model."""
        m = cell.model
        return models.load(m.name, path=m.path, dtype=m.dtype, attention=m.attention)

    def evaluate(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> Scores:
        """Perplexity of every test text, and the cross-entropy of each window."""
        scores = Scores()
        for dataset, windows in samples.test.items():
            losses = window_losses(model, windows, engine)
            value = {"metric": "perplexity", "value": perplexity_of(losses), "test_samples": len(losses)}
            scores.metrics.append({"dataset": dataset, **value})
            scores.outcomes[dataset] = losses
        return scores

    def selection_score(self, model: nn.Module, samples: Samples, engine: Engine, cell: CellConfig) -> SelectionScore:
        """Minus the perplexity of the selection windows."""
        windows = samples.selection
        assert windows is not None
        return lambda twin: (-evaluate_perplexity(twin, windows, engine),)


def texts_needed(cell: CellConfig) -> list[tuple[str, str]]:
    """Data set and role of every text that a cell reads."""
    data = texts_of(cell)
    roles = [] if cell.is_float else ["calibration", *(["selection"] if data.selection.samples else [])]
    needed = [(data.calibration.dataset, role) for role in roles]
    return needed + [(dataset, "test") for dataset in data.evaluation.datasets]


def check_windows(cell: CellConfig, longest: int | None) -> None:
    """Refuse windows that are longer than a model's positions."""
    data = texts_of(cell)
    windows = {"data.evaluation.window": data.evaluation.window}
    if not cell.is_float:
        windows["data.calibration.window"] = data.calibration.window
    for where, window in windows.items():
        if longest is not None and window > longest:
            raise UserError(
                f"{where}: {window} tokens are more than the {longest} positions of {cell.model.name}; "
                f"set {where}={longest} or less"
            )


def check_tokenizer(cell: CellConfig, samples: Samples) -> None:
    """Refuse ids beyond the model's vocabulary; a GGUF file holds model and tokenizer alike, so these fit."""
    target, revision, gguf = models.locate(cell.model.name, cell.model.path)
    known = None if gguf is not None else _configuration(target, revision).get("vocab_size")
    for ids in (samples.calibration, samples.selection, *samples.test.values()):
        if ids is not None:
            check_vocabulary(ids, known, f"model: the tokenizer of {cell.model.name!r} does not fit it")


def positions(target: str, revision: str) -> int | None:
    """Longest input of a model, from its configuration alone; None where it sets no limit."""
    config = _configuration(target, revision)
    found = [config[name] for name in POSITION_FIELDS if isinstance(config.get(name), int)]
    return found[0] if found else None


def positions_in_gguf(path: Path) -> int | None:
    """Longest input of a model, from a GGUF file's header; None where it names none.

    Raises:
        UserError: The file cannot be read as GGUF.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"model.path: {str(path)!r} cannot be read as GGUF ({error}); give another file, or a folder"
        ) from error
    found = [field for name, field in fields.items() if name.endswith(".context_length")]
    return int(found[0].contents()) if found else None


def _configuration(target: str, revision: str) -> dict[str, Any]:
    local = Path(target) / "config.json"
    if local.is_file():
        values: dict[str, Any] = json.loads(local.read_text(encoding="utf8"))
        return values
    from transformers import AutoConfig

    try:
        loaded: dict[str, Any] = AutoConfig.from_pretrained(
            target, revision=revision, trust_remote_code=False
        ).to_dict()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model: {target!r} could not be reached ({reason}); "
            "set model.path to a local folder, or connect to the hub"
        ) from error
    return loaded
