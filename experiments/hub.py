"""What a cell needs of the hub, and whether that answers: its client tries again and again for every file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bc.data.sources import hub_is_off, hub_trouble
from bc.errors import UserError

PATIENCE = 300.0  # seconds for which an answer, or none, is believed
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz")


def require(missing: Sequence[str]) -> None:
    """Refuse at once what is neither local nor in the hub's cache, where the hub does not answer.

    It is asked only where something is missing, and while it does not answer once in five minutes: a sweep's other
    cells are told at once, and those after an outage run. Where downloads are off nothing is asked, and each thing says
    for itself that it is missing.

    Args:
        missing: What has to be downloaded, each with what to set instead.

    Raises:
        UserError: The hub does not answer.
    """
    if missing and not hub_is_off() and (trouble := _trouble(int(time.monotonic() // PATIENCE))):
        raise UserError(
            f"hub: {trouble}, and neither local nor in its cache: {'; '.join(dict.fromkeys(missing))}; "
            "set these, connect to the hub, or set HF_ENDPOINT to a mirror"
        )


@cache
def _trouble(period: int) -> str:
    """Why the hub cannot be had, found once a period."""
    return hub_trouble()


def has_weights(repo: str, revision: str) -> bool:
    """Whether weights of a model are in the hub's cache; the network is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return False
    return any(path.suffix in WEIGHTS for path in Path(folder).iterdir())
