"""What a report of a defect needs to know of an installation: versions, compiled parts, devices."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "triton", "numpy", "gymnasium", "mujoco", "h5py", "safetensors")


def describe_installation() -> str:
    """A few lines: dydiff's version and commit, those of what it stands on, whether its compiled parts are there, the devices."""
    import torch

    from dydiff import __version__
    from dydiff.device import has_fast_bf16

    lines = [f"dydiff {__version__}{_commit()}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {_version_of(name)}" for name in PACKAGES) + f" (CUDA {torch.version.cuda or 'none'})")
    bf16 = "multiplied in hardware" if has_fast_bf16(torch.device("cpu")) else "not multiplied in hardware"
    lines.append(f"cpu: {torch.get_num_threads()} threads, bfloat16 {bf16}; {_compiled('cpu')}")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}: {card.name}, sm_{card.major}{card.minor}, {memory}; {_compiled(f'cuda:{index}')}")
    return "\n".join(lines)


def _commit() -> str:
    """The commit of the clone that dydiff is run from, with a + if files differ from it; empty for an installed copy."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return f" ({subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):  # no git, or a clone of somebody else
        return ""


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _compiled(device: str) -> str:
    from dydiff.kernels.native import why_unavailable

    return why_unavailable(device) or "compiled parts: there"
