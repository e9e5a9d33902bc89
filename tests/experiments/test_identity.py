"""What the hash of a cell depends on, and what it does not."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose

from bc import models, quantizers
from bc.errors import UserError
from bc.settings import PRESETS, Bits, build_dataclass
from experiments.compose import compose_run, experiment_names, hydra_ready, load_experiment
from experiments.config import RunConfig, cell_config
from experiments.identity import bc_label, cell_hash, means_hash, scientific, slug, weights_hash

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with hydra_ready():
        yield


experiment = cache(load_experiment)


def run(*overrides: str) -> RunConfig:
    return compose_run(["model=opt_125m", "quantizer=gptq", "bits=w3", *overrides])


def run_vision(*overrides: str) -> RunConfig:
    return compose_run(["model=tiny_vit", "quantizer=minmax", "bits=w4a4", "data=embedded_vision", *overrides])


def test_hash_is_known() -> None:
    """A change of this value makes every stored result a stranger: raise SCHEMA and say so."""
    assert cell_hash(run().cell) == cell_hash(run().cell)
    assert slug(run("bc=paper").cell) == f"opt_125m-gptq-w3-paper-s0-{cell_hash(run('bc=paper').cell)[:8]}"


@pytest.mark.parametrize(
    "override",
    [
        "model.path=/somewhere",
        "model.attention=eager",
        "data.paths.c4=/somewhere",
        "engine.device=cpu",
        "engine.batch_size=1",
        "engine.activations=disk",
        "engine.activations_dtype=float32",
        "engine.memory_mib=100",
        "engine.matmul=highest",
        "engine.deterministic=true",
        "logger=none",
        "logger.mode=online",
        "results_dir=/elsewhere",
        "on_error=raise",
        "data.evaluation.datasets=[c4,ptb,wikitext2]",
        "bc.sink_positions=3",
        "quantizer.damping=0.01",
    ],
)
def test_hash_is_of_results_only(override: str) -> None:
    assert cell_hash(run(override).cell) == cell_hash(run().cell)


def test_the_budget_counts_where_it_has_an_effect() -> None:
    auto, small = run("bc=auto").cell, run("bc=auto", "bc.budget=0.05").cell
    assert cell_hash(auto) != cell_hash(small)
    assert (bc_label(auto.bc), bc_label(small.bc)) == ("auto", "auto-0.05")
    assert cell_hash(run("bc=sink", "bc.budget=0.05").cell) == cell_hash(run("bc=sink").cell)


@pytest.mark.parametrize(
    ("override", "same_weights", "same_means"),
    [
        ("model=opt_350m", False, False),
        ("model.dtype=float16", False, False),
        ("quantizer.damping=0.02", False, True),
        ("quantizer.act_order=true", False, True),
        ("quantizer=rtn", False, True),
        ("bits=w4", False, True),
        ("bits=w3g64", False, True),
        ("bc=sink", True, True),
        ("bc=paper", True, True),
        ("data.calibration.samples=64", False, False),
        ("data.calibration.dataset=wikitext2", False, False),
        ("data.selection.samples=32", True, True),
        ("data.evaluation.limit=8", True, True),
        ("data.evaluation.datasets=[ptb]", True, True),
        ("report.held_out_samples=4", True, True),
        ("seed=1", False, False),
    ],
)
def test_what_the_hashes_tell_apart(override: str, same_weights: bool, same_means: bool) -> None:
    base, other = run().cell, run(override).cell
    assert cell_hash(base) != cell_hash(other)
    assert (weights_hash(base) == weights_hash(other)) is same_weights
    assert (means_hash(base) == means_hash(other)) is same_means


@pytest.mark.parametrize("matmul", ["high", "medium"])
def test_less_precise_matmuls_count(matmul: str) -> None:
    base, other = run("bc=sink").cell, run("bc=sink", f"engine.matmul={matmul}").cell
    assert len({f(c) for f in (cell_hash, weights_hash, means_hash) for c in (base, other)}) == 6
    assert scientific(other)["numerics"] == {"matmul": matmul}


def test_narrower_activations_count_where_they_round() -> None:
    narrow = "engine.activations_dtype=bfloat16"
    base, other = run("bc=sink").cell, run("bc=sink", narrow).cell
    for identity in (cell_hash, weights_hash, means_hash):
        assert identity(base) != identity(other)
    half = "model.dtype=bfloat16"
    assert cell_hash(run(half, narrow).cell) == cell_hash(run(half).cell)
    assert "numerics" not in scientific(base)
    assert scientific(other)["numerics"] == {"activations_dtype": "bfloat16"}


def test_committed_cells_keep_their_hashes() -> None:
    """Of cells.csv, for experiments whose files have not changed since they ran."""
    with (CONF.parent / "results" / "cells.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["experiment"] == "table2_embedded"]
    _, runs = experiment("table2_embedded")
    assert len(rows) >= 62  # 31 cells, two texts
    assert {row["cell"] for row in rows} <= {cell_hash(r.cell) for r in runs}


def test_sink_positions_count_at_granularity_sink() -> None:
    assert cell_hash(run("bc=sink", "bc.sink_positions=2").cell) != cell_hash(run("bc=sink").cell)


def test_float_cell_is_canonical() -> None:
    plain = ["model=opt_125m", "quantizer=none", "bits=float", "bc=off"]
    base = cell_hash(compose_run(plain).cell)
    for override in ("seed=3", "data.calibration.samples=4", "report.held_out_samples=2", "bc.granularity=sink"):
        assert cell_hash(compose_run([*plain, override]).cell) == base
    assert cell_hash(compose_run([*plain, "data.evaluation.limit=2"]).cell) != base


def test_bc_labels() -> None:
    assert [bc_label(preset) for preset in PRESETS.values()] == list(PRESETS)
    assert bc_label(run_vision("bc=readout", "bc.budget=0.05").cell.bc) == "readout-0.05"
    wide = run_vision("bc=affine", "bc.scope=[readout,layer]", "bc.stream=quantized", "bc.budget=0.05").cell
    assert bc_label(wide.bc) == "affine-0.05-layer+readout-quantized"
    assert cell_hash(wide) != cell_hash(replace(wide, bc=replace(wide.bc, budget=0.5)))
    assert bc_label(run("bc=sink", "bc.stream=quantized").cell.bc) == "sink-layer-quantized"
    assert bc_label(run("bc=sink", "bc.sink_positions=4", "bc.dtype=float32").cell.bc) == "sink4-layer-float-float32"


def test_conf_and_library_name_the_same_things() -> None:
    known = set(quantizers.available())
    for path in (CONF / "quantizer").glob("*.yaml"):
        options = yaml.safe_load(path.read_text())
        name = options.pop("name")
        assert name == path.stem
        if name != "none" and name in known:
            assert set(options) == set(quantizers.option_names(name)), path
            defaults = quantizers.available()[name].Options()
            assert all(getattr(defaults, key) == value for key, value in options.items()), path
    for path in (CONF / "bc").glob("*.yaml"):
        if path.stem in PRESETS:
            make = run_vision if path.stem == "readout" else run
            assert bc_label(make(f"bc={path.stem}").cell.bc) == path.stem
    for path in (CONF / "bits").glob("*.yaml"):
        bits = build_dataclass(Bits, yaml.safe_load(path.read_text()), "bits")
        assert bits == Bits.parse(path.stem)
    assert {p.stem for p in (CONF / "model").glob("*.yaml")} >= set(models.catalogue())


@pytest.mark.parametrize("name", experiment_names())
def test_experiments_compose(name: str) -> None:
    section, runs = experiment(name)
    hashes = [cell_hash(r.cell) for r in runs]
    assert len(hashes) == len(set(hashes))
    assert section.name == name
    assert section.suite in ("paper", "embedded")


@pytest.mark.parametrize("name", experiment_names())
def test_settings_of_an_experiments_cells_can_be_given_on_the_command_line(name: str) -> None:
    """Hydra knows only the settings of the groups that the experiment itself names, whatever its cells have."""
    _, runs = experiment(name)
    base = compose("config", overrides=[f"+experiment={name}"])
    assert {"images" if "workers" in base.data else "text"} == {r.cell.domain for r in runs}
    used = {r.cell.quantizer for r in runs if not r.cell.is_float}
    assert len(used) > 1 or base.quantizer.name in used


def test_cells_of_table2() -> None:
    _, runs = experiment("table2")
    assert len(runs) == 3 * (1 + 6 + 3)
    assert {slug(r.cell).partition("-")[0] for r in runs} == {"opt_125m", "opt_350m", "bloom_560m"}


def test_users_overrides_apply_to_every_cell() -> None:
    _, runs = load_experiment("demo", ["data.evaluation.limit=4", "seed=0,1", "hydra/launcher=local"])
    assert len({cell_hash(r.cell) for r in runs}) == 1 + 2 * 7
    assert all(r.cell.data.evaluation.limit == 4 for r in runs)


def test_one_models_files_are_not_read_for_several() -> None:
    with pytest.raises(
        UserError, match=r"model\.path: /models would be read for all 3 models .* '.*\$\{model\.name\}'"
    ):
        load_experiment("table2", ["model.path=/models"])
    _, runs = load_experiment("table2", ["model.path=/models/${model.name}"])
    assert all(r.cell.model.path == f"/models/{r.cell.model.name}" for r in runs)
    _, runs = load_experiment("table2", ["model.path=/models", "model=opt_125m"])
    assert {r.cell.model.path for r in runs} == {"/models"}


def test_schema_refuses_what_is_no_mapping() -> None:
    with pytest.raises(ValueError, match="bc: 'off' is not a group"):
        cell_config({"seed": 0, "bc": "off"})


@pytest.mark.parametrize("quantizer", ["base_ptq", "easyquant", "ptq4vit", "apq_vit", "noisyquant"])
def test_the_exact_search_is_not_part_of_a_hash(quantizer: str) -> None:
    plain = ["model=tiny_vit", f"quantizer={quantizer}", "bits=w4a4", "data=embedded_vision"]
    exact, fast = (compose_run([*plain, f"quantizer.search={mode}"]).cell for mode in ("exact", "fast"))
    assert cell_hash(exact) == cell_hash(compose_run(plain).cell) != cell_hash(fast)
    assert "search" not in scientific(exact)["quantizer"] and scientific(fast)["quantizer"]["search"] == "fast"


@pytest.mark.parametrize("override", ["bc.sink_positions=4", "bc.blend=0.1"])
def test_what_auto_takes_over_counts(override: str) -> None:
    """The number of sinks and the blend of its candidates; as usual they do not, as of old."""
    cells = []
    for more in ([], [override]):
        with hydra_ready():
            cells.append(compose_run(["model=smollm2_135m", "quantizer=rtn", "bits=w3", "bc=auto", *more]).cell)
    assert cell_hash(cells[0]) != cell_hash(cells[1])
    part = scientific(cells[0])["bc"]
    assert part["sink_positions"] is None and "blend" not in part


@pytest.mark.parametrize("override", ["bc.stream=quantized", "bc.granularity=sink", "bc.method=affine"])
def test_what_auto_chooses_cannot_be_set(override: str) -> None:
    with hydra_ready(), pytest.raises(UserError, match=r"bc\.\w+: '\w+' has no say under auto, which chooses it"):
        compose_run(["model=smollm2_135m", "quantizer=rtn", "bits=w3", "bc=auto", override])
