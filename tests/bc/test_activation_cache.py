"""Where activations wait: equal values in every place, budgets, narrower storage, full disks."""

from __future__ import annotations

import copy
import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from bc.activation_cache import PREFIX, ActivationCache, Store, reserve
from bc.calibration import capture
from bc.chains import block_list
from bc.errors import UserError
from bc.models import family_of
from bc.pipeline import Engine, calibrate, compensate
from bc.quantizers import create
from bc.settings import Bits, Compensation
from tests.conftest import VOCABULARY, tiny_model

CPU = torch.device("cpu")
MIB = 2**20


def values(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw).to(dtype) for _ in range(count)]


def filled(store: Store | str, batches: list[torch.Tensor]) -> ActivationCache:
    cache = ActivationCache(store, CPU)
    for value in batches:
        cache.append(value)
    return cache


def files(cache: ActivationCache) -> list[Path]:
    return [] if cache._folder is None else sorted(Path(cache._folder.name).iterdir())


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_disk_cache_is_in_its_files() -> None:
    cache = ActivationCache("disk", CPU)
    value = torch.randn(2, 3)
    cache.append(value)
    (path,) = files(cache)
    assert torch.equal(torch.from_file(str(path), size=6).view(2, 3), value)
    cache[0] = 2 * value
    assert torch.equal(torch.from_file(str(path), size=6).view(2, 3), 2 * value)
    assert (cache.nbytes, cache.resident) == (24, 0)


def test_disk_files_go_with_the_cache() -> None:
    cache = ActivationCache("disk", CPU)
    cache.append(torch.ones(2, 3))
    folder = cache._folder
    assert folder is not None
    folder.cleanup()
    assert torch.equal(cache[0], torch.ones(2, 3))


def test_a_file_has_its_space_on_the_disk(tmp_path: Path) -> None:
    reserve(tmp_path / "states", 3 * MIB + 5)
    found = (tmp_path / "states").stat()
    assert found.st_size == 3 * MIB + 5
    assert found.st_blocks * 512 >= found.st_size  # not sparse


def test_a_file_has_its_space_where_the_system_cannot_reserve_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    test_a_file_has_its_space_on_the_disk(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_is_an_error_that_names_the_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))  # as the system does, without a name

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        filled("disk", values(1, 4))
    assert caught.value.errno == number
    assert PREFIX in caught.value.filename
    assert caught.value.filename.startswith(str(tmp_path))


def test_an_unknown_place_is_told() -> None:
    with pytest.raises(UserError, match="activations: 'tape' is not known; allowed: device, host, disk"):
        Engine(activations="tape")


# A budget -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "device"])
def test_what_exceeds_the_budget_goes_to_files(place: str) -> None:
    batches = values(6, 4, 8)  # 128 bytes each
    cache = filled(Store(place, budget=300), batches)
    assert (cache.resident, cache.nbytes, len(files(cache))) == (256, 768, 4)
    assert all(torch.equal(cache[i], value) for i, value in enumerate(batches))
    for i, value in enumerate(batches):
        cache[i] = -value
    assert all(torch.equal(cache[i], -value) for i, value in enumerate(batches))


def test_caches_of_a_store_share_its_budget() -> None:
    store = Store(budget=300)
    one = filled(store, values(2, 4, 8))
    two = one.empty_twin()
    two.append(torch.ones(4, 8))
    assert (one.resident, two.resident, store.used) == (256, 0, 256)
    del one
    gc.collect()
    two.append(torch.ones(4, 8))
    assert (two.resident, store.used) == (128, 128)


@pytest.mark.parametrize("before", [(4, 8), (8, 8), (1, 1)])
@pytest.mark.parametrize("after", [(2, 4), (16, 16)])
def test_a_new_shape_is_counted_anew(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    store = Store(budget=600)
    cache = filled(store, values(5, *before))
    batches = values(5, *after)
    for i, value in enumerate(batches):
        cache[i] = value
        assert store.used <= 600
    assert all(torch.equal(cache[i], value) for i, value in enumerate(batches))
    assert len(files(cache)) == sum(item.path is not None for item in cache._items)  # old files are gone


@pytest.mark.parametrize("mib", [0, 1])
def test_a_budget_changes_no_result_and_is_never_exceeded(mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(1)
    ids, held_out = (torch.randint(4, VOCABULARY, (n, 20), generator=draw) for n in (160, 80))  # 400, 200 KiB each
    most = 0
    register, kept = Store.register, ActivationCache._kept
    stores: list[Store] = []

    def registering(self: Store, cache: ActivationCache) -> None:
        stores.append(self)
        register(self, cache)

    def keeping(self: ActivationCache, index: int, value: torch.Tensor) -> object:
        nonlocal most
        item = kept(self, index, value)
        most = max(most, self.store.used + (item.nbytes if item.path is None else 0))
        return item

    monkeypatch.setattr(Store, "register", registering)
    monkeypatch.setattr(ActivationCache, "_kept", keeping)

    def run(engine: Engine) -> tuple[torch.Tensor, float]:
        twin = copy.deepcopy(model)
        found = calibrate(twin, create("gptq", Bits(3)), ids, engine)
        settings = Compensation(("layer", "block"), "sink", "quantized")
        report = compensate(twin, found, settings, ids, engine, report_held_out=held_out)
        with torch.no_grad():
            error = report.error("held_out")
            assert error is not None
            return twin(input_ids=held_out).logits, error[1]

    logits, error = run(Engine(CPU, 8))
    assert most > MIB  # without a limit there is more than the budgets
    stores.clear()
    most = 0
    other, same = run(Engine(CPU, 8, memory_mib=mib))
    assert torch.equal(other, logits) and same == error
    assert most <= mib * MIB
    assert most >= 0.9 * mib * MIB
    assert all(store.budget == mib * MIB for store in stores)


# Narrower storage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "device", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_rounds_and_takes_two_bytes(place: str, dtype: torch.dtype) -> None:
    batches = values(3, 4, 8, dtype=dtype)
    cache = filled(Store(place, torch.bfloat16), batches)
    assert cache.nbytes == 3 * 4 * 8 * 2
    for i, value in enumerate(batches):
        assert cache[i].dtype == dtype
        assert torch.equal(cache[i], value.bfloat16().to(dtype))
        cache[i] = 3 * value
        assert torch.equal(cache[i], (3 * value).bfloat16().to(dtype))


def test_a_wider_storage_loses_nothing() -> None:
    batches = values(2, 4, 8, dtype=torch.bfloat16)
    cache = filled(Store("disk", torch.float32), batches)
    assert all(torch.equal(cache[i], value) and cache[i].dtype == torch.bfloat16 for i, value in enumerate(batches))


def test_bfloat16_rounds_what_every_block_is_fed(token_ids: torch.Tensor) -> None:
    model = tiny_model("opt")
    family = family_of(model)
    stream = capture(model, family, token_ids, 2, CPU, Store(dtype=torch.bfloat16))
    exact = capture(model, family, token_ids, 2, CPU)
    for block in block_list(model, family):
        for i in range(len(exact)):
            exact.cache[i] = exact.cache[i].bfloat16().float()
        stream.advance(block)
        exact.advance(block)
    for i in range(len(exact)):
        assert torch.equal(stream.cache[i], exact.cache[i].bfloat16().float())
        assert not torch.equal(stream.cache[i], exact.cache[i])
