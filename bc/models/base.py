"""What the engine has to know about a family of models."""

from __future__ import annotations

from dataclasses import dataclass, field

from bc.sites import WHOLE, Region

__all__ = ["Family", "Region", "Source"]


@dataclass(frozen=True)
class Source:
    """Where a named model comes from.

    Attributes:
        repo: Hub repository, ``organisation/name``.
        revision: Hub revision.
        embedded: Name of an asset of the embedded suite instead of a hub repository.
    """

    repo: str = ""
    revision: str = "main"
    embedded: str = ""


@dataclass(frozen=True)
class Family:
    """Declarative adapter of one family of causal language models.

    Attributes:
        name: Name of the family.
        model_types: ``config.model_type`` values that it covers.
        blocks: Dotted path of the list of transformer blocks.
        linears: Paths, inside a block, of the Linears to quantize, in groups that share an input, in forward order.
        opens: For each group, the part whose input it reads: ``attention``, ``mlp``, or empty.
        attention: The attention part of a block.
        mlp: The MLP part of a block.
        tail: Dotted paths of what follows the blocks, in order; a path that leads to None is skipped.
        head: Dotted path of the module whose output is the logits.
        catalogue: Names of known models of this family and their sources.
        before: For each group, the path of the norm or Linear whose output the group reads channel by channel, so that
            a scale of the group's inputs can be folded into it; empty where there is none. See :mod:`bc.scaling` for
            the models of a family in which one of these does not hold.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    linears: tuple[tuple[str, ...], ...]
    opens: tuple[str, ...]
    attention: Region
    mlp: Region
    tail: tuple[str, ...]
    head: str = "lm_head"
    catalogue: dict[str, Source] = field(default_factory=dict)
    before: tuple[str, ...] = ()

    @property
    def regions(self) -> dict[str, Region]:
        """Scope → the part of a block that it compensates."""
        return {"attention": self.attention, "mlp": self.mlp, "block": WHOLE}
