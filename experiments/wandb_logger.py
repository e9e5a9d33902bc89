"""Weights & Biases as a mirror: a result is complete without it, and its failures are told, never passed on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from bc.errors import UserError
from experiments.config import LoggerConfig, RunConfig
from experiments.identity import bc_name, cell_hash, scientific
from experiments.secrets import redact
from experiments.store import check_result
from experiments.wandb_sync import remove_superseded, upload_in_background

log = logging.getLogger(__name__)
TAG_LENGTH = 64  # W&B's limit
RESULT_KEY = "result_json"  # summary entry: the result file as text, so that no digit is lost


class Mirror:
    """The W&B run of one cell; every method is safe to call in any order and never raises.

    Args:
        run: The cell and the logger's settings.
        name: Display name of the run.
    """

    def __init__(self, run: RunConfig, name: str) -> None:
        self.config, self.name = run, name
        self._run: Any = None
        self._exit_code = 0

    def start(self) -> None:
        """Open the run, unless it is open: id = cell hash, group = experiment."""
        settings = self.config.logger
        if self._run is None and settings.name != "none" and settings.mode != "disabled":
            self._guard(self._open)

    def log(self, values: dict[str, Any]) -> None:
        """Mirror scalars."""
        if self._run is not None:
            self._guard(lambda: self._run.log(values))

    def complete(self, result: dict[str, Any], sites: list[dict[str, Any]]) -> None:
        """Mirror a committed result and its table of errors per site."""
        if self._run is not None:
            self._guard(lambda: self._send(result, sites))

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed."""
        self._exit_code = 1
        if self._run is not None:
            self._guard(lambda: self._run.summary.update({"error": redact(str(error))}))

    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._guard(lambda: self._run.finish(exit_code=self._exit_code))
            self._run = None
            if self.config.logger.mode == "online":
                self._guard(lambda: upload_in_background(self.config.results))

    def _open(self) -> None:
        import wandb

        run, settings = self.config, self.config.logger
        folder = run.results.absolute()
        folder.mkdir(parents=True, exist_ok=True)  # W&B makes its own folder "wandb" in it
        remove_superseded(folder, cell_hash(run.cell))
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode="offline",  # also with mode=online: what is on the disk is uploaded beside the cells
            dir=str(folder),
            id=cell_hash(run.cell),
            name=self.name,
            group=run.experiment,
            tags=self._tags(),
            config=scientific(run.cell),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _tags(self) -> list[str]:
        cell = self.config.cell
        own = [
            cell.model.name,
            cell.quantizer,
            cell.bits.label,
            f"bc-{bc_name(cell)}",
            f"seed-{cell.seed}",
        ]
        return [tag[:TAG_LENGTH] for tag in dict.fromkeys([*own, *self.config.logger.tags])]

    def _send(self, result: dict[str, Any], sites: list[dict[str, Any]]) -> None:
        import wandb

        if sites:
            columns = list(dict.fromkeys(key for row in sites for key in row))
            rows = [[row.get(key) for key in columns] for row in sites]
            self._run.log({"sites": wandb.Table(columns=columns, data=rows)})
        self._run.summary.update({k: v for k, v in result.items() if isinstance(v, int | float)})
        self._run.summary.update({RESULT_KEY: json.dumps(result, sort_keys=True)})

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # rule: the mirror never fails a cell
            reason = redact(" ".join(str(error).split())) or type(error).__name__
            log.warning("warning: W&B: %s; the result files are not affected", reason)


def read_results(settings: LoggerConfig) -> Iterator[dict[str, Any]]:
    """Results of all runs of a W&B project, validated as result files are.

    Args:
        settings: Project and entity.

    Raises:
        UserError: W&B cannot be read.
    """
    import wandb

    project = "/".join(part for part in (settings.entity, settings.project) if part)
    try:
        runs = list(wandb.Api().runs(project))
    except Exception as error:  # the client's errors share no base that its users may import
        reason = " ".join(str(error).split())
        raise UserError(
            f"logger.project: W&B's {project!r} cannot be read ({reason}); log in, or use --from files"
        ) from error
    for run in runs:
        text = run.summary.get(RESULT_KEY)
        if text is None:
            continue  # it did not complete
        try:
            yield check_result(json.loads(text), f"W&B run {run.id}")
        except ValueError as error:
            log.warning("warning: %s; it is left out", error)
