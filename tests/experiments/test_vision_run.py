"""Vision cells through the command line: embedded images, ImageNet's folders, scope search, mistakes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from bc import quantizers
from bc.data import images
from bc.errors import UserError
from bc.settings import Compensation
from bc.vision import classes
from experiments import vision
from experiments.compose import compose_run, expand, hydra_ready
from experiments.identity import bc_label, cell_hash
from experiments.run import main
from experiments.tables import rebuild
from experiments.tasks import Scores
from tests.experiments.conftest import assert_one_line

FAST = ("data.calibration.samples=8", "data.compensation.samples=12", "data.selection.samples=10")
FAST += ("report.calibration_samples=6", "report.held_out_samples=6", "engine.device=cpu", "engine.threads=1")
SYNSETS = ("n01440764", "n01443537", "n01484850")  # classes 0 to 2
SMALL = (*FAST, "data=embedded_vision", "data.evaluation.limit=40", "model=tiny_vit", "logger=none")


def run(results: Path, *more: str) -> int:
    names = {m.partition("=")[0] for m in more}
    kept = [argument for argument in SMALL if argument.partition("=")[0] not in names]
    if "data=embedded_llm" in more:
        kept = [argument for argument in kept if not argument.startswith("data.")]
    return main([*kept, f"results_dir={results}", *more])


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((folder / "cells").glob("*/result.json"))]


@pytest.mark.parametrize("name", [*quantizers.of_kind("weight_activation"), "gptq"])
def test_every_quantizer_with_and_without_bc(tmp_path: Path, name: str) -> None:
    bits = "w3" if name == "gptq" else "w4a4"
    few = ("quantizer.candidates=5",) if "candidates" in quantizers.option_names(name) else ()
    few += ("quantizer.block_candidates=2",) if name == "apq_vit" else ()
    assert run(tmp_path, "-m", f"quantizer={name}", f"bits={bits}", "bc='off',paper", *few) == 0
    off, paper = sorted(results_of(tmp_path), key=lambda r: r["bits_per_weight"])
    for result in (off, paper):
        values = {m["metric"]: m for m in result["metrics"]}
        assert set(values) == {"top1", "top5"} and values["top1"]["test_samples"] == 40
        assert 50 < values["top1"]["value"] <= values["top5"]["value"] <= 100
        assert values["top1"]["value"] % 2.5 == 0  # of 40 images
    assert off["bias_parameters"] == 0 < paper["bias_parameters"]
    assert paper["label"]["scope"] == "layer+model" and paper["label"]["bc"] == "paper"
    assert paper["error_after"] < paper["error_before"]
    assert off["label"]["calibration_samples"] == 8 and paper["label"]["calibration_samples"] == 12
    assert len(list((tmp_path / "artefacts").glob("weights-*"))) == 1  # both share the calibration


def test_two_runs_are_equal(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert run(tmp_path / folder, "quantizer=minmax", "bits=w4a4", "bc=paper") == 0
    (one,), (two,) = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert one["metrics"] == two["metrics"] and one["error_after"] == two["error_after"]


def test_the_searched_scope_is_chosen_without_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    evaluate = vision.VisionTask.evaluate

    def counting(self: vision.VisionTask, *arguments: Any) -> Scores:
        scored.append(1)
        return evaluate(self, *arguments)

    monkeypatch.setattr(vision.VisionTask, "evaluate", counting)
    assert run(tmp_path, "quantizer=minmax", "bits=w2a4", "bc=search") == 0
    (result,) = results_of(tmp_path)
    assert len(scored) == 1
    trials = {trial["setting"]: trial["score"] for trial in result["choice"]}
    assert len(trials) == 31
    best = Compensation(tuple(result["label"]["scope"].split("+")), "positional")
    assert trials[bc_label(best, "images")] == max(trials.values())
    assert result["label"]["bc"] == "search"


def test_auto_needs_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same is chosen, by the same scores, where the labels of the selection images are wrong."""
    settings = ("quantizer=minmax", "bits=w2a4", "bc=auto", "bc.budget=0.05")
    assert run(tmp_path / "a", *settings) == 0
    read = vision.VisionTask.samples

    def shuffled(self: vision.VisionTask, *arguments: Any) -> Any:
        found = read(self, *arguments)
        found.labels = found.labels.flip(0)
        return found

    monkeypatch.setattr(vision.VisionTask, "samples", shuffled)
    assert run(tmp_path / "b", *settings) == 0
    (one,), (two,) = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert one["choice"] == two["choice"] and one["label"] == two["label"]
    scores = {trial["setting"]: trial["score"] for trial in one["choice"]}
    assert scores["readout-0.05"][0] > scores["off"][0]
    within = [t for t in one["choice"] if t["bits_per_weight"] <= one["choice"][0]["bits_per_weight"] + 0.05]
    best = max(within, key=lambda trial: trial["score"])
    assert best["bits_per_weight"] == one["bits_per_weight"]


def jpeg(mode: str, width: int, height: int, shade: int) -> bytes:
    bands = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    stream = io.BytesIO()
    pixels = np.random.RandomState(shade).randint(0, 255, (height, width, *bands), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Small pictures of odd sizes, grey, CMYK, and one that is cut off."""
    modes, sizes = ("RGB", "L", "CMYK"), [(33, 47), (90, 20), (17, 19), (64, 64)]
    for split in ("train", "val"):
        for k, synset in enumerate(SYNSETS):
            place = tmp_path / "imagenet" / split / synset
            place.mkdir(parents=True)
            for i in range(60 if split == "train" else 12):
                (place / f"{i:03d}.JPEG").write_bytes(jpeg(modes[i % 3], *sizes[(i + k) % 4], 100 * k + i))
    corrupt = tmp_path / "imagenet" / "val" / SYNSETS[1] / "003.JPEG"
    corrupt.write_bytes(corrupt.read_bytes()[:150])
    return tmp_path / "imagenet"


def test_imagenet_folders_run_the_real_path(
    imagenet: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(images.CLASSES, "imagenet", 10)  # the three that are there are among the model's
    data = ("data=imagenet", f"data.paths.imagenet={imagenet}", "data.workers=0", "data.evaluation.limit=36")
    assert run(tmp_path / "out", *data, "quantizer=minmax", "bits=w8a8", "bc=paper", "seed=3") == 0
    (result,) = results_of(tmp_path / "out")
    assert {m["test_samples"] for m in result["metrics"]} == {35}
    said = capfd.readouterr()
    assert "003.JPEG cannot be decoded" in said.out + said.err
    assert "warning: imagenet: 1 of 36 images cannot be decoded and are left out" in said.out + said.err
    assert result["provenance"]["seeds"] == {"calibration": 3, "compensation": 3, "selection": 3}
    assert result["config"]["evaluation"]["limit"] == 36


@pytest.mark.parametrize(
    ("overrides", "scored", "heading"),
    [
        (("data=imagenet",), (50_000,), "imagenet"),
        (("data=imagenet",), (), "imagenet"),
        (("data=imagenet",), (50_000, 49_998), "imagenet (49,998 of 50,000 images)"),
        (
            (
                "data=imagenet",
                "data.evaluation.limit=36",
            ),
            (35,),
            "imagenet (part: 35 of 36 images from 0)",
        ),
        (
            (
                "data=imagenet",
                "data.evaluation.limit=2000",
            ),
            (2000,),
            "imagenet (part: 2000 images from 0)",
        ),
        (
            (
                "data=imagenet",
                "data.evaluation.offset=10",
            ),
            (49_990,),
            "imagenet (part: rest images from 10)",
        ),
        (
            (
                "data=imagenet",
                "data.evaluation.offset=10",
            ),
            (49_989,),
            "imagenet (part: 49,989 of 49,990 images from 10)",
        ),
        (("data=embedded_vision",), (2000,), "embedded_fashion"),
    ],
)
def test_tables_say_of_how_many_images_a_score_is(
    overrides: tuple[str, ...], scored: tuple[int, ...], heading: str
) -> None:
    from experiments.tables import Line

    with hydra_ready():
        cell = compose_run(["model=vit_s", "quantizer=minmax", "bits=w8a8", *overrides]).cell
    rows = [{"test_samples": str(count)} for count in scored]
    assert Line(cell, cell.data.evaluation.datasets[0], rows=rows).heading == heading


def test_a_partial_run_is_shown_as_such(tmp_path: Path) -> None:
    overrides = ["model=tiny_vit", "data=embedded_vision", "data.evaluation.limit=40", "quantizer=minmax"]
    overrides += [*FAST, "data.compensation.samples=8", "bc='off'", "seed=0", "logger=none"]
    assert main(["+experiment=ablation_samples", f"results_dir={tmp_path}", *overrides]) == 0
    rebuild("ablation_samples", overrides, tmp_path)
    text = (tmp_path / "tables" / "ablation_samples.md").read_text()
    assert "embedded_fashion (part: 40 images from 0)" in text
    assert "Bold: the best" in text


def test_the_calibration_of_the_samples_ablation_is_shared_as_its_header_says() -> None:
    from experiments.compose import load_experiment
    from experiments.frame import EXPERIMENTS
    from experiments.identity import weights_hash

    small, seed = ["model=tiny_vit", "data=embedded_vision"], "data.calibration.seed=3"
    header = (EXPERIMENTS / "ablation_samples.yaml").read_text("utf8").partition("defaults:")[0]
    assert " ".join(small) in header and seed in header
    for overrides, count in (([], 1), (small, 3), ([*small, seed], 1)):
        _, runs = load_experiment("ablation_samples", overrides)
        assert len({weights_hash(run.cell) for run in runs}) == count


MISTAKES = [
    (["model=smollm2_135m"], "model: 'smollm2_135m' is a language model", "data=embedded_llm"),
    (["data=embedded_llm"], "model: 'tiny_vit' is a vision model", "data=imagenet"),
    (["quantizer=minmax", "bits=w1"], "bits.weight: 1 does not go with quantizer 'minmax'", "2 to 8"),
    (["data=imagenet"], "data.paths.imagenet", "BC_IMAGENET"),
    (["data.calibration.dataset=imagenett"], "'imagenett' is not known", "embedded_fashion"),
    (["data.calibration.seed=-1"], "data.calibration.seed: -1 is not allowed", "0 or more"),
    (["data.compensation.samples=0"], "data.compensation.samples: 0 is not allowed", "1 or more"),
    (["data.evaluation.offset=-1"], "data.evaluation.offset: -1 is not allowed", "0 or more"),
    (["data.kind=sounds"], "data.kind: 'sounds' is not known", "images"),
    (["bc.kinds=[convs]"], "bc.kinds: 'convs' is not known", "conv"),
    (["bc.scope=[search,layer]"], "bc.scope: search and auto stand for many", "[search] alone"),
    (["bc=search", "data.selection.samples=0", "report.held_out_samples=0"], "data.selection.samples: 0", "1 or more"),
    (["bc.scope=[stage]"], "bc.scope: there is no 'stage'", "attention"),
    (["model.path=/no/such/file"], "model.path: no checkpoint", ".safetensors"),
    (["model.attention=eager"], "model.attention: 'eager' is for language models", "auto"),
    (["save_model=true"], "save_model: ", "language"),
]


@pytest.mark.parametrize(("arguments", "start", "mend"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_one_line(
    tmp_path: Path,
    arguments: list[str],
    start: str,
    mend: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BC_IMAGENET", raising=False)
    default = [] if any(a.startswith("quantizer") for a in arguments) else ["quantizer=minmax", "bits=w4a4"]
    assert run(tmp_path, *default, *arguments) == 2
    assert_one_line(capsys, start, mend)


@pytest.mark.parametrize("name", ["tiny_vit", "vit_tiny_patch16_224.augreg_in21k"])
def test_models_of_other_classes_are_refused_before_work(
    imagenet: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision.VisionTask, "samples", None)  # work begins with them
    data = ("data=imagenet", f"data.paths.imagenet={imagenet}", "data.evaluation.limit=36", "quantizer=minmax")
    arguments = (*data, "bits=w8a8", "bc='off'", f"model={name}")
    if "." in name:
        arguments = (*arguments[:-1], "model=custom", f"model.name={name}")
    assert run(tmp_path / "out", *arguments) == 2
    number = "10" if name == "tiny_vit" else "21,843"
    start = f"data.evaluation.datasets: 'imagenet' has 1,000 classes and model '{name}' tells {number} apart"
    assert_one_line(capsys, start, "choose a model of 1,000 classes")


def test_the_cache_can_be_left_out_and_is_no_part_of_a_cell(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BC_CACHE", str(tmp_path / "cache"))
    where = ["data=imagenet", f"data.paths.imagenet={imagenet}", "data.workers=0", "data.evaluation.limit=36"]
    few = [a for a in SMALL if not a.startswith(("data=", "data.evaluation"))]
    with hydra_ready():
        on, off = (
            compose_run([*few, *where, "bits=float", "quantizer=none", f"data.cache={c}"]).cell for c in (True, False)
        )
        with pytest.raises(UserError, match=r"data\.cache: 3 is not allowed; use true or false"):
            compose_run([*few, *where, "data.cache=3"])
    assert cell_hash(on) == cell_hash(off)
    for cell, kept in ((off, False), (on, True)):
        list(vision.VisionTask().samples(cell).test["imagenet"])
        assert (tmp_path / "cache" / "images").exists() == kept


def test_only_a_choice_reads_the_labels_of_training_images(imagenet: Path) -> None:
    beside = ["data.calibration.dataset=imagenet", f"data.paths.imagenet={imagenet}", "quantizer=minmax", "bits=w4a4"]
    with hydra_ready():
        plain, searched = (compose_run([*SMALL, *beside, bc]).cell for bc in ("bc=paper", "bc=search"))
    vision.VisionTask().check(plain)
    with pytest.raises(
        UserError, match=r"data\.calibration\.dataset: 'imagenet' has 1,000 classes and model 'tiny_vit'"
    ):
        vision.VisionTask().check(searched)


def test_every_listed_vision_cell_has_a_model_of_its_classes() -> None:
    from experiments.frame import EXPERIMENTS

    tests = {"imagenet": "imagenet", "embedded_vision": "embedded_fashion"}
    listed = [yaml.safe_load(path.read_text())["experiment"]["cells"] for path in EXPERIMENTS.glob("*.yaml")]
    cells = [cell for entries in listed for cell in entries if cell["data"][0] in tests]
    pairs = {(model, tests[data]) for cell in cells for model in cell["model"] for data in cell["data"]}
    assert len(pairs) >= 14
    assert not [(model, data) for model, data in pairs if classes(model) != images.CLASSES[data]]


def test_table1_lists_the_papers_cells() -> None:
    from experiments.compose import load_experiment
    from experiments.published import PublishedTable
    from experiments.tables import PUBLISHED

    section, runs = load_experiment("table1")
    with hydra_ready():
        assert len(expand(section.cells)) == len(runs) == 10 * (1 + 6 * 3 + 3)
    published = PublishedTable(PUBLISHED / section.published)
    found = [published.find(r.cell, "imagenet", "top1") for r in runs]
    assert sum(value is not None for value in found) == 163  # every printed top-1 has its cell
    vit_b = next(
        r for r in runs if (r.cell.model.name, r.cell.bits.label, r.cell.bc.enabled) == ("vit_b", "w4a4", True)
    )
    value = published.find(vit_b.cell, "imagenet", "top1")
    assert value is not None and value.value == 67.27


def test_the_printed_noisyquant_is_the_one_on_ptq4vit() -> None:
    from experiments.compose import load_experiment
    from experiments.frame import experiments, frame_of, settings, with_published
    from experiments.published import PublishedTable
    from experiments.records import COLUMNS
    from experiments.tables import PUBLISHED

    section, runs = load_experiment("table1")
    published = PublishedTable(PUBLISHED / section.published)
    cells = [run.cell for run in runs if run.cell.quantizer == "noisyquant"]
    assert {cell.options["base"] for cell in cells} == {"ptq4vit"}
    cell = next(cell for cell in cells if (cell.model.name, cell.bits.label) == ("vit_s", "w6a6"))
    value = published.find(cell, "imagenet", "top1")
    assert value is not None and value.value == 78.65
    linear = replace(cell, options=cell.options | {"base": "linear"})
    assert published.find(linear, "imagenet", "top1") is None
    row = dict.fromkeys(COLUMNS, "") | {"experiment": "table1", "model": "vit_s", "quantizer": "noisyquant"}
    row |= {"w_bits": "6", "a_bits": "6", "group_size": "-1", "bc": "off", "dataset": "imagenet", "metric": "top1"}
    rows = [row | {"options": f"base={base} seed=0", "value": "78", "seed": "3"} for base in ("linear", "ptq4vit")]
    summary = with_published(settings(frame_of(rows)), experiments())
    assert dict(zip(summary["options"], summary["published"].fillna(0), strict=True)) == {
        "base=linear seed=0": 0,
        "base=ptq4vit seed=0": 78.65,
    }
