"""Validated settings of the library: bit widths and Bias Compensation."""

from __future__ import annotations

import re
import types
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

from bc.errors import UserError, unknown

T = TypeVar("T")

SCOPES = ("layer", "attention", "mlp", "downsample", "block", "stage", "model", "readout")
KINDS = ("conv", "linear", "matmul")
READOUT = "readout"
SEARCH = "search"
AUTO = "auto"
GRANULARITIES = ("channel", "sink", "positional", "shrink", "lowrank")
REGULARISED = ("shrink", "lowrank")
METHODS = ("bias", "affine", "linear", "classic")
STREAMS = ("float", "quantized", "blended", "calibration")
Stream = Literal["float", "quantized", "blended", "calibration"]
BIAS_DTYPES = ("float16", "bfloat16", "float32")


def build_dataclass(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build a settings dataclass from a mapping, refusing unknown names and wrong types by name.

    Args:
        cls: A dataclass whose annotations are plain types, ``Literal`` or optional plain types.
        values: Name → value.
        where: Dotted prefix for messages.

    Raises:
        UserError: One line that names the field, the value and what is allowed.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in names:
            raise unknown(f"{where} option", name, names or ["(none)"])
        _check_type(f"{where}.{name}", value, hints[name])
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{where}.{f.name}: is missing; set {where}.{f.name}=…")
    return cls(**values)


def _check_type(where: str, value: Any, hint: Any) -> None:
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise unknown(where, value, allowed)
        return
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return
        _check_type(where, value, next(a for a in typing.get_args(hint) if a is not type(None)))
        return
    if origin is tuple:
        return
    ok = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    if not ok and not (hint is float and isinstance(value, int) and not isinstance(value, bool)):
        raise UserError(f"{where}: {value!r} is a {type(value).__name__}; a {hint.__name__} is needed")


@dataclass(frozen=True)
class Bits:
    """Bit widths of a cell.

    Attributes:
        weight: Bits per weight code, 1 to 8; 16 leaves the weights as they are.
        activation: Bits per activation code, 2 to 8; 16 leaves them float.
        group_size: Weight columns that share a scale; −1 is the whole row.
    """

    weight: int = 16
    activation: int = 16
    group_size: int = -1

    def __post_init__(self) -> None:
        for name, low in (("weight", 1), ("activation", 2)):
            value = getattr(self, name)
            if value != 16 and not low <= value <= 8:
                raise UserError(f"bits.{name}: {value} is out of range; allowed: {low} to 8, or 16 for float")
        if self.group_size == 0 or self.group_size < -1:
            raise UserError(f"bits.group_size: {self.group_size} is not allowed; use -1 (whole row) or a positive size")

    @property
    def label(self) -> str:
        """Short name: ``w4``, ``w3g64``, ``w4a8``, ``float``."""
        if self.weight == 16 and self.activation == 16:
            return "float"
        text = f"w{self.weight}" + (f"a{self.activation}" if self.activation < 16 else "")
        return text + (f"g{self.group_size}" if self.group_size > 0 else "")

    @classmethod
    def parse(cls, text: str | Bits) -> Bits:
        """Read ``w4``, ``w3g64``, ``w8a8``, ``w4a8g128`` or ``float``."""
        if isinstance(text, Bits):
            return text
        if not isinstance(text, str):
            raise UserError(f"bits: {text!r} is a {type(text).__name__}; write w4, w3g64, w8a8, … or give bc.Bits")
        if text == "float":
            return cls()
        match = re.fullmatch(r"w(\d+)(?:a(\d+))?(?:g(\d+))?", text)
        if not match:
            raise UserError(f"bits: {text!r} is not understood; write w4, w3g64, w8a8, w4a8g128 or float")
        weight, activation, group = match.groups()
        return cls(int(weight), int(activation or 16), int(group) if group else -1)


@dataclass(frozen=True)
class Compensation:
    """Which outputs get a bias, and of which shape.

    Attributes:
        scope: Union of ``layer``, ``attention``, ``mlp``, ``downsample``, ``block``, ``stage``, ``model`` (those that a
            model has; downsamples and stages are Swin's), and ``readout``, the linear map behind a classifier's head
            (:mod:`bc.readout`); empty is no compensation; ``search`` or ``auto`` alone leaves the choice to selection
            samples (:mod:`bc.choice`).
        granularity: ``channel`` (one bias per output channel), ``sink`` (the first positions have one each, the rest
            share one), ``positional`` (one per position and channel, the paper's), ``shrink`` (positional, but drawn
            to the channel's by its estimated noise) or ``lowrank`` (channel plus a product of rank r).
        stream: The inputs fed to the quantized site while fitting: ``float`` (the paper), ``quantized``, ``blended``
            (both: the error that the site makes itself is corrected wholly, and of what earlier errors add to it the
            share ``blend``), or, for scope ``layer`` alone, ``calibration`` (those that the quantizer took its second
            moments from, which costs no forward). Stages and logits know no blend, and take the quantized stream.
        sink_positions: Number of leading positions with a bias of their own at granularities ``sink``, ``shrink`` and
            ``lowrank``; 0 finds it on the calibration samples (:func:`bc.sinks.find_sinks`). A vision model has its
            class and distillation tokens instead.
        dtype: How the biases are stored.
        kinds: Sites that scope ``layer`` covers: ``conv``, ``linear``, ``matmul``.
        budget: Bits per weight that all biases may take at most under ``lowrank``, which chooses own rows and ranks
            within it (:class:`bc.regularise.Allowance`), and under ``auto``; scope ``readout`` takes half of that at
            most.
        blend: Share of the quantized stream under ``blended``, from 0 (the float stream) to 1 (the quantized one).
        method: ``bias``; ``classic`` (the same from the norm's own statistics, without data, where a Linear follows a
            LayerNorm); ``affine`` (scale and shift of every output channel; folded into the weight, they cost nothing;
            with granularity ``sink`` leading positions have a bias of their own and do not count for the scale; on the
            blended stream the scale is that of the float stream);
            ``linear`` (a linear map of a block's input, by ridge regression, where it predicts the block's error).
    """

    scope: tuple[str, ...] = ()
    granularity: Literal["channel", "sink", "positional", "shrink", "lowrank"] = "channel"
    stream: Stream = "float"
    sink_positions: int = 1
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    kinds: tuple[str, ...] = KINDS
    budget: float = 0.5
    method: Literal["bias", "affine", "linear", "classic"] = "bias"
    blend: float = 0.5

    def __post_init__(self) -> None:
        for field, names in (("scope", (*SCOPES, SEARCH, AUTO)), ("kinds", KINDS)):
            value = getattr(self, field)
            for item in value:
                if item not in names:
                    raise unknown(f"bc.{field}", item, names)
            if len(set(value)) != len(value):
                raise UserError(f"bc.{field}: {'+'.join(value)} names one twice; name each once")
            object.__setattr__(self, field, tuple(sorted(value, key=names.index)))
        if self.searched and len(self.scope) > 1:
            raise UserError(f"bc.scope: {SEARCH} and {AUTO} stand for many; write bc.scope=[{SEARCH}] alone")
        if AUTO in self.scope:
            for name in ("granularity", "stream", "method"):
                usual = getattr(type(self), name)
                if getattr(self, name) != usual:
                    raise UserError(
                        f"bc.{name}: {getattr(self, name)!r} has no say under {AUTO}, which chooses it; leave it out, "
                        f"or set bc.scope=[{SEARCH}] to choose the scope alone"
                    )
        if not self.kinds:
            raise UserError("bc.kinds: is empty; name one or more of conv, linear, matmul")
        if self.method == "affine" and self.kinds == ("matmul",):
            raise UserError("bc.kinds: a matmul has no weight that bc.method=affine could scale; name conv or linear")
        for name, allowed in (
            ("granularity", GRANULARITIES),
            ("stream", STREAMS),
            ("dtype", BIAS_DTYPES),
            ("method", METHODS),
        ):
            if getattr(self, name) not in allowed:
                raise unknown(f"bc.{name}", getattr(self, name), allowed)
        if not isinstance(self.sink_positions, int) or self.sink_positions < 0:
            raise UserError(f"bc.sink_positions: {self.sink_positions} is not allowed; use 1 or more, or 0 to find it")
        if not 0 < self.budget < float("inf"):
            raise UserError(f"bc.budget: {self.budget} is not allowed; use a positive number of bits per weight")
        if not 0 <= self.blend <= 1:
            raise UserError(f"bc.blend: {self.blend} is not allowed; use a share from 0 to 1")
        if self.stream == "blended" and self.method not in ("bias", "affine"):
            raise UserError(f"bc.stream: 'blended' does not go with bc.method={self.method}; set bc.stream=float")
        if self.stream == "calibration" and self.enabled and (self.scope != ("layer",) or self.method != "bias"):
            raise UserError(
                f"bc.stream: 'calibration' is for a bias of scope layer alone, not for {self.method} of "
                f"{'+'.join(self.scope)}; set bc.stream=float"
            )
        self._check_method()

    def _check_method(self) -> None:
        """Refuse what a method cannot do."""
        if {"model", READOUT} <= set(self.scope):
            raise UserError(f"bc.scope: {READOUT} moves the logits as model does, and more; leave model out")
        wanted = {"classic": ("layer",), "affine": ("layer",), "linear": ("block",)}.get(self.method)
        scope = tuple(name for name in self.scope if name != READOUT)
        if wanted is None or not scope:
            return
        if scope != wanted:
            raise UserError(
                f"bc.scope: {'+'.join(self.scope)} does not go with bc.method={self.method}; set [{wanted[0]}]"
            )
        shapes = ("channel", "sink") if self.method == "affine" else ("channel",)
        if self.granularity not in shapes:
            raise UserError(
                f"bc.granularity: {self.granularity!r} does not go with bc.method={self.method}; "
                f"set {' or '.join(shapes)}"
            )
        if self.granularity == "sink" and not self.sink_positions:
            raise UserError("bc.sink_positions: 0 does not go with bc.method=affine; use 1 or more")
        if self.method == "classic" and self.stream != "float":
            raise UserError("bc.stream: the data-free bias (bc.method=classic) has none but float; set bc.stream=float")

    @property
    def searched(self) -> bool:
        """Whether the settings are to be chosen on selection samples."""
        return SEARCH in self.scope or AUTO in self.scope

    @property
    def wants_halves(self) -> bool:
        """Whether sums of half the samples are needed besides: for the setting itself, or for some that are tried."""
        return AUTO in self.scope or self.granularity in REGULARISED

    @property
    def follows(self) -> bool:
        """Whether biases are fitted on what the quantized model feeds the sites, wholly or in part."""
        return self.stream in ("quantized", "blended")

    @property
    def enabled(self) -> bool:
        """Whether any output is compensated."""
        return bool(self.scope)

    @classmethod
    def parse(cls, value: str | Compensation, *, vision: bool = False) -> Compensation:
        """A preset by name (see :func:`presets`), or the settings themselves."""
        if isinstance(value, Compensation):
            return value
        if not isinstance(value, str):
            raise UserError(f"bc: {value!r} is a {type(value).__name__}; give a preset's name or bc.Compensation")
        known = presets(vision=vision)
        if value not in known:
            raise unknown("bc", value, known)
        return known[value]


PRESETS: dict[str, Compensation] = {
    "off": Compensation(),
    "channel": Compensation(("layer",), "channel"),
    "sink": Compensation(("layer",), "sink"),
    "positional": Compensation(("layer",), "positional"),
    "paper": Compensation(("layer", "block"), "positional"),
    "search": Compensation((SEARCH,), "positional"),
    "auto": Compensation((AUTO,)),
    "shrink": Compensation(("layer",), "shrink"),
    "lowrank": Compensation(("layer",), "lowrank"),
    "affine": Compensation(("layer",), method="affine"),
    "linear": Compensation(("block",), method="linear"),
    "classic": Compensation(("layer",), method="classic"),
    "readout": Compensation(("readout",)),
}


def presets(*, vision: bool = False) -> dict[str, Compensation]:
    """Name → settings. ``paper`` is the paper's main setting: of language models, or of vision models."""
    if not vision:
        return PRESETS
    return PRESETS | {"paper": Compensation(("layer", "model"), "positional")}
