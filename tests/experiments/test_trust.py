"""Files and names from strangers: nothing of theirs is run, nothing is written where it should not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import status
from experiments.run import main, tidy
from experiments.secrets import redact, refuse_secrets_within
from tests.conftest import tiny_model
from tests.experiments.conftest import Workspace, make_tokenizer

ROOT = Path(__file__).parents[2]
RTN = ("quantizer=rtn", "bits=w3", "bc='off'")
SECRETS = {
    "WANDB_API_KEY": "local-5ec2e7a0" + "b" * 30,
    "HF_TOKEN": "hf_5ec2e7tokenOfTheHub0123",
    "MY_CLUSTER_PASSWORD": "5ec2e7-password",
}


class Malicious:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def failure(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# Code -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["code", "model"])
def test_pickles_of_more_than_tensors_are_refused_with_a_way_out(
    workspace: Workspace, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    model: Any = tiny_model("llama")
    save(model, folder)
    (folder / "model.safetensors").unlink()
    content = model if kind == "model" else model.state_dict() | {"x": Malicious(canary)}
    torch.save(content, folder / "pytorch_model.bin")
    assert workspace.run(*RTN, f"model.path={folder}") == 2
    line = failure(capsys)
    assert "is a pickle of more than tensors" in line
    assert not canary.exists()
    if kind == "model":  # the way out is one that leads out
        code = line.partition('python -c "')[2].partition('" FILE')[0]
        subprocess.run([sys.executable, "-c", code, "pytorch_model.bin"], cwd=folder, check=True)
        (folder / "pytorch_model.bin").unlink()
        assert workspace.run(*RTN, f"model.path={folder}") == 0


def test_plain_tensors_in_a_bin_file_are_read(workspace: Workspace, tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    save(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert workspace.run(*RTN, f"model.path={tmp_path / 'model'}") == 0


def test_code_beside_a_model_is_not_run(workspace: Workspace, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    save(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "own.Own")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Own: pass\n")
    assert workspace.run(*RTN, f"model.path={folder}") == 0
    assert not canary.exists()


@pytest.mark.parametrize(
    "override",
    [
        "model.trust_remote_code=true",
        "+model.trust_remote_code=true",
        "+data.trust_remote_code=true",
        "+trust_remote_code=true",
        "+model._target_=os.mkdir",
        "+quantizer._target_=os.mkdir",
        "+bc._target_=os.mkdir",
    ],
)
def test_no_setting_makes_code_run(workspace: Workspace, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*RTN, override) == 2
    assert "is not known" in failure(capsys)
    assert not workspace.cells()


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../outside", "..", "/etc/outside", "a/../../../outside", ".hidden", "a b;c", "x" * 300, "ä\u202eö"]
)
def test_names_stay_within_results(workspace: Workspace, name: str, tmp_path: Path) -> None:
    before = {p for p in tmp_path.rglob("*") if not p.is_relative_to(workspace.results)}
    assert workspace.run(*RTN, f"model.name='{name}'", "save_model=true") == 0
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(workspace.results)} == before
    (folder,) = workspace.cells()
    assert folder.parent == workspace.results / "cells"
    assert (folder / "result.json").is_file()
    (kept,) = (workspace.results / "checkpoints").iterdir()
    assert kept.name == folder.name
    assert [state for state, _ in map(status.state_of, status.stores(workspace.results, None, ()))] == ["complete"]


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside"])
def test_an_experiment_is_a_name(workspace: Workspace, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"+experiment={name}", f"results_dir={workspace.results}"]) == 2
    failure(capsys)
    assert workspace.run(*RTN, f"experiment.name={name}") == 0
    outside = [p for p in workspace.results.rglob("*") if "outside" in p.name]
    assert outside == []


# Secrets --------------------------------------------------------------------------------------------------------------


def everything(folder: Path) -> bytes:
    return b"\n".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_no_secret_in_results_and_logs(workspace: Workspace) -> None:
    """A cell that completes and one that fails, mirrored by W&B's client, with keys and tokens in the environment."""
    code = (
        "import os, sys\n"
        "from experiments import language, run\n"
        "original = language.window_losses\n"
        "def evaluate(*arguments):\n"
        "    if 'bits=w4' in ' '.join(sys.argv):\n"
        "        raise OSError('401 for https://me:secret5ec2e7@hub/x with ' + ' '.join(os.environ.values()))\n"
        "    return original(*arguments)\n"
        "language.window_losses = evaluate\n"
        "sys.exit(run.main())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} | SECRETS
    environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"
    said = b""
    for bits, status_code in (("w3", 0), ("w4", 1)):
        arguments = workspace.arguments("llama", "quantizer=rtn", f"bits={bits}", "logger=wandb", "logger.mode=online")
        done = subprocess.run(
            [sys.executable, "-c", code, *tidy(arguments)], cwd=ROOT, env=environment, capture_output=True, check=False
        )
        assert done.returncode == status_code, done.stderr
        said += done.stdout + done.stderr
    written = everything(workspace.results)
    assert b"401 for https" in written
    assert b"401 for https" in said
    for text in (written, said):
        assert b"5ec2e7" not in text


def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    assert workspace.run(*RTN, f"+logger.api_key={SECRETS['WANDB_API_KEY']}") == 2
    line = failure(capsys)
    assert line.startswith("error: +logger.api_key: its value is a secret")
    assert "5ec2e7" not in line
    assert not workspace.results.exists()


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ("export HF_TOKEN=5ec2e7-of-the-hub", "HF_TOKEN's value is a secret"),
        ("export WANDB_API_KEY='5ec2e7-of-wandb'", "WANDB_API_KEY's value is a secret"),
        ("login hf_5ec2e7tokenOfTheHub0123", "its value is a secret"),
        ("export HF_TOKEN=${oc.env:MY_CLUSTER_PASSWORD}", "HF_TOKEN's value is a secret"),  # it would be written out
    ],
)
@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_secret_in_a_launchers_configuration_is_refused_before_anything_is_written(
    workspace: Workspace,
    launcher: str,
    setup: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file beside ours, which the command line only names."""
    pytest.importorskip("submitit", reason="the launchers need the extra 'cluster'")
    monkeypatch.setenv("MY_CLUSTER_PASSWORD", SECRETS["MY_CLUSTER_PASSWORD"])
    mine = tmp_path / "hydra/launcher/mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(f'defaults: [{launcher}, _self_]\nsetup: ["module load cuda", "{setup}"]\n')
    assert workspace.run("-m", *RTN, "hydra/launcher=mine", "--config-dir", str(tmp_path)) == 2
    line = failure(capsys)
    assert line.startswith(f"error: hydra.launcher.setup: {says}")
    assert "5ec2e7" not in line
    assert not workspace.results.exists()


@pytest.mark.parametrize(
    "setup", ["export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$MINE"', "export HF_TOKEN", "export HF_HOME=/x"]
)
def test_a_launcher_may_read_secrets_from_elsewhere(setup: str) -> None:
    refuse_secrets_within({"setup": [setup], "name": "${hydra.job.name}", "mem_gb": None}, "hydra.launcher")


def test_redaction(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = f"key {SECRETS['WANDB_API_KEY']} at https://u:pw@host/a?b and hf_{'A1' * 12}, a word"
    assert redact(text) == "key <WANDB_API_KEY> at https://…@host/a?b and hf_…, a word"


def test_yaml_from_strangers_makes_no_objects(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.generate import main as generate

    assert generate(["checkpoint=x", "tokens=!!python/object/apply:os.getpid []"]) == 2
    assert "could not determine a constructor" in failure(capsys)
