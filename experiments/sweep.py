"""The job that Hydra runs for every cell, and the collection of what came of them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from bc import device as devices
from bc.errors import UserError
from experiments.cell import Outcome, run_cell
from experiments.compose import job_config
from experiments.disk import disk_error, one_line_disk_errors
from experiments.secrets import redact
from experiments.store import InvalidResultError, read_json, write_json

log = logging.getLogger(__name__)
OUTCOME = "outcome.json"
DEVICE = "BC_DEVICE"  # environment variable: the GPU that a process of the local launcher is to use
THREADS = "BC_THREADS"  # … and the number of its CPU threads


class State:
    """What this process knows of the sweep."""

    outcomes: ClassVar[list[Outcome] | None] = None  # all that came of the sweep, once Hydra has ended it
    stopped: ClassVar[bool] = False  # a cell failed and on_error=raise: the remaining jobs do nothing
    said: ClassVar[set[str]] = set()  # errors that have been told
    ran: ClassVar[bool] = False  # a job was run in this process
    own: ClassVar[list[Outcome]] = []  # what came of the jobs that were run in this process

    @classmethod
    def reset(cls) -> None:
        """Forget an earlier sweep of this process."""
        cls.outcomes, cls.stopped, cls.said, cls.ran, cls.own = None, False, set(), False, []


def job(config: DictConfig) -> None:
    """Run the cell of one Hydra job and leave its outcome in the job's folder."""
    State.ran = True
    take_share()
    hydra = HydraConfig.get()
    outcome = Outcome("not run") if State.stopped else _run(config, list(hydra.overrides.task))
    State.own.append(outcome)
    try:
        write_json(Path(hydra.runtime.output_dir) / OUTCOME, asdict(outcome))
    except OSError as error:
        if disk_error(error) is None:
            raise  # otherwise the sweep goes on: what it has to say of the disk has been said
    if outcome.state == "failed" and config.get("on_error") == "raise":
        State.stopped = True


def _run(config: DictConfig, overrides: list[str]) -> Outcome:
    try:
        refuse_launcher()
        run = job_config(config, overrides)
        with one_line_disk_errors(results=run.results):  # before the cell could say "running"
            outcome = run_cell(run)
    except UserError as error:
        outcome = Outcome("failed", "", str(error), mistake=True)
    outcome = replace(outcome, line=redact(outcome.line))
    say(outcome)
    return outcome


def refuse_launcher() -> None:
    """Refuse a launcher for a single run, for which Hydra would not use it.

    Raises:
        UserError: One is asked for, and this is no sweep.
    """
    hydra = HydraConfig.get()
    asked = any(override.startswith("hydra/launcher=") for override in hydra.overrides.hydra)
    if asked and hydra.mode == RunMode.RUN and hydra.runtime.choices["hydra/launcher"] != "basic":
        chosen = hydra.runtime.choices["hydra/launcher"]
        raise UserError(f"hydra/launcher: {chosen} is for sweeps, and this is a single run; add -m, or leave it out")


def say(outcome: Outcome) -> None:
    """Tell what came of a cell."""
    if outcome.state != "failed":
        log.info("%s", outcome.line)
        return
    if outcome.line not in State.said:  # a mistake in one setting would be told once for every cell
        print(f"error: {outcome.line}", file=sys.stderr, flush=True)
        State.said.add(outcome.line)
    if outcome.slug:
        log.info("%s: failed", outcome.slug)


class Collect(Callback):
    """Reads the outcomes of all jobs when Hydra has ended them, wherever they ran."""

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """See :class:`hydra.experimental.callback.Callback`."""
        State.outcomes = collect(Path(config.hydra.run.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """See :class:`hydra.experimental.callback.Callback`."""
        State.outcomes = collect(Path(config.hydra.sweep.dir))


def collect(folder: Path) -> list[Outcome]:
    """Outcomes of the jobs of this process; where it only launched them, those that they left in a sweep's folder."""
    return State.own or [outcome for path in outcome_files(folder) if (outcome := read_outcome(path))]


def outcome_files(folder: Path) -> list[Path]:
    """What the jobs of a sweep left in their numbered folders; below an odd one others' sweeps may lie."""
    return sorted(path for path in folder.glob(f"*/{OUTCOME}") if path.parent.name.isdigit())


def forget(folder: Path) -> None:
    """Remove what an earlier sweep left in the same folder, or it would be taken for what came of this one."""
    for path in outcome_files(folder):
        path.unlink(missing_ok=True)


def read_outcome(path: Path) -> Outcome | None:
    """The outcome that a job left; None where there is none, or none that can be read."""
    try:
        return Outcome(**read_json(path)) if path.exists() else None
    except (InvalidResultError, TypeError) as error:
        log.warning("warning: %s: no outcome of a cell (%s)", path, error)
        return None


def take_share() -> None:
    """Let a process of the local launcher use only the GPU and threads that it was given; before any is used."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    if name := os.environ.get(DEVICE):
        devices.restrict(name)
    if threads := os.environ.get(THREADS):
        torch.set_num_threads(int(threads))


def exit_code(outcomes: list[Outcome] | None, say: Callable[[str], None]) -> int:
    """Exit status of a run or sweep: 0, 1 where a cell failed, 2 where all failures are the user's to mend."""
    if outcomes is None:
        return 1
    failed = [o for o in outcomes if o.state == "failed"]
    if len(outcomes) > 1:
        counts = {s: sum(o.state == s for o in outcomes) for s in ("complete", "skipped", "busy", "failed", "not run")}
        say(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if not failed:
        return 0
    return 2 if all(o.mistake for o in failed) else 1
