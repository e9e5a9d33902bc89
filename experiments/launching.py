"""Running the jobs of a sweep by submitit, so that a job that dies is one failed cell and not the end of the sweep."""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from bc import device as devices
from bc.errors import UserError
from experiments.secrets import refuse_secrets_within
from experiments.store import write_json
from experiments.sweep import DEVICE, OUTCOME, THREADS, Outcome, forget, read_outcome, say

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between looks at the local processes
LOOK = 15.0  # seconds between looks at Slurm's queue, where there is no accounting
GOING_ON = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
GOING_ON |= {"STAGE_OUT", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
EXECUTOR_ARGUMENTS = ("max_num_timeout",)


def check_launcher(config: DictConfig) -> None:
    """Refuse a launcher's settings that hold secrets.

    Args:
        config: Hydra's, as composed.

    Raises:
        UserError: Naming the setting.
    """
    section = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    refuse_secrets_within(cast("dict[str, Any]", section), "hydra.launcher")


def run_locally(
    launcher: Any, overrides: Sequence[Sequence[str]], first: int, at_once: int | None
) -> Sequence[JobReturn]:
    """Run jobs in a pool of processes on this machine; on Ctrl-C and SIGTERM the processes are stopped too.

    Args:
        launcher: The Hydra launcher, set up; its call is what a job does.
        overrides: Of every job.
        first: Number of the first job.
        at_once: Most processes at a time; None is one a GPU, and one where there is none.

    Raises:
        UserError: A setting of the launcher is malformed.
    """
    gpus = devices.visible()
    if at_once is not None and (not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1):
        raise UserError(
            f"cells_at_once: {at_once!r} is not allowed; use a whole number of 1 or more, or null for one a GPU"
        )
    slots = at_once if at_once is not None else max(1, len(gpus))
    if launcher.config.engine.device not in devices.ANY:
        gpus = []  # a certain device was asked for: every process sees them all
    # all cores for each of several processes would be too many threads; OMP_NUM_THREADS is the user's own choice
    shared = slots > 1 and "OMP_NUM_THREADS" not in os.environ
    threads = str(max(1, devices.cores() // slots)) if shared else None
    executor = make_executor(launcher, first)
    errors = Path(str(launcher.config.hydra.sweep.dir)) / "submitit.log"
    waiting = deque(enumerate(overrides, first))
    running: dict[int, tuple[int, Any]] = {}
    try:
        while waiting or running:
            for slot in range(slots):
                if slot not in running and waiting:
                    number, own = waiting.popleft()
                    gpu = gpus[slot % len(gpus)] if gpus else None
                    with _environment(DEVICE, gpu), _environment(THREADS, threads), _errors_to(errors):
                        running[slot] = number, executor.submit(launcher, *job_arguments(own, number))
            time.sleep(POLL)
            for slot, (number, job) in [item for item in running.items() if item[1][1].done()]:
                del running[slot]
                if not collect(launcher, job, number):
                    waiting.clear()
    finally:
        for _, job in running.values():
            job.cancel()
    return [nothing(own) for own in overrides]


def run_on_slurm(launcher: Any, overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Submit jobs as one array and wait for all of them; arguments as above.

    Raises:
        UserError: There is no Slurm here, a setting of the launcher is malformed, or Slurm refuses the jobs.
    """
    for program in ("srun", "sbatch"):
        if shutil.which(program) is None:
            raise UserError(
                f"hydra/launcher: slurm needs the program {program!r}, which is not found; run this on a node of the "
                f"cluster from which jobs are submitted, or use hydra/launcher=local"
            )
    executor = make_executor(launcher, first)
    arguments = [job_arguments(own, number) for number, own in enumerate(overrides, first)]
    jobs = submitted(executor, launcher, arguments)
    log.info("Slurm array %s: %d cells", jobs[0].job_id.partition("_")[0], len(jobs))
    for number, job in enumerate(jobs, first):
        wait_for_slurm(job)
        if not collect(launcher, job, number):
            for later in jobs[number - first + 1 :]:
                later.cancel(check=False)
            break
    return [nothing(own) for own in overrides]


def submitted(executor: Any, launcher: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The jobs of one array.

    Raises:
        UserError: Slurm refuses them, with what it says.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it puts into its error, too
            jobs: list[Any] = executor.map_array(launcher, *zip(*arguments, strict=True))
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).split())
        line = f"hydra.launcher: Slurm does not take the jobs: {said}; mend the setting that it names"
        raise UserError(line) from error
    return jobs


def wait_for_slurm(job: Any) -> None:
    """Wait until a job has left its result, or is over without one.

    Submitit asks Slurm's accounting what became of a job; where there is none, the queue is asked here.
    """
    over, looked = False, time.monotonic()
    while not job.done():
        time.sleep(1)
        if job.state == "UNKNOWN" and time.monotonic() - looked >= LOOK:
            before, over, looked = over, is_over(job.job_id), time.monotonic()
            if before and over:  # still so at a second look: nobody has requeued it
                return


def is_over(job: str) -> bool:
    """Whether Slurm's queue says that a job will not run on."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        return "Invalid job id" in found.stderr  # forgotten by Slurm; any other error says nothing of the job
    return not set(found.stdout.split()) & GOING_ON


def make_executor(launcher: Any, first: int) -> Any:
    """The submitit executor with the launcher's settings, named as submitit wants them, and a folder for its files.

    Args:
        launcher: The Hydra launcher, set up.
        first: Number of the first job; a sweep may come in parts.

    Raises:
        UserError: A setting is malformed.
    """
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    folder = Path(str(launcher.config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    if first == 0:
        forget(folder)
    kind, settings = launcher._EXECUTOR, dict(launcher.params)
    own = {f"{kind}_{key}": settings.pop(key) for key in EXECUTOR_ARGUMENTS if key in settings}
    executor = submitit.AutoExecutor(settings.pop("submitit_folder"), cluster=kind, **own)
    shared = OmegaConf.structured(BaseQueueConf)  # what submitit calls by one name for every kind of cluster
    for key in settings.keys() & set(shared):
        try:
            OmegaConf.update(shared, key, settings[key])
        except ValidationError as error:
            why = str(error).partition("\n")[0]
            raise UserError(f"hydra.launcher.{key}: {settings[key]!r} is not allowed ({why})") from error
    try:
        executor.update_parameters(**{k if k in shared else f"{kind}_{k}": v for k, v in settings.items()})
    except (NameError, AssertionError) as error:  # a setting that was added with "+", unknown or of another type
        raise UserError(f"hydra.launcher: {' '.join(str(error).split())}; leave that setting out") from error
    return executor


def job_arguments(overrides: Sequence[str], number: int) -> tuple[Any, ...]:
    """What a submitit launcher is called with in the job's process."""
    return list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state()


def collect(launcher: Any, job: Any, number: int) -> bool:
    """Tell what came of a job that has ended; one that left no outcome is recorded as failed.

    Returns:
        Whether the sweep is to go on.
    """
    config = launcher.config
    folder = Path(str(config.hydra.sweep.dir)) / str(number)
    outcome = read_outcome(folder / OUTCOME)
    if outcome is None:
        line = f"cell {number} of the sweep: its process died or was killed; run the sweep again, or see {log_of(job)}"
        outcome = Outcome("failed", "", line)
        write_json(folder / OUTCOME, asdict(outcome))
    say(outcome)
    return outcome.state != "failed" or config.get("on_error") != "raise"


def log_of(job: Any) -> Path:
    """The log file of a job that says most: what it wrote on standard error, if anything."""
    errors = Path(job.paths.stderr)
    return errors if errors.exists() and errors.stat().st_size else Path(job.paths.stdout)


def nothing(overrides: Sequence[str]) -> JobReturn:
    """What Hydra gets for a job: outcomes are collected from the disk."""
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=None)


@contextmanager
def _errors_to(path: Path) -> Iterator[None]:
    """Let the processes that are started meanwhile write their errors to a file.

    Submitit's own process beside every job ends with a traceback where the user presses Ctrl-C.
    """
    kept = os.dup(2)
    with path.open("a") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _environment(key: str, value: str | None) -> Iterator[None]:
    """Set a variable for the processes that are started meanwhile."""
    before = os.environ.pop(key, None)
    if value is not None:
        os.environ[key] = value
    try:
        yield
    finally:
        os.environ.pop(key, None)
        if before is not None:
            os.environ[key] = before
