"""All benchmarks, one after another: ``python -m experiments.benchmarks [--quick] [--out results/benchmarks]``."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module

from experiments import benchmarks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every module of the package that has a command line of its own; returns the first status that is not 0."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name == "__main__":
            continue
        found = import_module(f"{benchmarks.__name__}.{module.name}")
        if hasattr(found, "main"):
            print(f"{module.name}: {(found.__doc__ or '').strip().splitlines()[0]}", flush=True)
            if status := found.main(given):
                return int(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
