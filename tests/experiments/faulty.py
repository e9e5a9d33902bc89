"""The command line with places where a cell stops and waits, so that a test can kill it there: ``python -m`` this.

The environment variable ``FAULTS`` holds a JSON list of ``{"place", "flag", "when"}``: the first time that a cell with
the overrides ``when`` comes to the place, it makes the file ``flag`` and waits for whatever the test does to it. The
second time it passes. Job processes of a launcher inherit the variable. ``SEEN`` names a folder in which every job
leaves a file ``seen-N`` with the GPUs that it may use.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bc import pipeline, storage
from experiments import language, run, store, sweep
from experiments.compose import CONFIG_MODULE, CONFIG_NAME

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds that a cell waits, and that a test waits for it


def wait_once(flag: Path) -> None:
    """Stop here until something happens to this process; at once where it has stopped here before."""
    if flag.exists():
        return
    flag.write_text(str(os.getpid()))
    time.sleep(PATIENCE)
    raise AssertionError("nothing happened")


def before(module: Any, name: str, flag: Path, after_calls: int = 0) -> None:
    """Stop before a call of a function."""
    original, calls = getattr(module, name), [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after_calls:
            wait_once(flag)
        return original(*args, **kwargs)

    setattr(module, name, stopping)


def calibrating(flag: Path) -> None:
    """Stop between the first and the second block."""
    before(pipeline, "_calibrate_unit", flag, after_calls=1)


def evaluating(flag: Path) -> None:
    before(language, "window_losses", flag)


def writing_result(flag: Path) -> None:
    """Stop when half of the result file is on the disk, under its temporary name."""
    original: Callable[..., None] = json.dump

    def halfway(value: Any, stream: Any, **options: Any) -> None:
        if Path(stream.name).name.startswith(f".{store.RESULT}"):
            text = json.dumps(value, **options)
            stream.write(text[: len(text) // 2])
            stream.flush()
            wait_once(flag)
            stream.seek(0)
        original(value, stream, **options)

    store.json.dump = halfway


def writing_artefact(flag: Path) -> None:
    """Stop when half of the quantized weights are on the disk, under their temporary name."""
    original = storage.save_file

    def halfway(tensors: Any, path: str, metadata: Any) -> None:
        original(tensors, path, metadata)
        if Path(path).name.startswith("weights-"):
            os.truncate(path, Path(path).stat().st_size // 2)
            wait_once(flag)
            original(tensors, path, metadata)

    storage.save_file = halfway


PLACES = {f.__name__: f for f in (calibrating, evaluating, writing_result, writing_artefact)}


def job(config: DictConfig) -> None:
    """A Hydra job, with what ``FAULTS`` wants done to it."""
    for fault in json.loads(os.environ.get("FAULTS", "[]")):
        if set(fault["when"]) <= set(HydraConfig.get().overrides.task):
            PLACES[fault["place"]](Path(fault["flag"]))
    sweep.job(config)
    if "SEEN" in os.environ:
        seen = Path(os.environ["SEEN"]) / f"seen-{HydraConfig.get().job.num}"
        seen.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def main() -> int:
    """Run the command line."""
    run.hydra_main = hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")(job)
    return run.main()


def start(arguments: Sequence[str], *faults: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own, and of a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.faulty", *arguments],
        cwd=ROOT,
        # W&B's service of the tests' own process must not learn of the runs of processes that are killed
        env={k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
        | {"FAULTS": json.dumps([{**f, "flag": str(f["flag"])} for f in faults])}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job of a shell ignores Ctrl-C and hands that on to its children
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(what: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """What a function returns as soon as that is true; fails where a process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)
    return found


if __name__ == "__main__":
    from tests.experiments.faulty import main as _main  # not __main__'s copy, so that job processes can import it

    sys.exit(_main())
