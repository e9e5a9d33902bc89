"""The literal protocols are oracles of our biases; the benchmarks run at their smallest size."""

from __future__ import annotations

import copy
import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bc
from bc import quantizers, vision
from bc.chains import chain_of
from bc.compensation import compensation_of
from bc.pipeline import Engine, calibrate, compensate
from bc.settings import Bits, Compensation
from experiments.benchmarks import gptq, language, large, literal_bc_vision, literal_language, measure
from tests.bc.vision.conftest import make
from tests.conftest import VOCABULARY, tiny_model

ENGINE = Engine(torch.device("cpu"), 2)


@pytest.mark.parametrize("block_scope", [False, True])
@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_language_biases_are_those_of_the_literal_protocol(name: str, block_scope: bool) -> None:
    model = tiny_model(name)
    ids = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w2")), None, ENGINE)
    twin, ours = language.quantized_copy(model, results), copy.deepcopy(model)
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
    twin, ours = language.quantized_copy(model, results), copy.deepcopy(model)
    sites = chain_of(twin).sites
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
    assert set(mine) == {
        *("float pass", "gptq", "gptq with sums", "biases", "layer and block"),
        *("install", "seen sums", "seen sink", "seen positional"),
    }
    assert set(other) == {"layer", "layer and block"}
    assert all(value >= 0 for value in [*mine.values(), *other.values()])
    assert set(language.vision_layers(language.VISION_SMALL, 4)) == {"ours", "literal"}
    point = language.calibration(**(language.POINT | {"width": 64, "heads": 1, "inner": 64, "window": 16}))
    assert point["activations_mib"] == 2 * 16 * 16 * 64 * 4 / 2**20 and point["two_blocks_mib"] > 0


@pytest.mark.parametrize("bits", ["w4", "w3g16"])
def test_gptq_is_no_worse_than_its_peer(bits: str) -> None:
    pytest.importorskip("gptqmodel.quantization", reason="gptqmodel is not installed (extra 'crosscheck')")
    small = {"width": 64, "inner": 96, "samples": 2, "window": 64}
    mine, other = gptq.ours(bits, **small), gptq.peer(bits, **small)
    assert set(mine) == set(other) == {"moments", "solve", "error"}
    assert mine["error"] == pytest.approx(other["error"], rel=0.05)


def test_layer_and_block_scope_take_one_float_and_one_quantized_forward() -> None:
    linears = 6  # of an OPT block; the literal protocol catches the input of each in a forward of its own
    found = language.forwards(**(language.SMALL | {"window": 16}))
    assert found == {"ours": 2, "literal": linears + 2}


def test_gptq_is_measured_with_its_error_and_without_a_peer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"width": 32, "inner": 48, "samples": 2, "window": 16}
    errors = [gptq.ours(bits, **small)["error"] for bits in ("w2", "w4", "w8")]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0
    w, x = torch.eye(3), [torch.ones(1, 2, 3)]
    assert gptq.relative_error(w, torch.diag(torch.tensor([1.0, 1.0, 0.0])), x) == pytest.approx(1 / 3)
    monkeypatch.setattr(gptq, "PEER", "no_such_package")
    monkeypatch.setattr(measure, "run", lambda *_: [{"result": gptq.version()}])
    assert gptq.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "no_such_package is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_memory_of_the_starting_process_is_not_the_started_ones() -> None:
    held = torch.ones(2**26)  # 256 MiB in this process
    (run,) = measure.run(f"{__name__}:hold", {"mib": 64}, 1)
    assert held.sum() > 0 and 60 < run["peak_mib"] < 120


def hold(mib: int) -> float:
    """Take so much memory for a moment."""
    return float(torch.ones(mib * 2**18).sum())


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


def test_a_large_models_memory_is_measured(tmp_path: Path) -> None:
    """The model that is written is read as one of a hub is, and its own memory is what is told of."""
    size = large.write_model(tmp_path / "float", 2, **large.SMALL)
    model: Any = bc.load(tmp_path / "float", dtype="float16")
    assert size * 2**30 == sum(p.numel() * 2 for p in model.parameters())
    with measure.own_memory(0.001) as memory:
        held = torch.ones(64 * 2**18)  # 64 MiB
        for _ in range(1000):  # until the watcher has had its turn
            if memory.peak_gib > 0.06:
                break
            time.sleep(0.01)
    del held
    assert 0.06 < memory.peak_gib < 0.07
    found = list(large.rows(tmp_path, large.SMALL | {"width": 32}, 1))
    assert [row["stage"] for row in found] == ["quantize and save", "open and run"] * len(large.SETTINGS)
    assert all(row["own_gib"] > 0 and row["checkpoint_gib"] > 0 for row in found)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]  # no checkpoint is left
