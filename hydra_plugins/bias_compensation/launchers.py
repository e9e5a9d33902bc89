"""Hydra's submitit launchers for sweeps that outlive their jobs; what they do is in :mod:`experiments.launching`.

A thin shell, for Hydra imports every plugin whenever it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher as Submitit
except ImportError:  # without the extra "cluster" Hydra knows neither these launchers nor their configurations
    pass
else:

    class Launcher(Submitit):
        """What is the same for all."""

        def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
            """See :class:`hydra.plugins.launcher.Launcher`; comes before anything is written."""
            from experiments.launching import check_launcher

            check_launcher(config)
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    class LocalLauncher(Launcher):
        """Cells in a pool of processes on this machine, each with a GPU of its own where there are several.

        Args:
            cells_at_once: Most processes at a time; null is one a GPU, and one where there is none.
            params: Of submitit.
        """

        _EXECUTOR = "local"

        def __init__(self, cells_at_once: int | None = None, **params: Any) -> None:
            super().__init__(**params)
            self.cells_at_once = cells_at_once

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """See :class:`hydra.plugins.launcher.Launcher`."""
            from experiments.launching import run_locally

            return run_locally(self, job_overrides, initial_job_idx, self.cells_at_once)

    class SlurmLauncher(Launcher):
        """Cells as the tasks of a Slurm job array."""

        _EXECUTOR = "slurm"

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """See :class:`hydra.plugins.launcher.Launcher`."""
            from experiments.launching import run_on_slurm

            return run_on_slurm(self, job_overrides, initial_job_idx)
