"""Where and with what numbers were measured."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "avx_vnni")


def describe_machine(device: str) -> dict[str, Any]:
    """Where and with what the numbers were measured, for every line of the results."""
    machine: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_model(),
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    if device.startswith("cuda"):
        machine |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": _driver()}
    return machine


def _cpu_model() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    present = _cpu_field("flags").split()
    return [flag for flag in CPU_FLAGS if flag in present]


def _cpu_field(name: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checked-out commit, with a + if files differ from it."""
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _output_of("git", "status", "--porcelain") else "")


def _driver() -> str | None:
    return _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
