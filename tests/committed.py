"""What is under version control, whatever was run since in the working tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def committed(path: str) -> bytes:
    """A file as it was committed last; as it lies there where this is no repository."""
    done = subprocess.run(["git", "-C", str(ROOT), "show", f"HEAD:{path}"], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else (ROOT / path).read_bytes()
