"""Files that are spoilt for real, disks that are full or forbidden, devices that are too small, NaN and Inf."""

from __future__ import annotations

import json
import logging.config
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import cell, language, status, store, tables
from experiments.run import tidy
from tests.conftest import tiny_model
from tests.experiments.conftest import Workspace, make_tokenizer

ROOT = Path(__file__).parents[2]
RTN = ("quantizer=rtn", "bits=w3", "bc=sink")


def only(workspace: Workspace) -> Path:
    (folder,) = workspace.cells()
    return folder


def read(workspace: Workspace) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((only(workspace) / "result.json").read_text())
    return value


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


# Results and artefacts ------------------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_result_goes_unseen(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    assert workspace.run(*RTN) == 0
    path = only(workspace) / "result.json"
    good = path.read_bytes()
    sealed = store.check_result(json.loads(good), "")
    cells = store.CellStore(workspace.results, path.parent.name, sealed["cell"])
    unharmed = 0
    for bit in range(3, len(good) * 8, 61):
        path.write_bytes(good)
        flip(path, bit)
        found = cells.result()
        assert found is None or found == sealed, f"bit {bit}"
        unharmed += found is not None  # a space between two tokens became another
    assert unharmed < len(good) // 8
    assert len(list(path.parent.glob("result.json.damaged-*"))) > len(good) // 16


def test_a_changed_value_is_found_and_made_again(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*RTN) == 0
    path = only(workspace) / "result.json"
    good = read(workspace)
    value = repr(good["metrics"][0]["value"])
    path.write_text(path.read_text().replace(value, f"9{value[1:]}"))
    assert workspace.run(*RTN) == 0
    assert "was changed after it was written" in capsys.readouterr().out
    assert read(workspace)["metrics"] == good["metrics"]


def test_a_result_from_before_checksums_stays(workspace: Workspace) -> None:
    assert workspace.run(*RTN) == 0
    path = only(workspace) / "result.json"
    old = {name: value for name, value in read(workspace).items() if name in store.BEFORE_CHECKSUMS}
    path.write_text(json.dumps(old))
    assert workspace.run(*RTN) == 0
    assert read(workspace) == old


@pytest.mark.parametrize("kind", ["weights-*.safetensors", "means-*/means.safetensors"])
@pytest.mark.parametrize("damage", ["header", "middle", "end", "half", "empty"])
def test_spoilt_artefacts(workspace: Workspace, kind: str, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace.run(*RTN) == 0
    good = read(workspace)
    (path,) = (workspace.results / "artefacts").glob(kind)
    size = path.stat().st_size
    if damage in ("half", "empty"):
        os.truncate(path, size // 2 if damage == "half" else 0)
    else:
        flip(path, {"header": 8 * 40, "middle": 8 * (size // 2), "end": 8 * size - 1}[damage])
    spoilt = path.read_bytes()
    (only(workspace) / "result.json").unlink()
    assert workspace.run(*RTN) == 0
    assert "moved to" in capsys.readouterr().out
    assert read(workspace)["metrics"] == good["metrics"]
    aside = [p for p in (workspace.results / "artefacts").rglob("*") if "damaged-1" in str(p) and p.is_file()]
    assert [p.read_bytes() for p in aside] == [spoilt]


def test_clocks_that_disagree(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Files from the future and the distant past are what they are: nothing depends on a time stamp."""
    assert workspace.run(*RTN) == 0
    good = (only(workspace) / "result.json").read_bytes()
    for years in (30, -40):
        moment = (datetime.now(UTC) + timedelta(days=365 * years)).timestamp()
        for path in workspace.results.rglob("*"):
            os.utime(path, (moment, moment))
        (only(workspace) / "status.json").write_text(
            json.dumps({"state": "running", "started": datetime.fromtimestamp(moment, UTC).isoformat()})
        )
        capsys.readouterr()
        assert workspace.run(*RTN) == 0
        assert "complete already" in capsys.readouterr().out
        assert (only(workspace) / "result.json").read_bytes() == good
    (only(workspace) / "result.json").unlink()
    assert [status.state_of(s)[0] for s in status.stores(workspace.results, None, ())] == ["interrupted"]
    assert workspace.run(*RTN) == 0
    assert read(workspace)["metrics"] == json.loads(good)["metrics"]


# Disks ----------------------------------------------------------------------------------------------------------------


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def forbid(self) -> None:
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # closes this process's log files
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)

    def fill(self) -> Path:
        ballast = self.folder / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        return ballast

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here ({mounted.stderr.strip()})")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "Writing model shards" not in line]
    assert len(lines) == 1, lines
    return lines[0]


LATE = {"weights": "quantized_weights", "means": "float_statistics", "result": "window_losses"}


@pytest.mark.parametrize("moment", ["before the sweep", *LATE])
def test_full_disk(
    shared: Path, disk: Disk, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(shared, disk.folder / "results")
    assert workspace.run("quantizer=none", "bits=float") == 0
    complete = only(workspace) / "result.json"
    before = complete.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        if moment == "before the sweep":
            disk.fill()
        else:
            name = LATE[moment]
            module = language if moment == "result" else cell
            original = getattr(module, name)

            def late(*arguments: Any, **more: Any) -> Any:
                value = None if moment != "result" else original(*arguments, **more)
                disk.fill()
                return value if moment == "result" else original(*arguments, **more)

            patch.setattr(module, name, late)
        assert workspace.run(*RTN) == 2
    line = one_line(capsys)
    assert line.startswith("error: results_dir: no space left on the disk")
    assert line.endswith("free some, and run the same command again")
    (disk.folder / "ballast").unlink()
    assert workspace.run(*RTN) == 0
    assert complete.read_bytes() == before
    assert len(list((workspace.results / "cells").glob("*/result.json"))) == 2
    assert not list(workspace.results.rglob("*.damaged-*"))


@pytest.mark.parametrize("settings", [["engine.activations=disk"], ["engine.memory_mib=0"]])
def test_full_disk_for_activations(
    workspace: Workspace,
    disk: Disk,
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TMPDIR", str(disk.folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    samples = "data.calibration.samples=200"  # 400 KiB of activations
    disk.resize("200k")
    assert workspace.run(*RTN, samples, *settings) == 2
    line = one_line(capsys)
    assert line.startswith(f"error: TMPDIR: no space left on the disk of '{disk.folder}'")
    assert line.endswith("free some, and run the same command again")
    assert not list(disk.folder.iterdir())
    disk.resize("8m")
    assert workspace.run(*RTN, samples, *settings) == 0
    on_disk = read(workspace)
    (only(workspace) / "result.json").unlink()
    shutil.rmtree(workspace.results / "artefacts")
    assert workspace.run(*RTN, samples) == 0
    assert read(workspace)["metrics"] == on_disk["metrics"]


def test_read_only_results(shared: Path, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(shared, disk.folder / "results")
    assert workspace.run(*RTN) == 0
    disk.forbid()
    capsys.readouterr()
    assert workspace.run(*RTN[:-1], "bc=channel") == 2
    line = one_line(capsys)
    assert line.startswith("error: results_dir: cannot be written (read-only file system")
    assert line.endswith("set results_dir to a folder of yours")
    assert status.main(["--results", str(workspace.results)]) == 0
    assert capsys.readouterr().out.startswith("complete")
    assert tables.main(["demo", "--results", str(workspace.results)]) == 2
    assert one_line(capsys).startswith("error: --results: cannot be written")


# Memory and numbers ---------------------------------------------------------------------------------------------------

# every sample needs 256 MiB more: with 800 MiB to spare, the allocator refuses batches of 4 and gives those of 2
SMALL_MACHINE = """
import resource, sys, torch
from experiments import language, run
evaluate, each, spare = language.window_losses, 2**28, int(sys.argv.pop(1))
def hungry(model, windows, engine):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
    try:
        torch.empty(engine.batch_size * each, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return evaluate(model, windows, engine)
language.window_losses = hungry
sys.exit(run.main())
"""


def on_small_machine(workspace: Workspace, spare: int) -> subprocess.CompletedProcess[str]:
    arguments = tidy(workspace.arguments("llama", *RTN))
    command = [sys.executable, "-c", SMALL_MACHINE, str(spare), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_out_of_memory_halves_the_batch(workspace: Workspace) -> None:
    done = on_small_machine(workspace, 800 * 2**20)
    assert done.returncode == 0, done.stderr
    assert "out of memory with batches of 4; tries again with 2" in done.stdout
    assert read(workspace)["provenance"]["batch_size"] == 2
    assert read(workspace)["provenance"]["batch_halvings"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_out_of_memory_with_single_samples_fails_with_advice(workspace: Workspace) -> None:
    done = on_small_machine(workspace, 100 * 2**20)
    assert done.returncode == 2
    assert done.stdout.count("out of memory") == 2  # 4, 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "engine.batch_size: out of memory on cpu with batches of 1; use shorter windows" in line
    assert "Traceback" not in done.stderr
    assert json.loads((only(workspace) / "status.json").read_text())["state"] == "failed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_out_of_memory_on_a_gpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original = language.window_losses

    def hungry(model: Any, windows: Any, engine: Any) -> float:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(engine.batch_size * free // 3, dtype=torch.uint8, device=engine.device)
        return original(model, windows, engine)

    monkeypatch.setattr(language, "window_losses", hungry)
    overrides = [a for a in workspace.arguments("llama", *RTN) if not a.startswith("engine.device")]
    assert cell_main([*overrides, "engine.device=cuda"]) == 0
    assert read(workspace)["provenance"]["batch_size"] == 2


def cell_main(arguments: list[str]) -> int:
    from experiments.run import main

    return main(arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("overrides", "site"),
    [
        (("quantizer=none", "bits=float"), "model.layers.1.post_attention_layernorm: the output"),
        (("quantizer=rtn", "bc='off'"), "model.layers.1.post_attention_layernorm: the output"),
        (("quantizer=rtn", "bc=sink"), "model.layers.1.mlp.gate_proj: the bias"),
        (("quantizer=rtn", "bc=paper"), "model.layers.1.mlp.gate_proj: the bias"),
        (("quantizer=gptq", "bc='off'"), "model.layers.1.mlp.gate_proj: the inputs"),
        (("quantizer=awq", "bc=sink"), "model.layers.1.mlp.gate_proj: the inputs"),
    ],
)
def test_numbers_that_are_not_finite(
    workspace: Workspace,
    tmp_path: Path,
    value: float,
    overrides: tuple[str, ...],
    site: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = value
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    assert workspace.run(*overrides, f"model.path={tmp_path / 'model'}") == 1
    assert f"{site} " in capsys.readouterr().err
    record = json.loads((only(workspace) / "status.json").read_text())
    assert record["state"] == "failed"
    assert record["error"].startswith(site)
    assert not (only(workspace) / "result.json").exists()
