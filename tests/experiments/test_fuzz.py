"""Random overrides: a configuration is accepted, or refused in one line; no traceback, no cell of a bad one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bc.errors import UserError
from experiments.compose import compose_run, hydra_ready
from experiments.config import RunConfig
from experiments.identity import cell_hash, slug

NUMBERS = [
    "0",
    "1",
    "-1",
    "3",
    "8",
    "16",
    "17",
    "0.5",
    "1e400",
    "nan",
    "999999999999999999999",
    "true",
    "null",
    "''",
    "[]",
]
WORDS = [
    "layer",
    "[layer]",
    "[layer,layer]",
    "[block,nonsense]",
    "{a:1}",
    "off",
    "'off'",
    "sink",
    "float",
    "../x",
    "???",
]
WORDS += [
    "${seed}",
    "${oc.env:HOME}",
    "${nothing}",
    "${seed",
    "a=b",
    "'",
    '"',
    "\\",
    "ä",
    "x" * 300,
    "$(ls)",
    "!!python/x",
]
KEYS = ["model", "quantizer", "bits", "bc", "data", "logger", "seed", "save_model", "on_error", "results_dir", "cell"]
KEYS += ["model.name", "model.path", "model.dtype", "model.attention", "bits.weight", "bits.activation"]
KEYS += ["bits.group_size", "bc.scope", "bc.granularity", "bc.stream", "bc.sink_positions", "bc.dtype"]
KEYS += ["data.calibration", "data.calibration.samples", "data.calibration.window", "data.evaluation.datasets"]
KEYS += ["data.evaluation.limit", "data.selection.samples", "data.paths", "data.paths.c4", "report"]
KEYS += ["report.held_out_samples", "engine.device", "engine.batch_size", "engine.activations", "engine.threads"]
KEYS += ["logger.mode", "logger.tags", "logger.project", "quantizer.damping", "quantizer.name", "experiment.cells"]
KEYS += ["experiment.name", "nonsense", "model.nonsense", "cells_at_once"]
GROUPS = ["opt_125m", "smollm2_135m", "custom", "gptq", "rtn", "awq", "billm", "none", "w3", "w3g64", "float", "w1"]
GROUPS += ["paper", "sink", "embedded_llm", "llm", "wandb"]
OVERRIDES = st.builds(
    lambda prefix, key, value: f"{prefix}{key}={value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS),
    st.sampled_from(NUMBERS + WORDS + GROUPS),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_random_overrides(overrides: list[str]) -> None:
    with hydra_ready():
        try:
            run = compose_run(overrides)
        except UserError as error:
            message = str(error)
            assert message.strip()
            assert "\n" not in message
            assert len(message) < 1000
            return
    assert isinstance(run, RunConfig)
    assert len(cell_hash(run.cell)) == 64  # what is accepted has an identity, and a name that is a name
    assert "/" not in slug(run.cell)


@pytest.mark.parametrize("override", ["seed", "=3", "a b", "bits.weight=", "~model", "bits.weight=3,4", "+", ""])
def test_odd_overrides(override: str) -> None:
    with hydra_ready():
        try:
            compose_run([override])
        except UserError as error:
            assert "\n" not in str(error)
