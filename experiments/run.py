"""Run one cell, a sweep or an experiment: ``python -m experiments.run --help``."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from bc.errors import UserError
from experiments.compose import CONFIG_MODULE, CONFIG_NAME, from_hydra, one_line, refuse_lists
from experiments.disk import one_line_disk_errors
from experiments.secrets import redact, refuse_secrets
from experiments.sweep import State, exit_code, job
from hydra_plugins.bias_compensation import launchers

INTERRUPTED, TERMINATED = 130, 143  # what shells expect after SIGINT and SIGTERM


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
def hydra_main(config: DictConfig) -> None:
    """Hand a job's configuration on."""
    job(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Of the process by default.

    Returns:
        0; 1 where a cell failed; 2 for a mistake in the input; 130 or 143 where it was stopped.
    """
    if arguments is not None:
        sys.argv[1:] = arguments
    sys.argv[1:] = tidy(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes exceptions on instead of printing tracebacks
    logging.raiseExceptions = False  # a log file on a full disk is no reason for tracebacks
    signal.signal(signal.SIGTERM, _terminated)
    State.reset()
    register_launchers()
    try:
        refuse_secrets(sys.argv[1:])
        refuse_lists(sys.argv[1:])
        with one_line_disk_errors():
            hydra_main()
    except Exception as error:
        if not isinstance(error, UserError) and not from_hydra(error):
            raise
        print(f"error: {redact(str(one_line(error)))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    if State.outcomes is None and not State.ran:  # --help, --cfg and the like
        return 0
    return exit_code(State.outcomes, print)


def register_launchers() -> None:
    """Make our launchers known to Hydra, which by itself looks in the current folder and among installed packages."""
    for name in ("LocalLauncher", "SlurmLauncher"):
        if found := getattr(launchers, name, None):  # absent without the extra "cluster"
            Plugins.instance().register(found)


def tidy(arguments: Sequence[str]) -> list[str]:
    """Accept ``experiment=NAME`` for ``+experiment=NAME``, ``-m`` anywhere, and ``key=~/…``, which Hydra does not."""
    flags = [a for a in arguments if a in ("-m", "--multirun")]
    home = str(Path.home())
    rest = [re.sub(r"^([\w.]+=)~(?=/|$)", lambda found: found[1] + home, a) for a in arguments if a not in flags]
    return flags[:1] + [f"+{a}" if a.startswith("experiment=") else a for a in rest]


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


if __name__ == "__main__":
    from experiments.run import main as _main  # not __main__'s copy, so that job processes can import what they run

    sys.exit(_main())
