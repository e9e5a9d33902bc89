"""Devices, memory and threads: the only file that names cuda."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bc.errors import UserError, unknown

ANY = ("auto", "cuda")  # names that leave the choice among several GPUs open
MATMUL = ("highest", "high", "medium")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def visible() -> list[str]:
    """Names of the GPUs that this process may use, as :func:`restrict` takes them; initialises none of them."""
    chosen = os.environ.get(_VISIBLE)
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]


def restrict(name: str) -> None:
    """Let this process see one GPU only; has to be called before any is used."""
    os.environ[_VISIBLE] = name


def resolve(name: str | torch.device = "auto", where: str = "device") -> torch.device:
    """Turn a device name into a device that exists here.

    Args:
        name: ``auto`` (the GPU where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``; or a device.
        where: Name of the setting, for the message.

    Returns:
        The device.

    Raises:
        UserError: The name is malformed or the device is absent.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = str(name)
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"{where}: {name!r} is not known; allowed: auto, cpu, cuda, cuda:N; set {where}=auto")
    if not count or int(index or 0) >= count:
        raise UserError(
            f"{where}: {name!r} is absent here ({count} CUDA devices found); set {where}=auto or {where}=cpu"
        )
    return torch.device("cuda", int(index or 0))


def describe(device: torch.device) -> str:
    """Human-readable name of a device, for provenance (GPU model, or CPU model and thread count)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak-memory measurement: of the device's allocator on CUDA, of this process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        refs.write_text("5", encoding="ascii")  # resets VmHWM; see proc(5)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB since the last reset: of the device's allocator on CUDA, of the process on the CPU.

    Where the system cannot reset it (not Linux), the process's peak since its start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory_bytes(device: torch.device) -> int | None:
    """Free bytes on a GPU; None on the CPU, where the model already lives."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a tensor did not fit into the memory of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU's allocator


def release(device: torch.device) -> None:
    """Give cached blocks back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim()


def trim() -> None:
    """Give freed host memory back to the system; glibc keeps what lies between blocks that are still in use."""
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Use so many CPU threads for a while.

    Loops over small tensors run faster on one thread than with a barrier an operation, above all on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_arithmetic(matmul: str = "highest", *, deterministic: bool = False) -> None:
    """Fix the arithmetic policy of this process; convolution algorithms are deterministic always.

    Args:
        matmul: Precision of fp32 matmuls and convolutions as PyTorch names it: ``highest`` (fp32 throughout), ``high``
            (TF32 where the device has it) or ``medium`` (bfloat16 where it has that, otherwise as ``high``).
        deterministic: Refuse operations whose results vary from run to run. A GPU's has to be set before it is used.

    Raises:
        UserError: The precision is unknown, or the GPU is in use already.
    """
    if matmul not in MATMUL:
        raise unknown("matmul", matmul, MATMUL)
    if deterministic:
        if torch.cuda.is_initialized() and _WORKSPACE not in os.environ:
            raise UserError(
                "deterministic: a GPU is in use already; set it before the first use, or set "
                f"{_WORKSPACE}=:4096:8 in the environment"
            )
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # without a workspace of its own cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = matmul != "highest"  # PyTorch's default is TF32
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
