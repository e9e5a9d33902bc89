"""What the engine has to know about a vision transformer: where it comes from, its units and its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Kind = Literal["linear", "conv", "matmul"]
UnitKind = Literal["stem", "block", "downsample", "tail"]
#: What a site does in the model.
ROLES = ("patch_embed", "qkv", "matmul_qk", "matmul_av", "proj", "fc1", "fc2", "reduction", "head")


@dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
        timm: Name that ``timm.create_model`` takes; with a tag, it names the published weights as well.
        label: Name of the model in the published tables.
        top1: Published ImageNet-1k top-1 of the float model, in percent.
        embedded: Name of the embedded weights instead of the hub's.
        options: Further arguments of ``timm.create_model``.
        preprocessing: What the evaluation transform needs, where timm does not know it: keys of ``pretrained_cfg``.
    """

    timm: str
    label: str = ""
    top1: float | None = None
    embedded: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """A module whose inputs and weight are quantized and whose output may be compensated.

    Attributes:
        name: Dotted name in the model.
        module: A Linear, a Conv2d or a :class:`~bc.vision.attention.MatMul`.
        kind: ``linear``, ``conv`` or ``matmul``.
        role: One of :data:`ROLES`.
        heads: Attention heads, for ``qkv`` and the matmuls; 0 elsewhere.
        norm: The LayerNorm whose output is the site's only input and goes nowhere else; else None.
    """

    name: str
    module: nn.Module
    kind: Kind
    role: str
    heads: int = 0
    norm: nn.LayerNorm | None = None


@dataclass(frozen=True)
class Unit:
    """A link of the chain that a model is: ``model(x) == last(… (first(x)))``, bit for bit.

    Attributes:
        name: ``stem``, ``tail``, or the dotted name of the block or downsample in the model.
        module: Maps the hidden state to the next: a module of the model itself, or a view that shares its modules.
        kind: ``stem``, ``block``, ``downsample`` or ``tail``.
        sites: In forward order.
        attention: Dotted name of a block's attention, or empty; its output is the scope ``attention``.
        mlp: Dotted name of a block's MLP, or empty; its output is the scope ``mlp``.
        stage: Number of the Swin stage that a block or downsample belongs to, else None.
    """

    name: str
    module: nn.Module
    kind: UnitKind
    sites: tuple[Site, ...]
    attention: str = ""
    mlp: str = ""
    stage: int | None = None


@dataclass(frozen=True)
class VisionFamily:
    """Adapter of one family of vision transformers.

    Attributes:
        name: Name of the family.
        classes: Names of the timm classes that it covers.
        chain: The model → its units in order.
        catalogue: Names of known models of this family and their sources.
    """

    name: str
    classes: tuple[str, ...]
    chain: Callable[[nn.Module], list[Unit]]
    catalogue: dict[str, Source] = field(default_factory=dict)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Give every attention named matmuls, in place; a second call changes nothing."""
        from bc.vision.attention import name_matmuls

        return name_matmuls(model)

    def units(self, model: nn.Module) -> list[Unit]:
        """The wrapped model as a chain of units."""
        return self.chain(model)
