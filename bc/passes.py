"""One pass of samples through a unit, during which functions take what its modules are fed or return.

Whatever can be learnt in the same pass is learnt in it: sums of inputs, second moments, the unit's own output. Where
the output is not wanted, a forward ends with the last module that is listened to, so that a block's last Linear, whose
input is all that is asked for, is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bc.activations import quantizers_of
from bc.calibration import StopForward, Stream, hooked
from bc.sites import Site, Unit
from bc.statistics import PositionSums

Taker = Callable[[tuple[Any, ...], Any], None]
PANEL = 512  # columns of a second moment that are multiplied together


def linears(unit: Unit) -> list[tuple[Site, ...]]:
    """Groups of the sites of a unit that are Linears."""
    groups = [tuple(site for site in group if site.kind == "linear") for group in unit.groups]
    return [group for group in groups if group]


def passed(
    stream: Stream,
    block: nn.Module,
    before: Mapping[nn.Module, Taker],
    after: Mapping[nn.Module, Taker] | None = None,
    *,
    whole: bool = True,
) -> Iterator[Tensor | None]:
    """Run a block on every batch of a stream; the stream's hidden states stay.

    Args:
        stream: The samples.
        block: What to run.
        before: Module of the block → function of (arguments, None), called before the module runs.
        after: Module of the block → function of (arguments, output), called after it has run.
        whole: The block's output is wanted; else a forward ends once every function has been called.

    Yields:
        The block's output for each batch in order, or None where the forward was ended early.
    """
    after = after or {}
    waiting: set[nn.Module] = set()

    def serving(take: Taker) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            take(args, output)
            waiting.discard(module)
            if not whole and not waiting:
                raise StopForward

        return hook

    if not whole and not before and not after:
        return
    with (
        hooked({module: serving(take) for module, take in before.items()}, inputs=True),
        hooked({module: serving(take) for module, take in after.items()}, inputs=False),
    ):
        for b in range(len(stream)):
            waiting.update(before, after)
            output = None
            try:
                output = stream.run(block, b)
            except StopForward:
                pass
            yield output


def advance(
    stream: Stream,
    block: nn.Module,
    before: Mapping[nn.Module, Taker],
    after: Mapping[nn.Module, Taker] | None = None,
    *,
    to: Stream | None = None,
    whole: bool = True,
) -> None:
    """The same, keeping the outputs that there are: as the stream's new hidden states, or in a stream of their own.

    Args:
        stream: The samples.
        block: What to run.
        before: See :func:`passed`.
        after: See :func:`passed`.
        to: An empty stream (:meth:`bc.calibration.Stream.empty`) for the outputs; None takes ``stream`` itself.
        whole: The outputs are wanted.
    """
    for b, output in enumerate(passed(stream, block, before, after, whole=whole)):
        if output is None:
            continue
        if to is None:
            stream.cache[b] = output
        else:
            to.cache.append(output)


def adding(stream: Stream, sums: dict[str, PositionSums], name: str) -> Taker:
    """Function that adds a module's first argument to sums by position."""
    return lambda args, output: stream.add(sums, name, args[0])


def both(one: Taker, two: Taker) -> Taker:
    """Function that calls two."""

    def take(args: tuple[Any, ...], output: Any) -> None:
        one(args, output)
        two(args, output)

    return take


class SecondMoment:
    """Mean of x xᵀ over tokens, from batches.

    Only the panels on and right of the diagonal are multiplied; the rest is their mirror image.

    Args:
        columns: Length of x.
        device: Where to keep it.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add rows, shape (tokens, columns), floating; products and sums are fp32."""
        x = x.float()
        for start in range(0, len(self.total), PANEL):
            panel = slice(start, start + PANEL)
            self.total[panel, start:].addmm_(x[:, panel].T, x[:, start:])
        self.tokens += len(x)

    def mean(self) -> Tensor:
        """The mean, fp32, shape (columns, columns); the sums are used up."""
        upper = self.total.div_(self.tokens)
        for start in range(0, len(upper), PANEL):
            stop = start + PANEL
            upper[stop:, start:stop] = upper[start:stop, stop:].T
        return upper


def second_moments(
    unit: Unit, stream: Stream, sums: dict[str, PositionSums] | None = None, to: Stream | None = None
) -> dict[str, Tensor]:
    """Mean of x xᵀ of the inputs of each group of Linears, in one pass; the stream's hidden states stay.

    Args:
        unit: The unit.
        stream: The samples at its input.
        sums: Gets the sums of the same inputs by position, by the name of each group's first Linear; None sums nothing.
        to: An empty stream that gets the unit's outputs; None leaves them uncomputed.

    Returns:
        Name of the first Linear of each group → fp32 matrix of shape (in, in).
    """
    found: dict[str, SecondMoment] = {}
    before: dict[nn.Module, Taker] = {}
    for group in linears(unit):
        module: Any = group[0].module
        moment = found[group[0].name] = SecondMoment(module.in_features, module.weight.device)
        take = _adding_products(stream, moment)
        before[module] = take if sums is None else both(take, adding(stream, sums, group[0].name))
    advance(stream, unit.module, before, to=to, whole=to is not None)
    return {name: moment.mean() for name, moment in found.items()}


def _adding_products(stream: Stream, moment: SecondMoment) -> Taker:
    def take(args: tuple[Any, ...], output: Any) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        moment.add(x if stream.call.valid is None else x[stream.call.valid.reshape(-1)])

    return take


def input_sums(unit: Unit, stream: Stream, sums: dict[str, PositionSums], *, whole: bool) -> None:
    """Add the inputs of every group of Linears to sums by position, and move the stream past the unit.

    Args:
        unit: The unit, with float weights.
        stream: The samples at its input.
        sums: Gets the sums, by the name of each group's first Linear.
        whole: The unit's outputs are wanted; else the stream stays where it is.
    """
    advance(stream, unit.module, {g[0].module: adding(stream, sums, g[0].name) for g in linears(unit)}, whole=whole)


def adding_difference(stream: Stream, sums: dict[str, PositionSums], site: Site) -> Taker:
    """Function that adds the difference between a float site's output and that of the quantized site on its inputs."""

    def take(args: tuple[Any, ...], output: Tensor) -> None:
        stream.add(sums, site.name, output.float() - site.module(*args).float(), site.layout)

    return take


def add_quantized(
    stream: Stream, sums: dict[str, PositionSums], site: Site, module: nn.Module, before: dict[nn.Module, Taker]
) -> None:
    """Take besides what a quantized site makes of a float module's input; nothing where it takes it as it is."""
    quantizers = quantizers_of(site.module)
    if quantizers is None:
        return

    def take(args: tuple[Any, ...], output: Any) -> None:
        stream.add(sums, f"{site.name} quantized", quantizers.quantized(args)[0])

    before[module] = both(before[module], take) if module in before else take


def add_local(
    stream: Stream,
    sums: dict[str, PositionSums],
    sites: Mapping[Site, nn.Module],
    before: dict[nn.Module, Taker],
    after: dict[nn.Module, Taker],
) -> None:
    """Take besides what quantized sites make of the inputs of float modules: the input, or a site's own output."""

    def adding_local(site: Site) -> Taker:
        return lambda args, output: stream.add(sums, f"{site.name} local", site.module(*args), site.layout)

    for site, module in sites.items():
        if site.kind == "linear":
            add_quantized(stream, sums, site, module, before)
        else:
            after[module] = both(after[module], adding_local(site))


def adding_edges(
    stream: Stream, sums: dict[str, PositionSums], modules: Mapping[Site, nn.Module]
) -> tuple[dict[nn.Module, Taker], dict[nn.Module, Taker]]:
    """Functions that add the inputs of Linears, called before these run, and the outputs of other sites."""
    before = {m: adding(stream, sums, site.name) for site, m in modules.items() if site.kind == "linear"}
    after = {m: adding_output(stream, sums, site) for site, m in modules.items() if site.kind != "linear"}
    return before, after


def adding_output(stream: Stream, sums: dict[str, PositionSums], site: Site) -> Taker:
    """Function that adds what a site returns."""
    return lambda args, output: stream.add(sums, site.name, output, site.layout)
