"""Calibration of language models beside the published protocol, and how its cost grows.

``python -m experiments.benchmarks.language [--quick] [--out results/benchmarks] [--only bc|scaling]`` appends to
``bc.csv`` what Bias Compensation adds to GPTQ, beside :mod:`experiments.benchmarks.literal_language` and, on a vision
model, :mod:`experiments.benchmarks.literal_bc_vision` in the same run; and to ``scaling.csv`` time and memory against
samples, blocks and width. Models have random weights: what is measured is the work, not its results.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from bc import device as devices
from bc import quantizers, vision
from bc.calibration import Stream
from bc.chains import chain_of
from bc.install import install
from bc.packing import PackedResult
from bc.pipeline import Collection, Engine, calibrate, compensate
from bc.quantizers.base import SiteResult
from bc.settings import Bits, Compensation
from bc.statistics import PositionSums
from experiments.benchmarks import literal_bc_vision, literal_language, measure

MODULE = "experiments.benchmarks.language"
CPU = torch.device("cpu")
ENGINE = Engine(CPU, 4)
LAYER = Compensation(("layer",), "positional")
SEEN = {
    "sink": Compensation(("layer",), "sink", "calibration"),
    "positional": Compensation(("layer",), "positional", "calibration"),
}
BLOCK = Compensation(("layer", "block"), "positional")
OPT_125M = {"blocks": 2, "width": 768, "heads": 12, "inner": 3072, "samples": 4, "window": 2048}
SMALL = {"blocks": 2, "width": 64, "heads": 4, "inner": 128, "samples": 4, "window": 64}
VISION = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "num_heads": 3, "depth": 2, "num_classes": 10}
VISION_SMALL = VISION | {"img_size": 32, "embed_dim": 48}
CURVES = {
    "samples": [{"samples": n} for n in (8, 16, 32, 64, 128, 256)],
    "blocks": [{"blocks": n} for n in (2, 4, 8, 16, 24)],
    "width": [{"width": n, "inner": 2 * n, "heads": n // 64} for n in (256, 512, 1024, 2048, 4096)],
}
POINT = {"blocks": 2, "width": 256, "heads": 4, "inner": 512, "samples": 16, "window": 128}


def opt(blocks: int, width: int, heads: int, inner: int, window: int) -> nn.Module:
    """An OPT of random weights."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512,
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        ffn_dim=inner,
        max_position_embeddings=window,
    )
    return OPTForCausalLM(config).eval()


def windows(samples: int, window: int) -> Tensor:
    """Random token ids, shape (samples, window)."""
    return torch.randint(4, 512, (samples, window), generator=torch.Generator().manual_seed(1))


def quantized_copy(model: nn.Module, results: dict[str, SiteResult]) -> nn.Module:
    """A copy of a model whose sites are quantized as was found, and not compensated."""
    twin = copy.deepcopy(model)
    for site in chain_of(twin).sites:
        install(site.module, results[site.name], CPU)
    return twin


class Stages:
    """CPU seconds of what is run under a name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, act: Any) -> Any:
        """Result of ``act()``."""
        started = time.process_time()
        result = act()
        self.seconds[name] = time.process_time() - started
        return result


def ours(blocks: int, width: int, heads: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """CPU seconds of GPTQ alone, of GPTQ with layer-scope BC, of BC with the block's, and of a float pass."""
    model, ids, stages = opt(blocks, width, heads, inner, window), windows(samples, window), Stages()
    quantizer = quantizers.create("gptq", Bits.parse("w3"))
    chain = chain_of(model)
    with torch.no_grad():
        stream = ENGINE.capture(chain, ids)

        def float_pass() -> None:
            for unit in chain.units:
                stream.advance(unit.module)

        stages.run("float pass", float_pass)
    stages.run("gptq", lambda: calibrate(model, quantizer, ids, ENGINE))
    collect = Collection()
    results = stages.run("gptq with sums", lambda: calibrate(model, quantizer, ids, ENGINE, collect=collect))
    twins = [copy.deepcopy(model) for _ in range(2)]
    stages.run("biases", lambda: compensate(twins[0], results, LAYER, ids, ENGINE, means=collect.sums))
    stages.run("layer and block", lambda: compensate(twins[1], results, BLOCK, ids, ENGINE))
    seen = Collection(stream="calibration")
    with spent_in((Stream, "add"), (PositionSums, "as_stored")) as spent:
        calibrate(model, quantizer, ids, ENGINE, collect=seen)
    stages.seconds["seen sums"] = sum(spent)  # not the difference of two long runs, which differ by more than this
    stages.run("install", lambda: compensate(copy.deepcopy(model), results, Compensation(), ids, ENGINE))
    for name, settings in SEEN.items():
        stages.run(
            f"seen {name}",
            lambda settings=settings: compensate(copy.deepcopy(model), results, settings, ids, ENGINE, means=seen.sums),
        )
    return stages.seconds


@contextmanager
def spent_in(*methods: tuple[type, str]) -> Iterator[list[float]]:
    """CPU seconds of every call of some methods while this lasts."""
    seconds: list[float] = []
    originals = [getattr(owner, name) for owner, name in methods]

    def timed(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = original(*args, **kwargs)
            seconds.append(time.process_time() - started)
            return result

        return call

    for (owner, name), original in zip(methods, originals, strict=True):
        setattr(owner, name, timed(original))
    try:
        yield seconds
    finally:
        for (owner, name), original in zip(methods, originals, strict=True):
            setattr(owner, name, original)


def literal(blocks: int, width: int, heads: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """CPU seconds of the literal protocol's BC, layer scope and with the block's."""
    model, ids, stages = opt(blocks, width, heads, inner, window), windows(samples, window), Stages()
    chain = chain_of(model)
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    names = [unit.name for unit in chain.units]
    for scope, block in (("layer", False), ("layer and block", True)):
        twin = quantized_copy(model, results)
        stages.run(
            scope,
            lambda block=block, twin=twin: literal_language.compensate(model, twin, names, ids, block_scope=block),
        )
    return stages.seconds


def forwards(blocks: int, width: int, heads: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """Forwards of a block, float and quantized together, that layer and block scope take for each block and sample."""
    model, ids, passed = opt(blocks, width, heads, inner, window), windows(samples, window), [0]
    results = calibrate(model, quantizers.create("rtn", Bits.parse("w3")), None, ENGINE)
    units = chain_of(model).units

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        passed[0] += len(args[0] if args else kwargs["hidden_states"])

    for unit in units:  # copies of a module keep its hooks
        unit.module.register_forward_hook(count, with_kwargs=True)
    found = {}
    twin = copy.deepcopy(model)
    literal_language.compensate(model, twin, [unit.name for unit in units], ids, block_scope=True)
    found["literal"], passed[0] = passed[0] / (samples * blocks), 0
    compensate(model, results, BLOCK, ids, ENGINE)
    return found | {"ours": passed[0] / (samples * blocks)}


def vision_layers(shape: dict[str, int], images: int) -> dict[str, float]:
    """CPU seconds of layer-scope BC on a ViT of random weights, ours and the literal protocol's."""
    torch.manual_seed(0)
    model: Any = vision.wrap(VisionTransformer(**shape).eval())
    size = (images, 3, shape["img_size"], shape["img_size"])
    pictures, stages = torch.randn(size, generator=torch.Generator().manual_seed(2)), Stages()
    engine = Engine(CPU, literal_bc_vision.BATCH)
    results = calibrate(model, quantizers.create("minmax", Bits.parse("w4a4")), pictures, engine)
    twin, other = copy.deepcopy(model), quantized_copy(model, results)
    stages.run("ours", lambda: compensate(twin, results, LAYER, pictures, engine))
    modules = {site.name: site.module for site in chain_of(other).sites}
    stages.run("literal", lambda: literal_bc_vision.biases(model, modules, list(modules), pictures))
    return stages.seconds


def calibration(blocks: int, width: int, heads: int, inner: int, samples: int, window: int) -> dict[str, float]:
    """GPTQ with layer-scope BC: CPU seconds, peak memory, and what it is compared with, MiB."""
    _layer_scope(opt(**_without(SMALL, "samples")), windows(SMALL["samples"], SMALL["window"]), Stages())  # libraries
    model, ids, stages = opt(blocks, width, heads, inner, window), windows(samples, window), Stages()
    devices.release(CPU)
    measure.forget_peak()
    before = measure.peak_mib()
    results, sums = _layer_scope(model, ids, stages)
    weights = sum(p.numel() * p.element_size() for p in chain_of(model).units[0].module.parameters())
    packed = [result for result in results.values() if isinstance(result, PackedResult)]
    kept = [tensor for result in packed for tensor in result.tensors.values()]
    kept += [part.total for part in sums.values()] + [b for name, b in model.named_buffers() if "compensation" in name]
    return {
        "cpu_seconds": sum(stages.seconds.values()),
        "peak_mib": measure.peak_mib() - before,
        "two_blocks_mib": 2 * weights / 2**20,
        "activations_mib": 2 * samples * window * width * 4 / 2**20,  # of the quantized and of the float stream
        "returned_mib": sum(tensor.numel() * tensor.element_size() for tensor in kept) / 2**20,
    }


def _layer_scope(
    model: nn.Module, ids: Tensor, stages: Stages
) -> tuple[dict[str, SiteResult], dict[str, PositionSums]]:
    """GPTQ with layer-scope BC: what it returns beside the changed model."""
    collect = Collection()
    quantizer = quantizers.create("gptq", Bits.parse("w3"))
    results = stages.run("calibrate", lambda: calibrate(model, quantizer, ids, ENGINE, collect=collect))
    stages.run("biases", lambda: compensate(model, results, LAYER, ids, ENGINE, means=collect.sums))
    return results, collect.sums


def _without(case: dict[str, int], name: str) -> dict[str, int]:
    return {key: value for key, value in case.items() if key != name}


def middle(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of what several runs returned."""
    results = [run["result"] for run in runs]
    return {name: median(result[name] for result in results) for name in results[0]}


def bc_rows(quick: bool) -> list[dict[str, Any]]:
    """Ours beside the literal protocol."""
    cases, repeats = ([SMALL], 1) if quick else ([OPT_125M, OPT_125M | {"samples": 16}], 3)
    rows = [row for case in cases for row in _language_rows(case, repeats)]
    counted = forwards(**SMALL)
    rows.append(
        {
            "what": "block forwards of layer and block scope",
            "ours": counted["ours"],
            "peer": counted["literal"],
            "of": "literal protocol",
            "case": _described(SMALL),
        }
    )
    shape, images = (VISION_SMALL, 16) if quick else (VISION, 64)
    seen = middle(measure.run(f"{MODULE}:vision_layers", {"shape": shape, "images": images}, repeats))
    rows.append(
        {
            "what": "vision layer scope",
            "ours": seen["ours"],
            "peer": seen["literal"],
            "of": "literal protocol",
            "case": _described(shape | {"images": images}),
        }
    )
    return [row | {"peer_over_ours": row["peer"] / row["ours"], "repeats": repeats} for row in rows]


def _language_rows(case: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    mine = middle(measure.run(f"{MODULE}:ours", case, repeats))
    other = middle(measure.run(f"{MODULE}:literal", case, repeats))
    layer = mine["gptq with sums"] - mine["gptq"] + mine["biases"]
    rows: list[dict[str, Any]] = [
        {
            "what": f"layer scope added to GPTQ, calibration stream, {name}",
            "ours": mine["seen sums"] + max(0.0, mine[f"seen {name}"] - mine["install"]),
            "peer": mine["gptq"],
            "of": "GPTQ alone",
        }
        for name in SEEN
    ]
    rows += [
        {"what": "layer scope added to GPTQ", "ours": layer, "peer": mine["gptq"], "of": "GPTQ alone"},
        {"what": "layer scope", "ours": layer, "peer": other["layer"], "of": "literal protocol"},
        {
            "what": "layer and block scope",
            "ours": mine["layer and block"],
            "peer": other["layer and block"],
            "of": "literal protocol",
        },
        {
            "what": "layer and block scope",
            "ours": mine["layer and block"],
            "peer": mine["float pass"],
            "of": "float pass over the blocks",
        },
    ]
    return [row | {"case": _described(case)} for row in rows]


def _described(case: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in case.items())


def scaling_rows(quick: bool) -> list[dict[str, Any]]:
    """Time and memory against samples, blocks and width, and their slopes in a plot of logarithms."""
    found: list[dict[str, Any]] = []
    for name, points in CURVES.items():
        rows: list[dict[str, Any]] = []
        for change in points[:2] if quick else points:
            case = POINT | change
            values = middle(measure.run(f"{MODULE}:calibration", case, 1 if quick else 3))
            needed = values["two_blocks_mib"] + values["activations_mib"] + values["returned_mib"]
            rows.append({"curve": name, "at": case[name], **values, "peak_over_needed": values["peak_mib"] / needed})
        at = np.log([row["at"] for row in rows])
        for quantity in ("cpu_seconds", "peak_mib"):
            slope = float(np.polyfit(at, np.log([max(row[quantity], 1e-3) for row in rows]), 1)[0])
            rows = [row | {f"{quantity}_slope": slope} for row in rows]
        found += rows
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks and write their files; returns 0."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, once: to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the CSV files")
    parser.add_argument("--only", choices=("bc", "scaling"), help="one of the two")
    options = parser.parse_args(arguments)
    for name, rows in (("bc", bc_rows), ("scaling", scaling_rows)):
        if options.only in (None, name):
            measure.report(options.out / f"{name}.csv", rows(options.quick))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
