"""What the engine has to know about a vision transformer: where it comes from, its units and its sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bc.sites import Site, Unit

__all__ = ["ROLES", "Site", "Source", "Unit", "VisionFamily"]

#: What a site does in the model; ``fc2`` is behind a GELU, an MLP's last Linear behind anything else is ``mlp_out``.
ROLES = ("patch_embed", "qkv", "matmul_qk", "matmul_av", "proj", "fc1", "fc2", "mlp_out", "reduction", "head")


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
