"""The candidate search of PTQ4ViT beside the published protocol: time, memory, the scales found, accuracy.

``python -m experiments.benchmarks.ptq4vit [--quick] [--out results/benchmarks]`` appends to ``ptq4vit.csv`` a row for
each case and variant: ``literal`` (:mod:`experiments.benchmarks.literal_vision`), ``exact`` and ``fast``
(``quantizer.search``). Ratios are literal over variant, in the same run.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import bc
from bc import quantizers, vision
from bc.chains import VisionChain
from bc.data import images as pictures
from bc.quantizers.base import SiteQuantizer, SiteResult
from bc.settings import Bits
from bc.site_calibration import TARGET_SEED, calibrate_sites
from experiments.benchmarks import literal_vision, measure

log = logging.getLogger(__name__)
MODULE = "experiments.benchmarks.ptq4vit"
BATCH = 8
SEED = 0
DATASET = "embedded_fashion"
CPU = torch.device("cpu")

Parameters = dict[str, list[list[float]]]


@dataclass(frozen=True)
class Case:
    """What is calibrated.

    Attributes:
        images: Number of calibration images.
        shape: Arguments of a timm ViT with random weights and two blocks, of which the first is calibrated; None for
            all sites of the embedded ``tiny_vit``.
    """

    images: int
    shape: dict[str, int] | None = None


CASES = {
    "tiny_vit": Case(8),
    "deit_tiny_block": Case(8, {"img_size": 224, "patch_size": 16, "embed_dim": 192, "num_heads": 3}),
    "vit_s14_block": Case(32, {"img_size": 224, "patch_size": 14, "embed_dim": 384, "num_heads": 6}),
}
QUICK, USUAL = ("tiny_vit",), ("tiny_vit", "deit_tiny_block")


def prepare(case: str) -> tuple[VisionChain, slice, Tensor]:
    """The model, which of its units are calibrated, and the images."""
    what = CASES[case]
    if what.shape is None:
        model = vision.wrap(bc.load(case))
        return VisionChain(model), slice(None), fashion(case, what.images)
    torch.manual_seed(SEED)
    model = VisionTransformer(**what.shape, depth=2, num_classes=10).eval().requires_grad_(False)
    size = what.shape["img_size"]
    return VisionChain(vision.wrap(model)), slice(1, 2), torch.randn(what.images, 3, size, size)


def fashion(model: str, count: int) -> Tensor:
    """Calibration images of the embedded suite."""
    prepare = vision.preprocessing(vision.create(model))
    return pictures.training_images(DATASET, count, SEED, prepare)[0]


def literal(case: str, bits: str = "w4a4") -> Parameters:
    """Calibrate by the published protocol."""
    chain, units, images = prepare(case)
    width = Bits.parse(bits)
    protocol = literal_vision.Protocol(width.weight, width.activation)
    sites = [site for unit in chain.units[units] for site in unit.sites]
    found = literal_vision.calibrate(chain.model, sites, list(images.split(BATCH)), protocol, TARGET_SEED)
    return {name: [p.flatten().tolist() for p in pair if p.numel()] for name, pair in found.items()}


@torch.no_grad()
def ours(case: str, search: str, bits: str = "w4a4", quantizer: str = "ptq4vit") -> Parameters:
    """Calibrate by a quantizer of ours."""
    chain, units, images = prepare(case)
    method = quantizers.create(quantizer, Bits.parse(bits), search=search)
    assert isinstance(method, SiteQuantizer)
    stream = chain.capture(images, BATCH, CPU, "host")
    for unit in chain.units[: units.start or 0]:
        stream.advance(unit.module)
    chain.units = chain.units[units]
    found = calibrate_sites(chain, method, stream, CPU, list(images.split(BATCH)))
    return {name: parameters(result) for name, result in found.items()}


def parameters(result: SiteResult) -> list[list[float]]:
    """Scales and splits of a site's operands; nothing of a float one."""
    weight: Any = result.weight
    found = [] if weight is None else [weight.scale.flatten().tolist()]
    buffers = [list(q.buffers()) for q in result.inputs]
    return found + [b[0].flatten().tolist() for b in buffers if b]


def agreement(a: Parameters, b: Parameters, tolerance: float = 1e-5) -> tuple[int, int]:
    """How many of the parameters are equal, and how many there are; one for all groups counts for each."""
    same = total = 0
    for name, pairs in a.items():
        for left, right in zip(pairs, b[name], strict=True):
            length = max(len(left), len(right))
            x, y = (torch.tensor(v).repeat_interleave(length // len(v)) for v in (left, right))
            same += int(((x - y).abs() <= tolerance * x.abs()).sum())
            total += length
    return same, total


def top1(search: str, images: int, limit: int, bits: str = "w4a4") -> float:
    """Top-1 of the quantized ``tiny_vit`` on test images, percent."""
    model: nn.Module = bc.load("tiny_vit")
    bc.quantize(model, "ptq4vit", bits, calibration=fashion("tiny_vit", images), device="cpu", search=search)
    prepare = vision.preprocessing(model)
    return bc.accuracy(model, pictures.test_batches(DATASET, prepare, limit=limit), device="cpu").top1


def compare(case: str, repeats: int, bits: str = "w4a4") -> list[dict[str, Any]]:
    """Rows of one case: every variant measured in processes of its own."""
    variants = {
        "literal": ("literal", {}),
        "exact": ("ours", {"search": "exact"}),
        "fast": ("ours", {"search": "fast"}),
    }
    runs = {
        name: measure.run(f"{MODULE}:{function}", {"case": case, "bits": bits, **arguments}, repeats)
        for name, (function, arguments) in variants.items()
    }
    rows = []
    base = {key: median(r[key] for r in runs["literal"]) for key in ("cpu_seconds", "wall_seconds", "peak_mib")}
    for name, found in runs.items():
        row: dict[str, Any] = {"case": case, "images": CASES[case].images, "bits": bits, "variant": name}
        row["repeats"] = repeats
        for key, reference in base.items():
            row[key] = round(median(r[key] for r in found), 3)
            row[f"{key.partition('_')[0]}_ratio"] = round(reference / max(row[key], 1e-3), 2)
        row["same_parameters"], row["parameters"] = agreement(found[0]["result"], runs["literal"][0]["result"])
        rows.append(row)
        log.info("%s", " ".join(f"{key}={value}" for key, value in row.items()))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model alone, once")
    parser.add_argument("--case", choices=CASES, action="append", help="this case (may be given again)")
    parser.add_argument("--repeats", type=int, help="runs of each variant; 3, or 1 with --quick")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of ptq4vit.csv")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    repeats = options.repeats or (1 if options.quick else 3)
    rows = []
    for case in options.case or (QUICK if options.quick else USUAL):
        rows += compare(case, repeats)
    images, limit = (8, 200) if options.quick else (32, 2000)
    for search in ("exact", "fast"):
        value = top1(search, images, limit)
        row = {"case": "tiny_vit", "images": images, "bits": "w4a4", "variant": search, "top1": value}
        rows.append(row | {"test_images": limit})
        log.info("tiny_vit %s: top-1 %.2f on %d images", search, value, limit)
    measure.write(options.out / "ptq4vit.csv", rows)


if __name__ == "__main__":
    main()
