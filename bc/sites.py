"""What the engine walks: a model as a chain of units, each with the sites that may be quantized and compensated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "conv", "matmul"]
UnitKind = Literal["stem", "block", "downsample", "tail"]
KINDS: tuple[Kind, ...] = ("conv", "linear", "matmul")


@dataclass(frozen=True)
class Region:
    """A part of a unit whose output may be compensated as a whole.

    Attributes:
        entry: Path, inside a unit, of the module whose input is the part's input.
        exit: Path of the module whose output is the part's output; the empty path is the unit itself.
    """

    entry: str
    exit: str


WHOLE = Region("", "")


@dataclass(frozen=True)
class Site:
    """A module whose inputs and weight are quantized and whose output may be compensated.

    Attributes:
        name: Dotted name in the model.
        module: A Linear, a Conv2d or a :class:`~bc.vision.attention.MatMul`.
        kind: ``linear``, ``conv`` or ``matmul``.
        role: What it does in the model; in a vision transformer one of :data:`bc.vision.ROLES`.
        heads: Attention heads, for ``qkv`` and the matmuls; 0 elsewhere.
        norm: The LayerNorm whose output is the site's only input and goes nowhere else; else None.
    """

    name: str
    module: nn.Module
    kind: Kind
    role: str
    heads: int = 0
    norm: nn.LayerNorm | None = None

    @property
    def weight(self) -> Tensor | None:
        """Its weight; a matmul has none."""
        found: Tensor | None = getattr(self.module, "weight", None)
        return found

    @property
    def layout(self) -> str:
        """How its output becomes rows of channels; see :func:`bc.compensation.to_rows`."""
        return {"linear": "tokens", "conv": "image", "matmul": "heads"}[self.kind]


@dataclass(frozen=True)
class Unit:
    """A link of the chain that a model is: ``model(x) == last(… (first(x)))``, bit for bit.

    Attributes:
        name: ``stem``, ``tail``, or the dotted name of the block or downsample in the model.
        module: Maps the hidden state to the next: a module of the model itself, or a view that shares its modules.
        kind: ``stem``, ``block``, ``downsample`` or ``tail``.
        groups: Sites that share an input, in forward order.
        opens: For each group, the scope of the part whose input it reads, or empty; shorter than ``groups`` is empty.
        regions: Scope → the part of the unit that it compensates.
        stage: Number of the Swin stage that a block or downsample belongs to, else None.
    """

    name: str
    module: nn.Module
    kind: UnitKind
    groups: tuple[tuple[Site, ...], ...]
    opens: tuple[str, ...] = ()
    regions: dict[str, Region] = field(default_factory=dict)
    stage: int | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in forward order."""
        return tuple(site for group in self.groups for site in group)

    def path(self, site: Site) -> str:
        """Path of a site inside the unit's module."""
        return site.name.removeprefix(f"{self.name}.")

    def region_name(self, scope: str) -> str:
        """Dotted name in the model of the module that a scope compensates."""
        return f"{self.name}.{self.regions[scope].exit}".rstrip(".")


def alone(sites: tuple[Site, ...]) -> tuple[tuple[Site, ...], ...]:
    """Groups of one site each."""
    return tuple((site,) for site in sites)
