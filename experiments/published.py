"""The paper's printed values, to stand beside ours."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bc import models, vision
from bc.errors import UserError
from bc.settings import Bits
from experiments.config import FLOAT, CellConfig
from experiments.identity import bc_name

# how the paper's tables print what we call otherwise
METHODS = {
    "none": ("FP16", "FP32"),
    "rtn": ("RTN",),
    "gptq": ("GPTQ",),
    "awq": ("AWQ",),
    "billm": ("BiLLM",),
    "base_ptq": ("Base PTQ",),
    "easyquant": ("EasyQuant",),
    "ptq4vit": ("PTQ4ViT",),
    "apq_vit": ("APQ-ViT",),
    "noisyquant": ("NoisyQuant",),
    "repq_vit": ("RepQ-ViT",),
}
# options that a quantizer's printed values are of; its other variants have none
VARIANTS = {"noisyquant": {"base": "ptq4vit"}}
BITS = {"billm": "2-order binary"}
MODELS = {"huggyllama/llama-7b": "LLaMA-7B (checkpoint not named)"}
METRICS = {"perplexity": "ppl", "top1": "top1"}
WITH_BC = "+BC"


def method_name(quantizer: str) -> str:
    """A quantizer's name as the papers print it."""
    return METHODS.get(quantizer, (quantizer,))[0]


@dataclass(frozen=True)
class Published:
    """A printed value and the note that goes with it."""

    value: float
    note: str


class PublishedTable:
    """Values of one published table.

    Args:
        path: Its file; None for an experiment without published values.
    """

    def __init__(self, path: Path | None) -> None:
        self._values: dict[tuple[str, ...], Published] = {}
        if path is None:
            return
        if not path.is_file():
            raise UserError(f"experiment.published: no file {str(path)!r}; restore it from version control")
        with path.open(encoding="utf8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row["metric"] in METRICS.values():
                    names = ("method", "w_bits", "a_bits", "group", "model", "dataset", "metric")
                    key = tuple(row[name] for name in names)
                    self._values[key] = Published(float(row["value"]), row["note"])

    def __bool__(self) -> bool:
        return bool(self._values)

    def find(self, cell: CellConfig, dataset: str, metric: str) -> Published | None:
        """The printed value that a cell reproduces, if there is one."""
        names = cell.model.name, cell.quantizer, cell.bits, bc_name(cell)
        return self.look_up(*names, dataset, metric, cell.options)

    def look_up(
        self, model: str, quantizer: str, bits: Bits, bc: str, dataset: str, metric: str, options: Mapping[str, Any]
    ) -> Published | None:
        """The printed value of a setting, given by the names that cells.csv uses."""
        printed = VARIANTS.get(quantizer, {})
        if bc not in ("off", "paper") or any(options.get(name) != value for name, value in printed.items()):
            return None
        vision_model = model in vision.catalogue()
        key = _vision_key(model, quantizer, bits) if vision_model else _language_key(model, quantizer, bits, dataset)
        if key is None:
            return None
        for method in METHODS.get(quantizer, ()):
            name = method + (WITH_BC if bc == "paper" else "")
            if (name, *key, METRICS[metric]) in self._values:
                return self._values[name, *key, METRICS[metric]]
        return None


def _language_key(model: str, quantizer: str, bits: Bits, dataset: str) -> tuple[str, ...] | None:
    """Bits, group, model and data set as the tables of language models have them."""
    source = models.catalogue().get(model)
    if source is None:
        return None
    grouped = quantizer != FLOAT and quantizer not in BITS
    group, weight = str(bits.group_size) if grouped else "", BITS.get(quantizer, str(bits.weight))
    label = MODELS.get(source.repo, source.repo)
    if label in MODELS.values():  # the paper's LLaMA rows agree with the new protocols, under the old names
        dataset = dataset.removesuffix("_new")
    return weight, "16", group, label, dataset


def _vision_key(model: str, quantizer: str, bits: Bits) -> tuple[str, ...] | None:
    """Bits, group, model and data set as the table of vision models has them."""
    source = vision.catalogue().get(model)
    if source is None or not source.label:
        return None
    weight, activation = ("32", "32") if quantizer == FLOAT else (str(bits.weight), str(bits.activation))
    return weight, activation, "", source.timm.partition(".")[0], "imagenet1k_val"
