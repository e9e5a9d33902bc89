"""The arithmetic policy and the number of cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from bc import device as devices
from bc.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _policy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, ":16:8")  # so that it is as before afterwards
    monkeypatch.delenv(WORKSPACE)
    yield
    devices.set_arithmetic()


@pytest.mark.parametrize("matmul", devices.MATMUL)
def test_matmuls_and_convolutions_have_the_same_precision(matmul: str) -> None:
    devices.set_arithmetic(matmul)
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cuda.matmul.allow_tf32 is (matmul != "highest")
    assert torch.backends.cudnn.allow_tf32 is (matmul != "highest")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms_are_switched_on_and_off() -> None:
    devices.set_arithmetic(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"
    devices.set_arithmetic()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_users_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":16:8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    devices.set_arithmetic(deterministic=True)
    assert os.environ[WORKSPACE] == ":16:8"


def test_deterministic_algorithms_come_before_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"deterministic: a GPU is in use already; .*CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        devices.set_arithmetic(deterministic=True)


def test_an_unknown_precision_is_told() -> None:
    with pytest.raises(UserError, match="matmul: 'tf32' is not known; allowed: high, highest, medium"):
        devices.set_arithmetic("tf32")


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9}, raising=False)
    assert devices.cores() == 3
