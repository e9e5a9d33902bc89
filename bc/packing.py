"""Quantized weights packed to their bit width, as files and waiting results hold them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bc.activations import ActivationQuantizer
from bc.grid import QuantizedWeight, group_index
from bc.quantizers import available
from bc.quantizers.base import STORABLE, Quantized, SiteResult

INTEGERS = (torch.int16, torch.int32)  # stand for int64; earlier files have 32 bits for indices of groups, too
RUN = 8  # codes that fill a whole number of bytes at any bit width
PIECE = RUN * 2**14  # codes that are packed at once, so that what this takes beside them stays in the cache


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, ``bits`` bits each, most significant bit first.

    Args:
        codes: uint8, any shape, values below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8, shape (ceil(codes · bits / 8),).
    """
    flat = codes.reshape(-1).cpu().numpy()
    out = np.empty(packed_size(len(flat), bits), np.uint8)
    for start in range(0, len(flat), PIECE):
        part = flat[start : start + PIECE]
        runs = np.zeros((-(-len(part) // RUN), RUN), np.uint8)
        runs.reshape(-1)[: len(part)] = part
        words = np.zeros(len(runs), np.uint64)  # the codes of a run, one after another
        for i in range(RUN):
            words |= runs[:, i].astype(np.uint64) << np.uint64(bits * (RUN - 1 - i))
        ends = words.astype(">u8").view(np.uint8).reshape(len(runs), 8)[:, 8 - bits :].reshape(-1)
        first = packed_size(start, bits)
        out[first : first + len(ends)] = ends[: len(out) - first]
    return torch.from_numpy(out)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes of the given shape.

    Raises:
        ValueError: So many codes take another number of bytes.
    """
    count = int(np.prod(shape))
    if packed.numel() != packed_size(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {packed.numel()}")
    data = packed.cpu().numpy()
    codes = np.empty(count, np.uint8)
    for start in range(0, count, PIECE):
        part = codes[start : start + PIECE]
        first = packed_size(start, bits)
        ends = np.zeros((-(-len(part) // RUN), 8), np.uint8)
        own = np.zeros(len(ends) * bits, np.uint8)
        found = data[first : first + len(own)]
        own[: len(found)] = found
        ends[:, 8 - bits :] = own.reshape(len(ends), bits)
        words = ends.reshape(-1).view(">u8").astype(np.uint64)
        runs = np.empty((len(words), RUN), np.uint8)
        for i in range(RUN):
            runs[:, i] = (words >> np.uint64(bits * (RUN - 1 - i))) & np.uint64(2**bits - 1)
        part[:] = runs.reshape(-1)[: len(part)]
    return torch.from_numpy(codes.reshape(shape))


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * bits // 8)


class PackedResult(SiteResult):
    """How a site is quantized, with a weight that waits packed and is unpacked anew whenever it is asked for.

    As quantizers make them, the weights of a model take one or two bytes each: 7 to 13 GB for LLaMA-7B, beside the
    quantized model itself. Packed they take what the table's bits per weight say.

    Args:
        facts: What :func:`store_weight` has to say of the weight.
        tensors: Its tensors by field, packed.
        inputs: As in :class:`bc.quantizers.base.SiteResult`.
        notes: As there.

    Raises:
        KeyError, TypeError, ValueError: The tensors are not those of the facts.
    """

    def __init__(
        self,
        facts: dict[str, Any],
        tensors: dict[str, Tensor],
        inputs: list[ActivationQuantizer],
        notes: dict[str, Any],
    ) -> None:
        self.facts, self.tensors, self.inputs, self.notes = facts, tensors, inputs, notes
        self._bits = self.weight.storage_bits()  # what does not fit is found out here, not in the middle of a run

    @property
    def weight(self) -> Quantized:  # type: ignore[override]
        """The weight, unpacked."""
        return restore_weight(self.facts, self.tensors)

    def storage_bits(self) -> int:
        """See :meth:`bc.quantizers.base.SiteResult.storage_bits`; nothing is unpacked for it."""
        return self._bits


def packed(result: SiteResult) -> SiteResult:
    """A result that waits packed; as it is where there is no weight, or of a form that was not marked as storable."""
    if isinstance(result, PackedResult):
        return result
    kind = next((kind for kind, form in _weights().items() if type(result.weight) is form), "")
    if not kind:
        return result
    facts, tensors = store_weight(kind, result.weight)
    return PackedResult(facts, tensors, result.inputs, result.notes)


def store_weight(kind: str, weight: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a header has to say of a weight of a storable form, and its tensors by field, packed."""
    site: dict[str, Any] = {"kind": kind, "values": {}, "packed": {}}
    tensors: dict[str, Tensor] = {}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if not isinstance(value, Tensor):
            site["values"][field.name] = value
            continue
        if field.name == "zero_point" and getattr(weight, "symmetric", False):  # known from the bit width
            continue
        if field.name == "group" and (size := _run_length(value)):  # known from the group size
            site["columns"], site["group_size"] = len(value), size
            continue
        bits = _packed_bits(field.name, value, weight)
        if bits:
            site["packed"][field.name] = {"shape": list(value.shape), "bits": bits}
            value = pack(value.to(torch.uint8), bits)
        tensors[field.name] = value.to(_integer(field.name, value)) if value.dtype == torch.int64 else value
    return site, tensors


def _integer(field: str, value: Tensor) -> torch.dtype:
    """Type that whole numbers are stored as; indices of groups as the 16 bits that the accounting counts."""
    return torch.int16 if field == "group" and int(value.max()) < 2**15 else torch.int32


def _run_length(group: Tensor) -> int:
    """Group size where the groups are runs of equal length in column order (the last may be shorter), else 0."""
    size = int((group == 0).sum())
    return size if size and torch.equal(group, group_index(len(group), size, group.device)) else 0


def _packed_bits(field: str, value: Tensor, weight: Any) -> int:
    """Bits that an element of a field is packed to; 0 leaves the tensor as it is."""
    if value.dtype == torch.bool:
        return 1
    return int(weight.bits) if field in ("codes", "zero_point") else 0


def restore_weight(site: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Inverse of :func:`store_weight`.

    Raises:
        KeyError, TypeError, ValueError: The tensors are not those of the facts.
    """
    cls = _weights()[site["kind"]]
    values: dict[str, Any] = dict(site["values"])
    for field in fields(cls):
        key = field.name
        if key in site["packed"]:
            how = site["packed"][key]
            codes = unpack(tensors[key], how["bits"], tuple(how["shape"]))
            as_found = codes if key == "codes" else codes.bool()  # what else is packed was bool
            values[key] = codes.float() if key == "zero_point" else as_found
        elif key in tensors:
            values[key] = tensors[key].long() if tensors[key].dtype in INTEGERS else tensors[key]
    if "group_size" in site:
        values["group"] = group_index(site["columns"], site["group_size"])
    if "zero_point" not in values and any(field.name == "zero_point" for field in fields(cls)):
        values["zero_point"] = torch.full_like(values["scale"], 2 ** (values["bits"] - 1))
    return cls(**values)


def _weights() -> dict[str, type]:
    """Forms of quantized weights by what files call them."""
    available()  # every quantizer's file has been read then
    return {"affine": QuantizedWeight, **STORABLE}
