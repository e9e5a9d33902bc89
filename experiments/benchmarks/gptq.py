"""Our GPTQ beside that of gptqmodel, on the Linears of one block: time and output error.

``python -m experiments.benchmarks.gptq [--quick] [--out results/benchmarks] [--python PATH]`` appends to ``gptq.csv``.
Both get the same weights and inputs in one process, and the same settings: asymmetric rows or groups, damping 0.01,
blocks of 128 columns, no order by activations. A package that is not installed is skipped, and said so;
``--python`` names the interpreter of another environment that has it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bc import quantizers
from bc.passes import SecondMoment
from bc.quantizers.base import Group
from bc.settings import Bits
from experiments.benchmarks import measure
from experiments.benchmarks.language import Stages, middle

MODULE = "experiments.benchmarks.gptq"
PEER = "gptqmodel"
DAMPING = 0.01
BLOCK = 128
LATENT = 64  # directions along which inputs are correlated
BITS = ("w4", "w3g128")
OPT_125M = {"width": 768, "inner": 3072, "samples": 4, "window": 2048}
SMALL = {"width": 128, "inner": 256, "samples": 2, "window": 64}


def groups_of(width: int, inner: int) -> list[list[nn.Linear]]:
    """Linears of an OPT block with random weights, in groups that share an input."""
    torch.manual_seed(0)
    shapes = [[(width, width)] * 3, [(width, width)], [(width, inner)], [(inner, width)]]
    return [[nn.Linear(*shape, bias=False).requires_grad_(False) for shape in group] for group in shapes]


def inputs_of(columns: int, samples: int, window: int) -> list[Tensor]:
    """Correlated random inputs, a sample each, shape (1, window, columns)."""
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(LATENT, columns, generator=generator) / LATENT**0.5
    draws = [(1, window, LATENT), (1, window, columns)]
    parts = ([torch.randn(shape, generator=generator) for shape in draws] for _ in range(samples))
    return [latent @ mixing + 0.5 * noise for latent, noise in parts]


def relative_error(weight: Tensor, found: Tensor, inputs: Sequence[Tensor]) -> float:
    """Squared error of a Linear's output, relative to its square, fp64 sums."""
    error = sum((x @ (weight - found).T).double().square().sum().item() for x in inputs)
    return error / sum((x @ weight.T).double().square().sum().item() for x in inputs)


@torch.no_grad()
def ours(bits: str, width: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """CPU seconds for second moments and for solving, and the mean relative output error of the Linears."""
    quantizer, seconds = quantizers.create("gptq", Bits.parse(bits)), {"moments": 0.0, "solve": 0.0}
    errors: list[float] = []
    for linears in groups_of(width, inner):
        inputs, stages = inputs_of(linears[0].in_features, samples, window), Stages()
        moment = SecondMoment(linears[0].in_features)
        hessian = stages.run("moments", lambda moment=moment, inputs=inputs: _filled(moment, inputs))
        weights = {str(i): linear.weight.data for i, linear in enumerate(linears)}
        group = Group(weights, hessian)
        found = stages.run("solve", lambda group=group: quantizer.quantize_group(group))
        errors += [relative_error(w, found[key].weight.dequantize(), inputs) for key, w in weights.items()]
        seconds = {name: seconds[name] + stages.seconds[name] for name in seconds}
    return seconds | {"error": sum(errors) / len(errors)}


def _filled(moment: SecondMoment, inputs: Sequence[Tensor]) -> Tensor:
    for x in inputs:
        moment.add(x[0])
    return moment.mean()


@torch.no_grad()
def peer(bits: str, width: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """The same of gptqmodel, which takes each Linear by itself."""
    package: Any = import_module(f"{PEER}.quantization")
    parsed, seconds = Bits.parse(bits), {"moments": 0.0, "solve": 0.0}
    config = package.QuantizeConfig(
        bits=parsed.weight,
        group_size=parsed.group_size,
        sym=False,
        desc_act=False,
        act_group_aware=False,
        damp_percent=DAMPING,
    )
    errors: list[float] = []
    for linears in groups_of(width, inner):
        inputs = inputs_of(linears[0].in_features, samples, window)
        for linear in linears:
            stages, task = Stages(), package.GPTQ(copy.deepcopy(linear), config)
            task.fallback = None  # never rounding to nearest in its stead
            task.quantizer.configure(perchannel=True)
            pairs = [(x, linear(x)) for x in inputs]
            stages.run("moments", lambda task=task, pairs=pairs: [task.add_batch(*pair) for pair in pairs])
            found = stages.run("solve", lambda task=task: task.quantize(blocksize=BLOCK)[0])
            errors.append(relative_error(linear.weight.data, found.to(linear.weight), inputs))
            seconds = {name: seconds[name] + stages.seconds[name] for name in seconds}
    return seconds | {"error": sum(errors) / len(errors)}


def version() -> dict[str, str] | None:
    """Version of the peer in this interpreter, or None where it is absent."""
    if find_spec(PEER) is None:
        return None
    return {"version": str(import_module(PEER).__version__)}


def rows_of(case: dict[str, int], repeats: int, python: str, peers: str) -> list[dict[str, Any]]:
    """Ours beside the peer's, with the second moments and for solving alone."""
    about, rows = " ".join(f"{name}={value}" for name, value in case.items()), []
    for bits in BITS:
        given = {"bits": bits, **case}
        mine, other = (middle(measure.run(f"{MODULE}:{name}", given, repeats, python)) for name in ("ours", "peer"))
        both = {name: run["moments"] + run["solve"] for name, run in (("ours", mine), ("peer", other))}
        for what, one, two in (("GPTQ", both["ours"], both["peer"]), ("solving", mine["solve"], other["solve"])):
            rows.append(
                {
                    "what": f"{what} {bits}",
                    "ours": one,
                    "peer": two,
                    "of": f"{PEER} {peers}",
                    "peer_over_ours": two / one,
                    "error_ours": mine["error"],
                    "error_peer": other["error"],
                    "case": about,
                    "repeats": repeats,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its file, or say why not; returns 0."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, once: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the CSV files")
    parser.add_argument("--python", default=sys.executable, help=f"interpreter of an environment that has {PEER}")
    options = parser.parse_args(arguments)
    found = measure.run(f"{MODULE}:version", {}, 1, options.python)[0]["result"]
    if found is None:
        print(f"{PEER} is not installed for {options.python}: nothing to compare with; name one by --python")
        return 0
    case, repeats = (SMALL, 1) if options.quick else (OPT_125M, 3)
    rows = rows_of(case, repeats, options.python, found["version"])
    measure.report(options.out / "gptq.csv", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
