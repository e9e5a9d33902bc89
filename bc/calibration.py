"""The streaming calibration engine: capture what enters the blocks, replay block by block.

Only one block's inputs are kept for each stream of samples. A stream holds, for each batch, the hidden states that
enter the current block and every other argument that the model passed to its blocks; :meth:`Stream.advance` replaces
the hidden states by the block's outputs. Beside the model itself (once, in host memory) the engine needs two blocks on
the device, the activations of its streams, and the statistics of one block, whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bc.activation_cache import ActivationCache, Store
from bc.compensation import to_rows
from bc.errors import UserError
from bc.models import Family, submodule
from bc.positions import PositionContext, token_positions
from bc.statistics import PositionSums


class StopForward(Exception):  # noqa: N818 (a signal, not an error)
    """Raised by a hook to end a forward once what is wanted has been captured."""


def move(value: Any, device: torch.device) -> Any:
    """Move every tensor in nested tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: move(v, device) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold equal tensors and values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a is b or a == b)


def output_of(result: Any) -> Tensor:
    """Hidden states in a block's result: the tensor itself, or the first element of a tuple."""
    return result if isinstance(result, Tensor) else result[0]


@dataclass
class Call:
    """Everything but the hidden states that the model passes to its blocks, for one batch.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments.
        positions: Positions of the tokens, shape (1 or batch, tokens); None in a vision model, where they are 0, 1, ….
        valid: bool, shape (batch, tokens), False at padding; None where there is none.
        keyword: Name under which the hidden states are passed; None where they come first.
        size: Samples of the batch.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    positions: Tensor | None = None
    valid: Tensor | None = None
    keyword: str | None = None
    size: int = 1


class Stream:
    """A set of samples on its way through the blocks.

    Args:
        calls: The blocks' other arguments, a batch each.
        cache: The hidden states that enter the current block.
        context: The model's positions, set before each block is run; None in a vision model.

    Attributes:
        call: The call of the batch under way.
        halves: Sums that are made here keep those of half the samples besides.
    """

    halves = False

    def __init__(self, calls: list[Call], cache: ActivationCache, context: PositionContext | None = None) -> None:
        self.calls, self.cache, self.context = calls, cache, context
        self.call = calls[0]

    def __len__(self) -> int:
        return len(self.calls)

    def add(self, sums: dict[str, PositionSums], key: str, value: Tensor, layout: str = "tokens") -> None:
        """Add the batch under way to sums by position, made at the first batch.

        Args:
            sums: Where to.
            key: Name of the sums.
            value: What a site was fed or returned.
            layout: Of the value; see :func:`bc.compensation.to_rows`.
        """
        rows = self.rows(value, layout)
        positions = self.call.positions
        if positions is None:
            positions = torch.arange(rows.shape[1], device=rows.device)[None]
        if key not in sums:
            sums[key] = PositionSums(self.longest(rows), rows.shape[2], rows.device, self.halves)
        sums[key].add(rows, positions, self.call.valid, len(rows) // self.call.size)

    def rows(self, value: Tensor, layout: str = "tokens") -> Tensor:
        """A value of the batch under way as (batch, tokens, channels)."""
        return to_rows(value, layout, None if self.call.positions is None else self.call.positions.shape[1])

    def longest(self, rows: Tensor) -> int:
        """Most positions of a sample; of the rows, (batch, tokens, channels), where the stream numbers none."""
        numbered = [int(c.positions.max()) + 1 for c in self.calls if c.positions is not None]
        return max(numbered, default=rows.shape[1])

    def later_than(self, leading: int, rows: Tensor) -> Tensor | None:
        """Which rows of the batch under way, (batch, tokens, channels), are neither padding nor leading positions."""
        if not leading:
            return self.call.valid
        positions = self.call.positions
        if positions is None:
            positions = torch.arange(rows.shape[1], device=rows.device)[None]
        late = (positions >= leading).to(rows.device).expand(rows.shape[:2])
        return late if self.call.valid is None else late & self.call.valid

    def fork(self) -> Stream:
        """A second stream over the same samples, whose hidden states may go their own way."""
        twin = self.empty()
        for i in range(len(self)):
            twin.cache.append(self.cache[i])
        return twin

    def empty(self) -> Stream:
        """A second stream over the same samples without hidden states yet, to which a pass appends them."""
        twin = Stream(self.calls, self.cache.empty_twin(), self.context)
        twin.halves = self.halves
        return twin

    def use(self, index: int) -> None:
        """Make a batch the one under way, also for the model's biases."""
        self.call = self.calls[index]
        if self.context is not None:
            self.context.set(self.call.positions, self.call.valid)

    def run(self, block: nn.Module, index: int) -> Tensor:
        """Output of a block for one batch."""
        self.use(index)
        call, hidden = self.call, self.cache[index]
        if call.keyword is None:
            return output_of(block(hidden, *call.args, **call.kwargs))
        return output_of(block(*call.args, **{call.keyword: hidden}, **call.kwargs))

    def advance(self, block: nn.Module) -> None:
        """Replace the hidden states of every batch by the block's outputs."""
        for i in range(len(self)):
            self.cache[i] = self.run(block, i)


Samples = Tensor | Sequence[Tensor] | Sequence[dict[str, Tensor]]


def batches(samples: Samples, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Cut samples into batches of model inputs.

    Args:
        samples: Token ids of shape (samples, tokens); or a list of id tensors, of lengths that may differ, each of
            shape (tokens,) or (batch, tokens); or a list of dicts with ``input_ids`` and ``attention_mask``.
        batch_size: Most samples in a batch. Samples of different lengths are never padded together.
    """
    if isinstance(samples, Tensor):
        if samples.dim() != 2:
            raise UserError(f"calibration: samples of shape {tuple(samples.shape)}; give (samples, tokens)")
        for part in samples.split(batch_size) if len(samples) else ():
            yield {"input_ids": part}
        return
    waiting: list[Tensor] = []
    for sample in samples:
        if isinstance(sample, Mapping):  # also what a tokenizer returns
            yield {k: v if v.dim() > 1 else v[None] for k, v in sample.items()}
            continue
        rows = sample if sample.dim() > 1 else sample[None]
        if waiting and (rows.shape[1] != waiting[0].shape[1] or sum(map(len, waiting)) + len(rows) > batch_size):
            yield {"input_ids": torch.cat(waiting)}
            waiting = []
        waiting.append(rows)
    if waiting:
        yield {"input_ids": torch.cat(waiting)}


@torch.no_grad()
def capture(
    model: nn.Module,
    family: Family,
    samples: Samples,
    batch_size: int,
    device: torch.device,
    store: Store | str = "host",
) -> Stream:
    """Run the part of a model before its blocks and keep everything that enters the first block.

    Args:
        model: A causal language model on the CPU.
        family: Its adapter.
        samples: See :func:`batches`.
        batch_size: Samples per batch.
        device: Where the blocks will run.
        store: How hidden states are kept; ``device``, ``host`` or ``disk`` stands for a store of that place.

    Raises:
        UserError: There are no samples.
    """
    context = PositionContext.of(model)
    cache = ActivationCache(store, device)
    calls: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyword = None if args else "hidden_states"
        hidden = args[0] if keyword is None else kwargs[keyword]
        rest = {k: v for k, v in kwargs.items() if k != keyword}
        positions, valid = context.positions, context.valid
        if positions is None:
            positions, valid = token_positions(hidden.shape[1], None, 0, None, hidden.device)
        call = move_call(Call(args[1:], rest, positions, valid, keyword, len(hidden)), device)
        if calls and same(vars(calls[-1]), vars(call)):
            call = calls[-1]
        calls.append(call)
        cache.append(hidden)
        raise StopForward

    blocks = submodule(model, family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches(samples, batch_size):
            try:
                model(**batch, use_cache=False)
            except StopForward:
                pass
    finally:
        handle.remove()
    if not calls:
        raise UserError("calibration: there are no samples; give at least one")
    return Stream(calls, cache, context)


def move_call(call: Call, device: torch.device) -> Call:
    """The same call with its tensors on a device."""
    return Call(**{k: move(v, device) for k, v in vars(call).items()})


@torch.no_grad()
def capture_images(
    samples: Samples,
    batch_size: int,
    device: torch.device,
    store: Store | str = "host",
    dtype: torch.dtype = torch.float32,
) -> Stream:
    """A stream of images at the first unit of a vision model.

    Args:
        samples: Images, floating, shape (images, channels, height, width).
        batch_size: Images per batch.
        device: Where the units will run.
        store: As for :func:`capture`.
        dtype: Of the model.

    Raises:
        UserError: There are no images, or they have another shape.
    """
    if not isinstance(samples, Tensor) or samples.dim() != 4:
        shape = f" of shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else ""
        raise UserError(f"calibration: samples{shape} are no images; give (images, channels, height, width)")
    if not len(samples):
        raise UserError("calibration: there are no samples; give at least one")
    cache = ActivationCache(store, device)
    calls = []
    for images in samples.split(batch_size):
        cache.append(images.to(dtype))
        calls.append(Call(size=len(images)))
    return Stream(calls, cache)


@torch.no_grad()
def logits(model: nn.Module, family: Family, stream: Stream, index: int) -> Tensor:
    """Apply what follows the blocks to one batch of a stream that has passed them all."""
    hidden = stream.cache[index]
    assert stream.context is not None
    stream.context.set(stream.calls[index].positions, stream.calls[index].valid)
    for path in family.tail:
        module = submodule(model, path)
        if module is not None:
            hidden = module(hidden)
    return hidden


@contextmanager
def on_device(device: torch.device, *modules: nn.Module | None) -> Iterator[None]:
    """Keep modules on a device for a while, then put them back on the CPU."""
    present = [m for m in modules if m is not None]
    for module in present:
        module.to(device)
    try:
        yield
    finally:
        for module in present:
            module.to("cpu")


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[..., Any]], *, inputs: bool) -> Iterator[None]:
    """Attach hooks for a while.

    Args:
        hooks: Module → function of (module, args, kwargs), for inputs, or of (module, args, kwargs, output).
        inputs: Hook the inputs (before the forward) instead of the outputs.
    """
    handles = [
        m.register_forward_pre_hook(f, with_kwargs=True) if inputs else m.register_forward_hook(f, with_kwargs=True)
        for m, f in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
