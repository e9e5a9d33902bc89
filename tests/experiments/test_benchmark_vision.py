"""The benchmark of the candidate search, at its smallest, and the published protocol as the oracle of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.benchmarks import literal_vision, measure, ptq4vit


@pytest.fixture(scope="module")
def literal() -> ptq4vit.Parameters:
    return ptq4vit.literal("tiny_vit")


def test_exact_search_finds_what_the_published_protocol_finds(literal: ptq4vit.Parameters) -> None:
    same, total = ptq4vit.agreement(ptq4vit.ours("tiny_vit", "exact"), literal)
    assert total > 1000 and same == total


def test_fast_search_of_few_images_is_the_exact_one(literal: ptq4vit.Parameters) -> None:
    same, total = ptq4vit.agreement(ptq4vit.ours("tiny_vit", "fast"), literal)
    assert same == total


def test_agreement_counts_shared_parameters_for_each_group() -> None:
    a, b = {"s": [[1.0], [2.0, 3.0]]}, {"s": [[1.0, 1.0, 2.0], [2.0, 3.1]]}
    assert ptq4vit.agreement(a, b) == (3, 5)


def test_accuracy_of_a_few_images() -> None:
    assert 50 < ptq4vit.top1("fast", 8, 50) <= 100


def test_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    found = measure.run(f"{ptq4vit.MODULE}:ours", {"case": "tiny_vit", "search": "exact"}, 1)
    assert len(found) == 1 and set(found[0]) == {"cpu_seconds", "wall_seconds", "peak_mib", "result"}
    assert found[0]["peak_mib"] > 0 and len(found[0]["result"]) > 10
    path = tmp_path / "new" / "rows.csv"
    measure.write(path, [{"a": 1}])
    measure.write(path, [{"a": 2, "b": 3}])
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("a,") and set(measure.machine()) <= set(lines[0].split(","))


def test_a_failing_call_is_told() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        measure.run(f"{ptq4vit.MODULE}:ours", {"case": "nothing", "search": "exact"}, 1)


def test_protocol_is_that_of_the_paper() -> None:
    p = literal_vision.Protocol()
    assert (p.low, p.high, p.candidates, p.rounds, p.metric, literal_vision.SPLITS) == (0.01, 1.2, 100, 3, "fisher", 20)
