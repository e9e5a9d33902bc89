"""The literal protocols are oracles of our biases; the benchmarks run at their smallest size."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bc import quantizers, vision
from bc.chains import chain_of
from bc.compensation import compensation_of
from bc.install import install
from bc.pipeline import Engine, calibrate, compensate
from bc.settings import Bits, Compensation
from experiments.benchmarks import language, literal_bc_vision, literal_language, measure
from tests.bc.vision.conftest import make
from tests.conftest import VOCABULARY, tiny_model

ENGINE = Engine(torch.device("cpu"), 2)


@pytest.mark.parametrize("block_scope", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_language_biases_are_those_of_the_literal_protocol(name: str, block_scope: bool) -> None:
    model = tiny_model(name)
    ids = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w2")), None, ENGINE)
    twin, ours = copy.deepcopy(model), copy.deepcopy(model)
    for site in chain_of(twin).sites:
        install(site.module, results[site.name], torch.device("cpu"))
    names = [unit.name for unit in chain_of(model).units]
    found = literal_language.compensate(model, twin, names, ids, block_scope=block_scope)
    scope = ("layer", "block") if block_scope else ("layer",)
    compensate(ours, results, Compensation(scope, "positional", dtype="float32"), ids, ENGINE)
    for key, bias in found.items():
        child = compensation_of(ours.get_submodule(key))
        assert child is not None, key
        torch.testing.assert_close(child.bias, bias, atol=2e-5, rtol=1e-4)
    assert len(found) == len(results) + (len(names) if block_scope else 0)
    torch.testing.assert_close(ours(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "deit_distilled"])
def test_vision_biases_are_those_of_the_literal_protocol(kind: str) -> None:
    model, few = make(kind)
    model = vision.wrap(model)
    images = torch.randn(7, *few.shape[1:], generator=torch.Generator().manual_seed(1))
    results = calibrate(model, quantizers.create("minmax", Bits.parse("w4a4")), images, ENGINE)
    twin, ours = copy.deepcopy(model), copy.deepcopy(model)
    sites = chain_of(twin).sites
    for site in sites:
        install(site.module, results[site.name], torch.device("cpu"))
    modules = {site.name: site.module for site in sites}
    found = literal_bc_vision.biases(model, modules, list(modules), images)
    compensate(ours, results, Compensation(("layer",), "positional", dtype="float32"), images, ENGINE)
    for site in sites:
        module: Any = ours.get_submodule(site.name)
        child, rows = compensation_of(module), found[site.name]
        if child is None:  # one row, folded into the module's own bias
            own: Any = site.module
            torch.testing.assert_close(module.bias - own.bias, rows.flatten(), atol=2e-5, rtol=1e-3)
            continue
        if site.layout == "heads":
            rows = rows.transpose(0, 1).flatten(1)
        elif site.layout == "image":
            rows = rows.flatten(1).T
        torch.testing.assert_close(child.bias, rows.reshape(child.bias.shape), atol=2e-5, rtol=1e-3)


def test_every_stage_is_measured(tmp_path: Path) -> None:
    case = language.SMALL | {"window": 16}
    mine, other = language.ours(**case), language.literal(**case)
    assert set(mine) == {"float pass", "gptq", "gptq with sums", "biases", "layer and block"}
    assert set(other) == {"layer", "layer and block"}
    assert all(value >= 0 for value in [*mine.values(), *other.values()])
    assert set(language.vision_layers(language.VISION_SMALL, 4)) == {"ours", "literal"}
    point = language.calibration(**(language.POINT | {"width": 64, "heads": 1, "inner": 64, "window": 16}))
    assert point["activations_mib"] == 2 * 16 * 16 * 64 * 4 / 2**20 and point["two_blocks_mib"] > 0


def test_what_is_measured_is_kept_with_its_machine(tmp_path: Path) -> None:
    runs = measure.run(f"{language.MODULE}:calibration", language.POINT | {"samples": 2, "window": 16}, 1)
    assert runs[0]["cpu_seconds"] > 0 and runs[0]["result"]["cpu_seconds"] > 0
    with pytest.raises(RuntimeError, match="no_such_function"):
        measure.run(f"{language.MODULE}:no_such_function", {}, 1)
    path = tmp_path / "x.csv"
    measure.write(path, [{"a": 1}])
    measure.write(path, [{"a": 2, "b": 3}])
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["a"], row["b"]) for row in rows] == [("1", ""), ("2", "3")]
    assert all(row["cpu"] and torch.__version__.startswith(row["torch"]) and row["commit"] for row in rows)
