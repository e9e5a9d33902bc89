"""Files of quantized weights: exact round trips, and damage that is noticed."""

from __future__ import annotations

import errno
import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bc import activation_grids, packing, storage
from bc.activations import ActivationQuantizer
from bc.checkpoint import FORMAT, DamagedFileError, load_means, load_weights, pack, save_means, save_weights, unpack
from bc.grid import Grid, quantize_weight
from bc.pipeline import calibrate, float_means
from bc.quantizers import create
from bc.quantizers.base import STORABLE, SiteResult, storable
from bc.settings import Bits
from tests.conftest import MAKERS, tiny_model


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
def test_packing_round_trip(bits, shape, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-codes.numel() * bits // 8),)
    assert torch.equal(unpack(packed, bits, tuple(shape)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_one_long_bit_string(bits):
    codes = torch.randint(0, 2**bits, (3, 5), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    text = "".join(f"{int(c):0{bits}b}" for c in codes.reshape(-1))
    text += "0" * (-len(text) % 8)
    assert bytes(pack(codes, bits).tolist()) == int(text, 2).to_bytes(len(text) // 8, "big")


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_piece_by_piece_is_packing_at_once(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (61,), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    at_once = pack(codes, bits)
    monkeypatch.setattr(packing, "PIECE", 2 * packing.RUN)
    assert torch.equal(pack(codes, bits), at_once)
    assert torch.equal(unpack(at_once, bits, (61,)), codes)


def test_packing_does_not_care_for_memory_layout():
    codes = torch.randint(0, 8, (4, 6), dtype=torch.uint8)
    assert torch.equal(pack(codes.T, 3), pack(codes.T.contiguous(), 3))


def results_of(bits: int = 3, group: int = -1, **options) -> dict[str, SiteResult]:
    samples = torch.randint(4, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    name = options.pop("name", "gptq")
    return calibrate(tiny_model("opt"), create(name, Bits(bits, 16, group), **options), samples)


def grid_like(name: str) -> dict[str, SiteResult]:
    return {
        "rtn": lambda: results_of(4, name="rtn"),
        "symmetric": lambda: results_of(2, 7, name="rtn", symmetric=True),
        "tensor": lambda: results_of(8, name="rtn", granularity="tensor"),
        "groups": lambda: results_of(3, 5),
        "act_order": lambda: results_of(3, 5, act_order=True),
        "static": lambda: results_of(5, 8, act_order=True, static_groups=True),
    }[name]()


GRIDS = ["rtn", "symmetric", "tensor", "groups", "act_order", "static"]


@pytest.mark.parametrize("name", GRIDS)
def test_saved_weights_come_back_bit_for_bit(name, tmp_path):
    path = tmp_path / "made" / "too" / "weights.safetensors"
    results = grid_like(name)
    save_weights(path, results, {"model": "tiny", "note": "äöü"})
    found, metadata = load_weights(path)
    assert list(found) == list(results)
    for key, result in results.items():
        a, b = result.weight, found[key].weight
        assert torch.equal(a.dequantize().view(torch.int32), b.dequantize().view(torch.int32))
        assert a.storage_bits() == b.storage_bits()
        assert found[key].notes == result.notes
    assert metadata["model"] == "tiny" and metadata["note"] == "äöü"


@pytest.mark.parametrize("name", GRIDS)
def test_the_file_is_about_as_large_as_the_storage_that_is_reported(name, tmp_path):
    """Beyond the header, at most the group index (which the report leaves out where it is a simple run)."""
    path, results = tmp_path / "weights.safetensors", grid_like(name)
    save_weights(path, results, {})
    header = struct.unpack("<Q", path.read_bytes()[:8])[0] + 8
    body = path.stat().st_size - header
    reported = sum(r.weight.storage_bits() for r in results.values()) / 8
    index = sum(r.weight.codes.shape[1] * 4 for r in results.values())
    assert reported - index <= body <= reported + index + 2 * len(results)


@pytest.mark.parametrize(("name", "bits"), [("rtn", 3), ("gptq", 2), ("awq", 4), ("billm", 1), ("sign", 1)])
def test_results_wait_in_the_bits_that_are_reported(name, bits, tmp_path):
    """In the byte or two a weight that they are made with, a large model's would not fit beside the model."""
    made = results_of(bits, name=name)
    save_weights(tmp_path / "weights", made, {})
    for results in (made, load_weights(tmp_path / "weights")[0]):
        for result in results.values():
            kept = vars(result)
            held = sum(t.numel() * t.element_size() * 8 for t in kept["tensors"].values())
            assert 0 <= held - result.weight.storage_bits() < 8 * len(kept["tensors"])
            assert result.weight is not result.weight and not any(k.endswith("weight") for k in kept)


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, not 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, (2, 5))


def test_tensors_are_copied_only_where_they_share_memory():
    a = torch.randn(4, 6)
    found = storage.apart({"a": a, "again": a, "part": a[1:], "turned": torch.randn(3, 2).T, "own": torch.ones(2)})
    assert found["a"] is a and all(value.is_contiguous() for value in found.values())
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 5
    assert torch.equal(found["again"], a) and torch.equal(found["part"], a[1:])


def test_indices_of_groups_take_the_bits_that_are_reported(tmp_path):
    results = grid_like("act_order")
    save_weights(tmp_path / "weights", results, {})
    tensors, header = storage.read(tmp_path / "weights", FORMAT)
    for name, result in results.items():
        parts = [value for key, value in tensors.items() if key.startswith(f"{name}.")]
        stored = sum(part.numel() * part.element_size() * 8 for part in parts)
        assert 0 <= stored - result.weight.storage_bits() < 8 * len(parts)  # what fills the last byte
    wide = {k: v.int() if k.endswith(".group") else v for k, v in tensors.items()}  # as it was once written
    storage.write(tmp_path / "weights", wide, header)
    found, _ = load_weights(tmp_path / "weights")
    assert all(torch.equal(found[name].weight.group, result.weight.group) for name, result in results.items())


def test_indices_of_more_groups_than_16_bits_hold_come_back(tmp_path):
    weight = quantize_weight(torch.randn(1, 2**15 + 4), Grid(3, group_size=1))
    weight.group, weight.trivial_groups = weight.group.flip(0), False
    save_weights(tmp_path / "weights", {"a": SiteResult(weight)}, {})
    assert torch.equal(load_weights(tmp_path / "weights")[0]["a"].weight.group, weight.group)


def test_nothing_temporary_is_left(tmp_path):
    path = tmp_path / "weights.safetensors"
    for _ in range(2):
        save_weights(path, results_of(name="rtn"), {})
        assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_failure_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path, results = tmp_path / "weights.safetensors", results_of(name="rtn")
    save_weights(path, results, {"version": "old"})
    before = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("bc.storage.os.fsync", fails)
    with pytest.raises(OSError, match="no space"):
        save_weights(path, results, {"version": "new"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_errors_of_the_system_are_told_from_those_of_a_library(tmp_path):
    """Rust's libraries give the number in their text alone."""
    with pytest.raises(OSError, match="No space left") as told, storage.errors_of_the_system(tmp_path):
        raise Exception("No space left on device (os error 28)")
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)
    with pytest.raises(ValueError, match="malformed"), storage.errors_of_the_system(tmp_path):
        raise ValueError("malformed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("saved") / "weights.safetensors"
    weights = {"a.b": SiteResult(quantize_weight(weight, Grid(3, group_size=3)), notes={"damping": 0.01})}
    save_weights(path, weights, {"model": "tiny"})
    return path.read_bytes()


def meaning(path: Path):
    found, metadata = load_weights(path)
    return {k: (v.weight.dequantize().tolist(), v.notes) for k, v in found.items()}, metadata


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_any_changed_byte_is_noticed(saved, tmp_path, flip):
    """In the lengths, the header, the metadata and the data; blanks of the header may change into other blanks."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(saved)
    reference = meaning(path)
    noticed = 0
    for place in range(len(saved)):
        damaged = bytearray(saved)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        try:
            assert meaning(path) == reference, f"byte {place} of {len(saved)} changed what was read"
        except DamagedFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed >= len(saved) - 8


def test_any_truncation_is_noticed(saved, tmp_path):
    path = tmp_path / "weights.safetensors"
    for size in (0, 1, 7, 8, 20, len(saved) // 2, len(saved) - 8, len(saved) - 1):
        path.write_bytes(saved[:size])
        with pytest.raises(DamagedFileError, match="weights"):
            load_weights(path)
    path.write_bytes(saved + b"\0")
    with pytest.raises(DamagedFileError):
        load_weights(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(DamagedFileError):
        load_weights(path)  # absent
    path.write_text("not safetensors")
    with pytest.raises(DamagedFileError):
        load_weights(path)
    save_file({"x": torch.ones(2)}, str(path))
    with pytest.raises(DamagedFileError, match="weights-1"):
        load_weights(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedFileError):
        load_weights(path)


def test_a_header_that_was_edited_is_noticed(saved, tmp_path):
    size = struct.unpack("<Q", saved[:8])[0]
    header = json.loads(saved[8 : 8 + size])
    header["__metadata__"]["model"] = "tine"
    text = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + saved[8 + size :])
    with pytest.raises(DamagedFileError, match="SHA-256"):
        load_weights(path)


@pytest.mark.parametrize("name", list(MAKERS))
def test_means_round_trip(name, tmp_path):
    samples = torch.randint(4, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    means = float_means(tiny_model(name), samples)
    save_means(tmp_path, means, {"model": "tiny"})
    found = load_means(tmp_path)
    assert found.keys() == means.keys()
    for key, sums in means.items():
        assert torch.equal(found[key].count, sums.count)
        assert np.allclose(found[key].total.numpy(), sums.total.numpy(), rtol=1e-6)
        assert found[key].total.dtype == torch.float32  # half the memory, for all blocks at once
        for granularity in ("channel", "sink", "positional"):
            assert torch.allclose(found[key].mean(granularity), sums.mean(granularity), rtol=1e-5, atol=1e-6)


def test_damaged_means_are_noticed(tmp_path):
    means = float_means(tiny_model("opt"), torch.full((2, 4), 5))
    save_means(tmp_path, means, {})
    path = tmp_path / "means.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError):
        load_means(tmp_path)
    save_weights(path, {}, {})  # a file of ours, but of another kind
    with pytest.raises(DamagedFileError):
        load_means(tmp_path)


@dataclass
class Codebook:
    """A form of weight that no file of the package knows: indices into a table of values by row."""

    codes: torch.Tensor
    table: torch.Tensor
    mask: torch.Tensor
    bits: int

    def dequantize(self):
        return self.table.gather(1, self.codes.long()) * self.mask

    def storage_bits(self):
        return self.codes.numel() * self.bits + self.table.numel() * 32 + self.mask.numel()


def test_a_quantizers_own_form_of_weight_can_be_stored_once_it_is_marked(tmp_path, monkeypatch):
    weight = Codebook(torch.randint(0, 8, (6, 10), dtype=torch.uint8), torch.randn(6, 8), torch.rand(6, 10) > 0.2, 3)
    with pytest.raises(TypeError, match=r"a Codebook cannot be saved; mark it with bc\.quantizers\.base\.storable"):
        save_weights(tmp_path / "a", {"x": SiteResult(weight)}, {})
    monkeypatch.setitem(STORABLE, "codebook", None)  # taken back in the end
    assert storable("codebook")(Codebook) is Codebook
    save_weights(tmp_path / "a", {"x": SiteResult(weight)}, {})
    found = load_weights(tmp_path / "a")[0]["x"].weight
    assert isinstance(found, Codebook) and found.bits == 3
    assert torch.equal(found.dequantize(), weight.dequantize())


def test_every_activation_quantizer_of_the_package_has_a_file_format():
    names = {cls.__name__ for cls in vars(activation_grids).values() if isinstance(cls, type)}
    known = {name for name in names if issubclass(getattr(activation_grids, name), ActivationQuantizer)}
    assert known <= set(storage._activations())
