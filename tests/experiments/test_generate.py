"""From a cell to its checkpoint to text."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path

import pytest
from tokenizers import normalizers

import bc
from bc.checkpoint import open_model, provenance_of
from bc.errors import UserError
from experiments import export
from experiments.cell import checkpoint_folder
from experiments.compose import compose_run, hydra_ready
from experiments.generate import check_length, main
from tests.conftest import tiny_model
from tests.experiments.conftest import Workspace, assert_one_line, make_tokenizer

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("preset", ["off", "channel", "sink", "positional", "paper"])
def test_a_kept_checkpoint_generates(preset: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run("quantizer=rtn", "bits=w4", f"bc={preset}", "save_model=true") == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    capsys.readouterr()
    assert main([f"checkpoint={folder}", "prompt=ab = cd", "tokens=5"]) == 0
    first = capsys.readouterr().out
    assert len(first.strip()) > len("ab = cd".replace(" ", ""))
    assert main([f"checkpoint={folder}", "prompt=ab = cd", "tokens=5"]) == 0
    assert capsys.readouterr().out == first


def test_a_complete_cell_can_still_be_kept(workspace: Workspace) -> None:
    settings = ("quantizer=rtn", "bits=w4", "bc=sink")
    assert workspace.run(*settings) == 0
    result = next(workspace.cells()[0].glob("result.json")).read_bytes()
    assert workspace.run(*settings, "save_model=true") == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    assert (folder / "quantized.safetensors").is_file()
    assert next(workspace.cells()[0].glob("result.json")).read_bytes() == result
    (folder / "quantized.safetensors").unlink()  # as a process leaves it that was killed before the weights
    assert workspace.run(*settings, "save_model=true") == 0
    assert (folder / "quantized.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["prompt=a"], "checkpoint: is missing; write checkpoint="),
        (["checkpoint=/no/such", "prompt=a"], "no quantized.safetensors"),
        (["checkpoint=/no/such", "prompt="], "prompt: is empty"),
        (["checkpoint=/no/such", "prompt=a", "tokens=0"], "tokens: 0 is not allowed"),
        (["checkpoint=/no/such", "prompt=a", "token=5"], "did you mean 'tokens'"),
        (["--help"], "'--help' is not key=value; write checkpoint=… prompt=…"),
        (["checkpoint=/no/such", "prompt=a", "tokens=many"], "tokens: 'many' is a str"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize("file", ["quantized.safetensors", "tokenizer.json"])
def test_a_damaged_checkpoint_is_one_line_and_its_command_makes_it_again(
    file: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("quantizer=rtn", "bits=w4", "bc=sink", "save_model=true")
    assert workspace.run(*settings) == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    path, whole = folder / file, (folder / file).read_bytes()
    path.write_bytes(whole[:-3])
    capsys.readouterr()
    assert main([f"checkpoint={folder}", "prompt=ab"]) == 2
    assert_one_line(capsys, file, "run its command once more with save_model=true")
    assert workspace.run(*settings) == 0
    assert main([f"checkpoint={folder}", "prompt=ab"]) == 0
    aside = folder.with_name(f"{folder.name}.damaged-1")
    assert (aside / file).read_bytes() == whole[:-3]
    made = path.stat().st_mtime_ns
    assert workspace.run(*settings) == 0  # a whole one stays
    assert path.stat().st_mtime_ns == made
    assert len(list(folder.parent.iterdir())) == 2


def test_a_checkpoint_says_where_it_comes_from(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("quantizer=rtn", "bits=w4", "bc=off", "quantizer.symmetric=true", "save_model=true")
    assert workspace.run(*settings) == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    facts = provenance_of(open_model(folder))
    result = json.loads(next(workspace.cells()[0].glob("result.json")).read_text())
    assert facts["cell"] == result["cell"] and facts["config"] == result["config"]
    for key in ("commit", "versions", "device", "seeds"):
        assert facts[key] == result["provenance"][key]
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    capsys.readouterr()
    assert export.main([f"checkpoint={folder}", f"folder={tmp_path / 'out'}"]) == 0
    assert f"made from cell {facts['cell'][:8]}, commit {facts['commit']}" in capsys.readouterr().out


@pytest.fixture
def saved(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint in the home folder, with no hashes of the tokenizer's files, as they were once written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("opt")
    bc.quantize(model, "rtn", "w4", "off", symmetric=True, device="cpu")
    bc.save(model, "~/saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_checkpoint_may_be_named_from_home(saved: Path) -> None:
    assert main(["checkpoint=~/saved", "prompt=ab", "tokens=2", "device=cpu"]) == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_damaged_tokenizer_is_told_from_none(
    file: str, content: str | None, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_text(content)
    assert main([f"checkpoint={saved}", "prompt=ab"]) == 2
    assert_one_line(capsys, "the tokenizer's", "tokenizer_config.json" if content is None else file, "is damaged")
    assert export.main([f"checkpoint={saved}", f"folder={tmp_path / 'out'}"]) == 2
    assert_one_line(capsys, "is damaged")
    assert not (tmp_path / "out").exists()
    for path in saved.glob("tokenizer*"):
        path.unlink()
    assert main([f"checkpoint={saved}", "prompt=ab"]) == 2
    assert_one_line(capsys, "no tokenizer in")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    assert export.main([f"checkpoint={saved}", f"folder={tmp_path / 'out'}"]) == 0


def test_a_prompt_without_tokens_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(saved)
    assert main([f"checkpoint={saved}", "prompt= "]) == 2
    assert_one_line(capsys, "prompt: ' ' gives this tokenizer no tokens")


def test_a_checkpoint_is_exported(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    settings = ("quantizer=rtn", "bits=w4", "bc=channel", "quantizer.symmetric=true", "save_model=true")
    assert workspace.run(*settings) == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    arguments = [f"checkpoint={folder}", f"folder={tmp_path / 'out'}"]
    assert export.main(arguments) == 0
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode  # not for its owner alone
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert export.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_cannot_be_exported_is_one_line(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    assert workspace.run("quantizer=rtn", "bits=w4", "bc=sink", "save_model=true") == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    assert export.main([f"checkpoint={folder}", f"folder={tmp_path / 'out'}"]) == 2
    assert "bc=channel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def exportable(workspace: Workspace) -> Path:
    """A checkpoint that the format can hold."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    settings = ("quantizer=rtn", "bits=w4", "bc=off", "quantizer.symmetric=true", "save_model=true")
    assert workspace.run(*settings) == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    return folder


def test_a_folder_that_cannot_be_made_is_one_line(
    exportable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for folder, said in (
        ("", "folder: is empty; name a new folder"),
        ("/proc/no", "folder: '/proc/no' cannot be made"),
        (tmp_path / "file" / "out", "is in the way"),
    ):
        capsys.readouterr()
        assert export.main([f"checkpoint={exportable}", f"folder={folder}"]) == 2
        assert_one_line(capsys, said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "folder: no space left on the disk"),
        (OSError(errno.EFBIG, "File too large"), "cannot be made (file too large)"),
    ],
)
def test_an_export_that_fails_leaves_nothing_in_the_way_of_the_next(
    error: OSError,
    said: str,
    exportable: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise error

    arguments = [f"checkpoint={exportable}", f"folder={tmp_path / 'new' / 'out'}"]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("bc.export.save_file", fails)
        assert export.main(arguments) == 2
    assert_one_line(capsys, said)
    assert not list((tmp_path / "new").iterdir())
    assert export.main(arguments) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def readme_commands() -> dict[str, list[str]]:
    """The README's commands about checkpoints: module → arguments."""
    section = re.search(r"^## Checkpoints.*?(?=^## )", README.read_text("utf8"), re.MULTILINE | re.DOTALL)
    assert section is not None
    lines = [shlex.split(line) for line in section[0].splitlines() if line.startswith("python -m experiments.")]
    return {words[2]: words[3:] for words in lines}


def test_the_readme_names_the_checkpoint_that_its_command_makes() -> None:
    commands = readme_commands()
    with hydra_ready():
        made = checkpoint_folder(compose_run(commands["experiments.run"]))
    for name in ("experiments.generate", "experiments.export"):
        assert f"checkpoint={made}" in commands[name]


def test_the_commands_of_the_readme_work(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tiny model and text in place of the embedded ones."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")
    from transformers import AutoModelForCausalLM

    commands = readme_commands()
    own = [a for a in commands["experiments.run"] if not a.startswith(("model=", "data="))]
    assert workspace.run(*own) == 0
    (folder,) = (workspace.results / "checkpoints").iterdir()
    places = {"checkpoint": folder, "folder": tmp_path / "exported"}

    def here(name: str) -> list[str]:
        split = [argument.partition("=") for argument in commands[name]]
        return [f"{key}={places.get(key, value)}" for key, _, value in split]

    capsys.readouterr()
    assert main(here("experiments.generate")) == 0
    assert capsys.readouterr().out.strip()
    assert export.main(here("experiments.export")) == 0
    assert AutoModelForCausalLM.from_pretrained(places["folder"]).config.quantization_config is not None


def test_a_text_longer_than_the_table_of_positions_is_refused() -> None:
    """OPT has such a table; LLaMA, whose positions are rotary, does not."""
    longest = tiny_model("opt").config.max_position_embeddings
    check_length(tiny_model("opt"), 5, longest - 5)
    with pytest.raises(UserError, match=rf"tokens: {longest} after the prompt's 5 .* set tokens={longest - 5} or less"):
        check_length(tiny_model("opt"), 5, longest)
    for prompt in (longest, longest + 7):
        with pytest.raises(UserError, match=rf"prompt: its {prompt} tokens leave none .*{longest} .* a shorter one$"):
            check_length(tiny_model("opt"), prompt, 1)
    check_length(tiny_model("llama"), 5, 10_000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["quantizer=rtn", "bits=w3", "bc=linear"], "save_model: checkpoint: linear maps (bc.method=linear) cannot"),
        (["quantizer=none", "bits=float"], "save_model: the float model (quantizer=none) is not saved"),
    ],
)
def test_what_cannot_be_kept_is_refused_first(
    arguments: list[str], line: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workspace.run(*arguments, "save_model=true") == 2
    error = capsys.readouterr().err
    assert line in error and "starts" not in error


def test_a_checkpoint_that_cannot_be_made_ends_no_sweep(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result stays, the next cell is run."""
    settings = ["-m", "quantizer=rtn", "bits=w4", "bc='off',channel"]
    assert workspace.run("quantizer=rtn", "bits=w4", "bc='off'") == 0
    (workspace.results / "checkpoints").write_text("a file where a folder should be")
    assert workspace.run(*settings, "save_model=true") != 0
    said = capsys.readouterr()
    text = said.out + said.err
    assert "Traceback" not in text
    assert "its result stays; the checkpoint was not made" in text or "checkpoints" in text
    statuses = [json.loads(path.read_text())["state"] for path in workspace.results.glob("cells/*/status.json")]
    assert sorted(statuses) == ["complete", "failed"]
