"""The identity of a cell and of what cells share: SHA-256 of the settings that determine results, and of nothing else.

Paths, device, logger, launcher and what of the engine is of no effect are left out, so the same cell has the same hash
on any machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from typing import Any

from bc import models, vision
from bc.settings import AUTO, KINDS, READOUT, REGULARISED, Compensation, presets
from bc.vision.checkpoints import embedded_revision
from experiments.config import CellConfig, Numerics
from experiments.data import ImageData

SCHEMA = 1  # raise when the meaning of a setting or of a stored result changes


def scientific(cell: CellConfig) -> dict[str, Any]:
    """The settings that determine a cell's results, in one canonical form.

    What of the engine changes results is in it only where it is not as usual, so that it has no say in other hashes.
    The float model has no calibration, BC or seed, so that every sweep over one model shares one float cell.
    """
    data = cell.data
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "model": model_part(cell),
        "quantizer": {"name": cell.quantizer, **options_part(cell.options)},
        "bits": asdict(cell.bits),
        "bc": bc_part(cell.bc),
        "calibration": asdict(data.calibration),
        "selection": asdict(data.selection),
        "report": asdict(cell.report),
        "evaluation": asdict(data.evaluation) | {"datasets": sorted(data.evaluation.datasets)},
        "seed": cell.seed,
    }
    if isinstance(data, ImageData):
        calibration, fit = data.with_seed(cell.seed)
        out["calibration"]["seed"] = calibration
        out["compensation"] = {"samples": data.compensation.samples, "seed": fit} if cell.bc.enabled else None
    if cell.numerics != Numerics():
        usual = asdict(Numerics())
        out["numerics"] = {key: value for key, value in asdict(cell.numerics).items() if value != usual[key]}
    if cell.is_float:
        out |= {"calibration": None, "selection": None, "report": None, "seed": 0}
    return out


def model_part(cell: CellConfig) -> dict[str, Any]:
    """Model tag and revision; a model that no catalogue knows is its name."""
    part = {"name": cell.model.name, "dtype": cell.model.dtype}
    if cell.domain == "images":
        image = vision.catalogue().get(cell.model.name)
        if image is None:
            return part
        if not image.embedded:
            return part | {"repo": image.timm}
        return part | {"repo": image.embedded, "revision": embedded_revision(image.embedded)}
    source = models.catalogue().get(cell.model.name)
    if source is None:
        return part
    return part | {"repo": source.embedded or source.repo, "revision": source.revision}


def options_part(options: dict[str, Any]) -> dict[str, Any]:
    """A quantizer's options; the exact search, which finds what it always found, is not named."""
    return {name: value for name, value in options.items() if (name, value) != ("search", "exact")}


def bc_part(bc: Compensation) -> dict[str, Any] | None:
    """BC's settings without those that are of no effect; None for no compensation."""
    if not bc.enabled:
        return None
    auto, default = AUTO in bc.scope, Compensation()
    counted = bc.granularity in ("sink", *REGULARISED) or (auto and bc.sink_positions != default.sink_positions)
    part = asdict(bc) | {
        "scope": list(bc.scope),
        "kinds": list(bc.kinds),
        "sink_positions": bc.sink_positions if counted else None,
    }
    usual = {
        "kinds": bc.kinds == KINDS,
        "budget": not _budgeted(bc) and not (auto and bc.budget != default.budget),
        "method": bc.method == "bias",
        "blend": bc.stream != "blended" and not (auto and bc.blend != default.blend),
    }
    for name in (name for name, left_out in usual.items() if left_out):
        del part[name]
    return part


def _budgeted(bc: Compensation) -> bool:
    """Whether the budget has a say in the fit of these settings, which are not to be chosen."""
    return bc.granularity == "lowrank" or READOUT in bc.scope


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cell_hash(cell: CellConfig) -> str:
    """Identity of a cell."""
    return digest(scientific(cell))


def weights_hash(cell: CellConfig) -> str:
    """Identity of the quantized weights: BC off and every BC setting share it."""
    full = scientific(cell)
    names = {"schema", "model", "quantizer", "bits", "calibration", "numerics"}
    names |= {"seed"} if cell.domain == "text" else set()
    return digest({k: full[k] for k in names & full.keys()})


def means_hash(cell: CellConfig, halves: bool = False) -> str:
    """Identity of the float model's statistics: every quantizer and bit width shares it; those by halves are others."""
    full = scientific(cell)
    part = {k: full[k] for k in {"schema", "model", "calibration", "seed", "numerics"} & full.keys()}
    return digest(part | {"halves": True} if halves else part)


def seen_hash(cell: CellConfig, halves: bool = False) -> str:
    """Identity of the sums of the inputs that a quantizer saw: that of the weights that it made."""
    return digest({"weights": weights_hash(cell), "halves": halves})


def with_seed(cell: CellConfig, seed: int) -> CellConfig:
    """The same cell with another seed."""
    return replace(cell, seed=seed)


def shape_name(bc: Compensation) -> str:
    """Granularity of a bias; a rival method is named before a granularity of its own; a readout alone is linear."""
    if bc.scope == (READOUT,):
        return "linear"
    if bc.method == "bias":
        return bc.granularity
    return bc.method if bc.granularity == "channel" else f"{bc.method}-{bc.granularity}"


def bc_label(bc: Compensation, domain: str = "text") -> str:
    """A preset's name, or a description of the settings."""
    for name, preset in presets(vision=domain == "images").items():
        if bc_part(preset) == bc_part(bc):
            return name
    if AUTO in bc.scope:
        return f"{AUTO}-{bc.budget:g}"
    alone = bc.scope == (READOUT,)
    text = READOUT if alone else shape_name(bc)
    text += str(bc.sink_positions) if bc.granularity in ("sink", *REGULARISED) and bc.sink_positions != 1 else ""
    text += f"-{bc.budget:g}" if _budgeted(bc) and bc.budget != Compensation().budget else ""
    text += "" if alone else f"-{'+'.join(bc.scope)}-{bc.stream}"
    text += f"{bc.blend:g}" if bc.stream == "blended" and bc.blend != Compensation().blend else ""
    text += "" if bc.kinds == KINDS else f"-{'+'.join(bc.kinds)}"
    return text if bc.dtype == Compensation().dtype else f"{text}-{bc.dtype}"


def bc_name(cell: CellConfig) -> str:
    """A cell's Bias Compensation in a word; see :func:`bc_label`."""
    return bc_label(cell.bc, cell.domain)


def slug(cell: CellConfig) -> str:
    """Readable name of a cell's folder: settings, then the first 8 digits of the hash."""
    model = re.sub(r"[^\w.+-]", "_", cell.model.name, flags=re.ASCII).lstrip(".")[:80]  # one folder, below ours
    if cell.is_float:
        parts = [model, "float"]
    else:
        parts = [model, cell.quantizer, cell.bits.label, bc_name(cell), f"s{cell.seed}"]
    return "-".join([*parts, cell_hash(cell)[:8]])
