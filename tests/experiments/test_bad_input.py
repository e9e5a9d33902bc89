"""Mistakes in the input: one line that names the setting, exit status 2, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import generate, hub, language
from experiments.compose import expand
from experiments.run import main
from tests.bc.test_models import write_gguf
from tests.conftest import make_opt, tiny_model
from tests.experiments.conftest import Workspace, assert_one_line, make_tokenizer

MISTAKES = [
    (["model=opt_125"], "model: 'opt_125' is not known", "did you mean 'opt_125m'"),
    (["quantizer=gptqq"], "quantizer: 'gptqq' is not known", "allowed: "),
    (["bc=none"], "bc: 'none' is not known", "off, paper"),
    (["hydra/launcher=pbs"], "hydra/launcher: 'pbs' is not known", "basic"),
    (["+experiment=table9"], "experiment: 'table9' is not known", "table2"),
    (["experiment=table9"], "experiment: 'table9' is not known", "table2"),
    (["bits.weight=9"], "bits.weight: 9 is out of range", "1 to 8"),
    (["bits.weight=w3"], "bits.weight: 'w3' is a str", "int"),
    (["bits.width=3"], "setting: 'bits.width' is not known", "bits.weight"),
    (["+bits.width=3"], "bits option: 'width' is not known", "weight"),
    (["~seed"], "seed: the setting was deleted", "leave out ~seed"),
    (["~on_error"], "on_error: the setting was deleted", "leave out ~on_error"),
    (["~save_model"], "save_model: the setting was deleted", "leave out ~save_model"),
    (
        ["data=imagenet", "data.evaluation.window=5"],
        "setting: 'data.evaluation.window' is not known; allowed: data.evaluation.datasets, data.evaluation.limit, "
        "data.evaluation.offset",
        "",
    ),
    (["bitts=w3"], "setting: 'bitts' is not known", "did you mean 'bits'"),
    (["+extra=3"], "setting: 'extra' is not known", "allowed: "),
    (["bits.group_size=0"], "bits.group_size: 0 is not allowed", "-1"),
    (["quantizer.damping=high"], "quantizer.gptq.damping: 'high'", "float"),
    (["quantizer.damping=2"], "quantizer.gptq.damping: 2 is out of range", "allowed"),
    (["bc.granularity=row"], "bc.granularity: 'row' is not known", "sink"),
    (["bc.scope=layer"], "bc.scope: 'layer' is not a list", "bc.scope=["),
    (["bc.scope=[layers]"], "bc.scope: 'layers' is not known", "layer"),
    (["quantizer=rtn", "bc=sink", "bc.stream=calibration"], "bc.stream: 'calibration'", "bc.stream=float"),
    (["quantizer=gptq", "bc=paper", "bc.stream=calibration"], "bc.stream: 'calibration'", "bc.stream=float"),
    (["seed=-1"], "seed: -1 is not allowed", "0 or more"),
    ([f"seed={2**63}"], f"seed: {2**63} is not allowed", f"to {2**63 - 1}"),
    (["engine.threads=100000"], "engine.threads: 100000 is not allowed", "1 to 4096"),
    (["seed=0,1"], "seed: 0,1 is several values", "-m"),
    (["seed=[1,2]"], "seed: [1, 2] is not allowed", "a whole number"),
    (["data.evaluation.datasets=ptb,c4"], "add -m for a sweep over them, or write", "datasets=[ptb,c4]"),
    (["experiment=demo,table2"], "experiment: demo,table2 is several experiments", "one after the other"),
    (["-m", "experiment=demo,table2"], "experiment: demo,table2 is several experiments", "one after the other"),
    (["-m", "+experiment=[demo,table2]"], "experiment: [demo,table2] is several", "one after the other"),
    (["experiment=demo", "experiment=table2"], "experiment: demo table2 is several", "one after the other"),
    (["+experiment=demo", "hydra.mode=RUN"], "cell: none of the 8 cells of demo is chosen", "0 to 7"),
    (["+experiment.foo=1"], "experiment option: 'foo' is not known", "published"),
    (["experiment.suite=mine"], "experiment.suite: 'mine' is not known", "embedded, paper"),
    (["+experiment.experiment.name=mine"], "experiment: the file in conf/experiment lacks", "# @package _global_"),
    (["hydra/launcher=slurm"], "hydra/launcher: slurm is for sweeps", "add -m"),
    (["results_dir="], "results_dir: '' is not a folder name", "results_dir=results"),
    (["results_dir=null"], "results_dir: None is not a folder name", "results_dir=results"),
    (["bc=off,channel"], "bc: off,channel is several values; add -m for a sweep over them", "-m"),
    (["bc=[off,channel]"], "bc: [off,channel] is a list", "write bc=off,channel with -m"),
    (["quantizer.serach=fast"], "quantizer.serach: is not a setting of the chosen quantizer", "conf/quantizer"),
    (["+experiment=table2_embedded", "cell=999"], "cell: 999 is not allowed", "0 to 84"),
    (["+experiment=table2_embedded", "cell=-1"], "cell: -1 is not allowed", "0 to 84"),
    (["+experiment=table2_embedded", "cell=foo"], "cell: foo is not allowed", "0 to 84"),
    (["quantizer=none"], "bits: w4 does not go with quantizer=none", "bits=float"),
    (["quantizer=none", "bits=float", "bc=sink"], "bc: there is nothing to compensate", "bc=off"),
    (["quantizer=ptq4vit"], "quantizer: 'ptq4vit' quantizes the weights and activations of vision", "gptq"),
    (["bits=float"], "bits: float does not go with quantizer=gptq", "quantizer=none"),
    (["bc=readout"], "bc.scope: no 'readout' in a language model", "allowed: layer"),
    (["bc=off", "bc.scope=[model,readout]"], "bc.scope: readout moves the logits as model does", "leave model out"),
    (["report.calibration_samples=9"], "report.calibration_samples: 9 is more than the 8 of data.calib", "lower"),
    (["report.held_out_samples=5"], "report.held_out_samples: 5 is more than the 4", "lower"),
    (["data.evaluation.limit=0"], "data.evaluation.limit: 0 is not allowed", "1 or more"),
    (["data.evaluation.datasets=[wikitext]"], "'wikitext' is not known", "wikitext2"),
    (["data.evaluation.datasets=[]"], "data.evaluation.datasets: [] is not allowed", "one or more"),
    (["data.evaluation.window=65"], "data.evaluation.window: 65 tokens are more than the 64 positions", "64 or less"),
    (["data.paths.wikitext2=/no/such/folder"], "data.paths.wikitext2", "/no/such/folder"),
    (["+data.paths.wikitext=/x"], "data.paths option: 'wikitext' is not known", "did you mean 'wikitext2'"),
    (["model.name="], "model.name: '' is empty", "set model.name"),
    (["model.path=/no/such/folder"], "model.path", "/no/such/folder"),
    (["data.calibration.samples=100000"], "100000 asked for", "lower"),
    (["engine.device=cuda:99"], "error: engine.device: 'cuda:99' is absent", "engine.device=cpu"),
    (["engine.device=tpu"], "error: engine.device: 'tpu' is not known", "engine.device=auto"),
    (["on_error=ignore"], "on_error: 'ignore' is not known", "continue, raise"),
    (["model.name=???"], "model.name: is missing", "set model.name"),
    (["model"], "override 'model' is not understood", "key=value"),
]


@pytest.mark.parametrize(("arguments", "start", "mend"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_one_line(
    workspace: Workspace,
    arguments: list[str],
    start: str,
    mend: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(language.models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    keys = {a.lstrip("+").partition("=")[0] for a in arguments}
    keys |= {a.lstrip("~") for a in arguments}
    tiny = [a for a in workspace.arguments() if a.partition("=")[0] not in keys]
    if "data=imagenet" in arguments:
        tiny = [a for a in tiny if not a.startswith("data.")]
    if "model" in keys:
        tiny = [a for a in tiny if not a.startswith("model.")]
    assert main([*tiny, *arguments]) == 2
    assert_one_line(capsys, start, mend)


def test_a_mistake_in_a_sweep_is_told_once(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run("-m", "bits=w3,w4", "bc.granularity=row") == 2
    assert capsys.readouterr().err.count("bc.granularity") == 1
    assert main(["-m", f"results_dir={workspace.results}", "bits=w3,w9"]) == 2


def test_a_bare_off_in_yaml_is_pointed_out() -> None:
    assert expand([{"bc": ["off", "sink"], "bits": "w3"}]) == [["bits=w3", "bc=off"], ["bits=w3", "bc=sink"]]
    with pytest.raises(ValueError, match=r"experiment\.cells\[0\]\.bc: False .*'off' in quotes"):
        expand([{"bc": [False]}])
    with pytest.raises(ValueError, match=r"experiment\.cells: is empty"):
        expand([])


def test_model_name_that_is_a_path(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    folder: Path = workspace.shared / "llama"
    assert main(["model=custom", f"model.name={folder}", f"results_dir={workspace.results}"]) == 2
    assert "set model.path=" in capsys.readouterr().err


def test_windows_are_held_against_a_gguf_files_positions(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They stand in its header, as those of a folder in its config.json."""
    model = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), model)
    longest = tiny_model("llama").config.max_position_embeddings
    assert language.positions_in_gguf(model) == longest
    assert workspace.run(f"model.path={model}", "quantizer=rtn", f"data.evaluation.window={longest + 1}") == 2
    error = capsys.readouterr().err
    assert f"data.evaluation.window: {longest + 1} tokens are more than the {longest} positions" in error
    assert "starts" not in error
    model.write_bytes(b"no such format")
    assert workspace.run(f"model.path={model}", "quantizer=rtn") == 2
    assert "cannot be read as GGUF" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused_before_the_load(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_opt(vocab_size=16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(language.models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert workspace.run(f"model.path={tmp_path}", "quantizer=rtn") == 2
    error = capsys.readouterr().err
    assert "model: the tokenizer of 'tiny_llama' does not fit it: token ids from " in error
    assert "are not all of the model's 16" in error


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """A machine whose hub does not answer, with an empty cache; what is asked of the hub is counted."""
    asked: list[int] = []
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "BC_C4"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hub_trouble", lambda: asked.append(1) or "https://hub does not answer (no route)")
    hub._trouble.cache_clear()
    yield asked
    hub._trouble.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], no_hub: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "_configuration", lambda *_: pytest.fail("the client was asked"))
    named = [a for a in workspace.arguments() if not a.startswith("model")]
    assert main(["-m", "seed=0,1", *named, "model=opt_125m", "data.evaluation.datasets=[wikitext2,c4]"]) == 2
    assert_one_line(
        capsys,
        "hub: https://hub does not answer (no route), and neither local nor in its cache: the model facebook/opt-125m "
        "(model.path); c4 (data.paths.c4 or BC_C4); set these",
    )
    assert no_hub == [1]


def test_nobody_asks_the_hub_for_what_is_here(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], no_hub: list[int], tmp_path: Path
) -> None:
    """In a local folder, or in the hub's cache."""
    assert workspace.run("quantizer=rtn", "data.evaluation.limit=1") == 0
    repository = tmp_path / "cache" / "models--someone--model"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(workspace.shared / "llama", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert hub.has_weights("someone/model", "main") and not hub.has_weights("someone/other", "main")
    (snapshot / "model.safetensors").unlink()
    assert not hub.has_weights("someone/model", "main")
    assert not no_hub


def test_weights_of_a_vision_model_need_the_hub_too(
    capsys: pytest.CaptureFixture[str], no_hub: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bc.data.images.check", lambda *_: None)
    monkeypatch.setattr("experiments.vision.vision.load", lambda *_, **__: pytest.fail("the client was asked"))
    assert main(["model=vit_b", "data=imagenet", "quantizer=ptq4vit", "bits=w4a4", f"results_dir={tmp_path}"]) == 2
    assert_one_line(capsys, "the model timm/vit_base_patch16_224.augreg_in21k_ft_in1k (model.path); set these")
    assert no_hub == [1]


@pytest.mark.parametrize("setting", ["temperature=.nan", "temperature=.inf", "temperature=-1.0", f"seed={2**63}"])
def test_numbers_for_generate(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["checkpoint=x", "prompt=y", setting]) == 2
    assert_one_line(capsys, f"{setting.partition('=')[0]}: ", "is not allowed")
