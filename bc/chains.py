"""A model as the engine walks it: the chain of its units, how samples enter it, and where its logits leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bc import models, vision
from bc.activation_cache import Store
from bc.calibration import Samples, Stream, capture, capture_images, logits
from bc.compensation import folds
from bc.errors import UserError, headless
from bc.models import Family, submodule
from bc.positions import PositionContext
from bc.settings import AUTO, READOUT, SCOPES, SEARCH, Compensation
from bc.sites import Site, Unit


class Chain(ABC):
    """Base of the two kinds of chains.

    Attributes:
        model: The model.
        units: In forward order.
        context: Token positions for the biases; None in a vision model, whose tokens have fixed places.
        tail: What follows the units and is needed for the logits.
        heads: Names of the modules whose output, or whose mean output, is the logits.
        reads_once: Whether a head reads one vector of a sample and is a site of the last unit: a classifier's.
    """

    model: nn.Module
    units: list[Unit]
    context: PositionContext | None = None
    tail: tuple[nn.Module | None, ...] = ()
    heads: tuple[str, ...] = ()
    reads_once = False

    @property
    def scopes(self) -> tuple[str, ...]:
        """Scopes that exist in this model."""
        found = {"layer"} | {scope for unit in self.units for scope in unit.regions}
        found |= {"model"} if self.heads else set()
        found |= {READOUT} if self.heads and self.reads_once else set()
        found |= {"stage"} if any(unit.stage is not None for unit in self.units) else set()
        return tuple(scope for scope in SCOPES if scope in found)

    @property
    def sites(self) -> list[Site]:
        """All sites, in forward order."""
        return [site for unit in self.units for site in unit.sites]

    def stage_edges(self, index: int) -> tuple[bool, bool]:
        """Whether a unit opens and whether it ends a stage."""
        mine = self.units[index].stage
        if mine is None:
            return False, False
        opens = index == 0 or self.units[index - 1].stage != mine
        return opens, index + 1 == len(self.units) or self.units[index + 1].stage != mine

    @abstractmethod
    def sink_positions(self, unit: Unit, asked: int) -> int:
        """Leading tokens with a bias of their own at granularity ``sink``.

        Args:
            unit: The unit whose site it is.
            asked: The setting's number.
        """

    @abstractmethod
    def capture(self, samples: Samples, batch_size: int, device: torch.device, store: Store | str) -> Stream:
        """A stream of samples at the first unit's input."""

    @abstractmethod
    def logits(self, stream: Stream, index: int) -> Tensor:
        """Logits of one batch of a stream that has passed all units."""


class LanguageChain(Chain):
    """The blocks of a causal language model."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        from bc.scaling import predecessors  # it walks the blocks too

        norms = predecessors(model, family)
        self.units = [block_unit(family, i, block, norms) for i, block in enumerate(block_list(model, family))]
        self.context = PositionContext.of(model)
        self.tail = tuple(submodule(model, path) for path in family.tail)
        self.heads = (family.head,)

    def sink_positions(self, unit: Unit, asked: int) -> int:
        """As asked."""
        return asked

    def capture(self, samples: Samples, batch_size: int, device: torch.device, store: Store | str) -> Stream:
        """See :func:`bc.calibration.capture`."""
        return capture(self.model, self.family, samples, batch_size, device, store)

    def logits(self, stream: Stream, index: int) -> Tensor:
        """See :func:`bc.calibration.logits`."""
        return logits(self.model, self.family, stream, index)


class VisionChain(Chain):
    """The units of a vision transformer, from the images to the logits."""

    reads_once = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.units = vision.units(model)
        self.heads = tuple(site.name for site in self.units[-1].sites)

    def sink_positions(self, unit: Unit, asked: int) -> int:
        """The class and distillation tokens, which only blocks have."""
        tokens = getattr(self.model, "num_prefix_tokens", 0) if unit.kind == "block" else 0
        return int(tokens)

    def capture(self, samples: Samples, batch_size: int, device: torch.device, store: Store | str) -> Stream:
        """See :func:`bc.calibration.capture_images`."""
        return capture_images(samples, batch_size, device, store, next(self.model.parameters()).dtype)

    def logits(self, stream: Stream, index: int) -> Tensor:
        """What the last unit returned."""
        return stream.cache[index]


def is_vision(model: nn.Module) -> bool:
    """Whether a model is timm's."""
    return type(model).__module__.partition(".")[0] == "timm"


def chain_of(model: nn.Module) -> Chain:
    """The chain of a model of a known family.

    Raises:
        UserError: The family is unknown, or a language model has no head.
    """
    if is_vision(model):
        return VisionChain(model)
    family = models.family_of(model)
    if not hasattr(model, family.head.partition(".")[0]):
        raise headless(model)
    return LanguageChain(model, family)


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """A language model's transformer blocks."""
    found = submodule(model, family.blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def block_unit(family: Family, index: int, block: nn.Module, before: Sequence[str] = ()) -> Unit:
    """A language model's block; ``before`` names what each group of Linears reads, where nothing else does."""
    name = f"{family.blocks}.{index}"
    found = [submodule(block, path) if path else None for path in before] or [None] * len(family.linears)
    norms = [module if isinstance(module, nn.LayerNorm) else None for module in found]
    groups = tuple(
        tuple(_site(name, block, path, norm) for path in group)
        for group, norm in zip(family.linears, norms, strict=True)
    )
    return Unit(name, block, "block", groups, family.opens, family.regions)


def _site(block_name: str, block: nn.Module, path: str, norm: nn.LayerNorm | None) -> Site:
    module = submodule(block, path)
    assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}, not a Linear"
    return Site(f"{block_name}.{path}", module, "linear", path.rpartition(".")[2], norm=norm)


def sites(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every Linear of a language model that is quantized, in forward order."""
    for site in LanguageChain(model, family).sites:
        assert isinstance(site.module, nn.Linear)
        yield site.name, site.module


def head_row(chain: Chain) -> int:
    """Values of a row that all positions of the logits share, where nothing takes it in."""
    head: Any = chain.model.get_submodule(chain.heads[0])
    return 0 if folds(head) else int(head.out_features)


def check_settings(chain: Chain, settings: Compensation) -> None:
    """Refuse scopes that a model does not have, and scope ``layer`` where it has nothing that the settings cover.

    Raises:
        UserError: The first of what is missing, and what there is.
    """
    for scope in settings.scope:
        if scope not in (*chain.scopes, SEARCH, AUTO):
            raise UserError(
                f"bc.scope: there is no {scope!r} in a {type(chain.model).__name__}; allowed: {', '.join(chain.scopes)}"
            )
    if "layer" not in settings.scope and AUTO not in settings.scope:
        return
    kinds = {site.kind for site in chain.sites}
    if not kinds & set(settings.kinds):
        raise UserError(
            f"bc.kinds: there is no {' or '.join(settings.kinds)} in a {type(chain.model).__name__}; "
            f"name one or more of {', '.join(sorted(kinds))}"
        )
    norms: list[Any] = [site.norm for site in chain.sites if site.kind == "linear" and site.norm is not None]
    if settings.method == "classic" and all(norm.bias is None for norm in norms):
        raise UserError(
            f"bc.method: 'classic' takes the biases of LayerNorms before Linears, and a {type(chain.model).__name__} "
            "has none; set bc.method=bias"
        )
